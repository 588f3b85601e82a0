# SPDX-License-Identifier: Apache-2.0
"""OPT (arXiv 2205.01068) for SGLang: every released size, Galactica, LoRA, TP, PP.

The network is the one of Transformers' ``OPTForCausalLM`` and its modules keep
the Hugging Face names, so that a PEFT adapter maps onto them by name; only
``q_proj``, ``k_proj`` and ``v_proj`` are stacked into one ``qkv_proj``.

Shape names: T tokens of the packed batch, H ``hidden_size``, E
``word_embed_proj_dim`` (E = H except in OPT-350m), F ``ffn_dim``, V the
vocabulary size.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import OPTConfig
from transformers.activations import ACT2FN

from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.pooler import EmbeddingPoolerOutput, Pooler, PoolingType
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_loader.weight_utils import default_weight_loader, maybe_remap_kv_scale_name
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix, make_pp_layers

Quant = QuantizationConfig | None


def _layer_norm(config: OPTConfig) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, elementwise_affine=config.layer_norm_elementwise_affine)


def _embedding_width(config: OPTConfig) -> int:
    return config.word_embed_proj_dim or config.hidden_size


class OPTLearnedPositionalEmbedding(nn.Embedding):
    """Learned positions; the first two rows of the table belong to no position."""

    OFFSET = 2

    def __init__(self, num_positions: int, embedding_dim: int) -> None:
        super().__init__(num_positions + self.OFFSET, embedding_dim)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """[T] positions from 0 -> [T, H]."""
        return super().forward(positions + self.OFFSET)


class OPTAttention(nn.Module):
    def __init__(self, config: OPTConfig, layer_id: int, quant: Quant, prefix: str):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        tp_size = get_parallel().tp_size
        if hidden % heads or heads % tp_size:
            raise ValueError(
                f"hidden_size={hidden} must be a multiple of num_attention_heads={heads}, and that of tp_size={tp_size}"
            )
        head_dim = hidden // heads
        options = {"bias": config.enable_bias, "quant_config": quant}
        self.qkv_proj = QKVParallelLinear(hidden, head_dim, heads, prefix=add_prefix("qkv_proj", prefix), **options)
        self.out_proj = RowParallelLinear(hidden, hidden, prefix=add_prefix("out_proj", prefix), **options)
        self.attn = RadixAttention(
            heads // tp_size,
            head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=heads // tp_size,
            layer_id=layer_id,
            quant_config=quant,
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        output, _ = self.out_proj(self.attn(q, k, v, forward_batch))
        return output


class OPTDecoderLayer(nn.Module):
    """Attention and feed-forward, each with a residual and a layer norm.

    The layer norm stands before its block (``do_layer_norm_before``), or, in
    OPT-350m, after the residual sum.
    """

    def __init__(self, config: OPTConfig, layer_id: int, quant: Quant, prefix: str):
        super().__init__()
        self.pre_norm = config.do_layer_norm_before
        attn_prefix = add_prefix("self_attn", prefix)
        self.self_attn = OPTAttention(config, layer_id, quant, attn_prefix)
        self.self_attn_layer_norm = _layer_norm(config)
        hidden, ffn = config.hidden_size, config.ffn_dim
        options = {"bias": config.enable_bias, "quant_config": quant}
        self.fc1 = ColumnParallelLinear(hidden, ffn, prefix=add_prefix("fc1", prefix), **options)
        self.activation_fn = ACT2FN[config.activation_function]
        if isinstance(self.activation_fn, nn.ReLU):
            self.activation_fn.inplace = True  # of fc1's output, which nothing else reads
        self.fc2 = RowParallelLinear(ffn, hidden, prefix=add_prefix("fc2", prefix), **options)
        self.final_layer_norm = _layer_norm(config)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H] through [T, F / tp_size]."""
        hidden_states, _ = self.fc1(hidden_states)
        hidden_states, _ = self.fc2(self.activation_fn(hidden_states))
        return hidden_states

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        if self.pre_norm:
            normed = self.self_attn_layer_norm(hidden_states)
            hidden_states = hidden_states + self.self_attn(normed, forward_batch)
            normed = self.final_layer_norm(hidden_states)
            return hidden_states + self.feed_forward(normed)
        hidden_states = hidden_states + self.self_attn(hidden_states, forward_batch)
        hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states = hidden_states + self.feed_forward(hidden_states)
        return self.final_layer_norm(hidden_states)


class OPTDecoder(nn.Module):
    """Embeddings, layers and what follows them; a pipeline rank builds its part."""

    layers: Any  # nn.ModuleList, as which SGLang does not declare it

    def __init__(self, config: OPTConfig, quant: Quant, prefix: str):
        super().__init__()
        self.pp_group = get_parallel().pp_group
        first, last = self.pp_group.is_first_rank, self.pp_group.is_last_rank
        hidden, width = config.hidden_size, _embedding_width(config)

        def build_if(here: bool, kind: Callable[..., nn.Module], *args, **kwargs):
            return kind(*args, **kwargs) if here else PPMissingLayer()

        def options(name: str) -> dict:
            return {"quant_config": quant, "prefix": add_prefix(name, prefix)}

        def project(name: str, here: bool, *sizes: int) -> nn.Module:
            return build_if(here, ReplicatedLinear, *sizes, bias=False, **options(name))

        self.embed_tokens = build_if(
            first or (last and config.tie_word_embeddings),
            VocabParallelEmbedding,
            config.vocab_size,
            width,
            **options("embed_tokens"),
        )
        positions = config.max_position_embeddings
        self.embed_positions = build_if(first, OPTLearnedPositionalEmbedding, positions, hidden)
        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            config.num_hidden_layers,
            lambda idx, prefix: OPTDecoderLayer(config, idx, quant, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.project_in = self.project_out = self.final_layer_norm = None
        if width != hidden:
            self.project_in = project("project_in", first, width, hidden)
            self.project_out = project("project_out", last, hidden, width)
        # A post-norm model ends in a layer norm already.
        if config.do_layer_norm_before and not config._remove_final_layer_norm:
            self.final_layer_norm = build_if(last, _layer_norm, config)

    def _embed(self, input_ids, positions, input_embeds) -> torch.Tensor:
        """[T] tokens, or [T, E] embeddings in their place -> [T, H]."""
        if input_embeds is None:
            input_embeds = self.embed_tokens(input_ids)
        if self.project_in is not None:
            input_embeds, _ = self.project_in(input_embeds)
        return input_embeds + self.embed_positions(positions)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> torch.Tensor | PPProxyTensors:
        if self.pp_group.is_first_rank:
            hidden_states = self._embed(input_ids, positions, input_embeds)
        else:
            assert pp_proxy_tensors is not None
            hidden_states = pp_proxy_tensors["hidden_states"]
        for layer in self.layers[self.start_layer : self.end_layer]:
            hidden_states = layer(hidden_states, forward_batch)
        if not self.pp_group.is_last_rank:
            return PPProxyTensors({"hidden_states": hidden_states})
        if self.final_layer_norm is not None:
            hidden_states = self.final_layer_norm(hidden_states)
        if self.project_out is not None:
            hidden_states, _ = self.project_out(hidden_states)
        return hidden_states


class OPTModel(nn.Module):
    """The body, without the head; it gives the ``decoder.`` level of the names."""

    def __init__(self, config: OPTConfig, quant: Quant, prefix: str):
        super().__init__()
        self.decoder = OPTDecoder(config, quant, add_prefix("decoder", prefix))

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> torch.Tensor | PPProxyTensors:
        """[T] tokens and positions -> [T, E], the input of the head.

        A pipeline rank that is not the last returns its [T, H] hidden states
        for the next one.
        """
        return self.decoder(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)


class OPTForCausalLM(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    supported_lora_modules = ["qkv_proj", "out_proj", "fc1", "fc2"]

    def __init__(self, config: OPTConfig, quant_config: Quant = None, prefix: str = ""):
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        self.pp_group = get_parallel().pp_group
        self.model = OPTModel(config, quant_config, add_prefix("model", prefix))
        if not self.pp_group.is_last_rank:
            self.lm_head = PPMissingLayer()
        elif config.tie_word_embeddings:
            self.lm_head = self.model.decoder.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                _embedding_width(config),
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        self.logits_processor = LogitsProcessor(config)
        self.pooler = Pooler(pooling_type=PoolingType.LAST, normalize=True)
        self._has_weights = False

    @property
    def start_layer(self) -> int:
        return self.model.decoder.start_layer

    @property
    def end_layer(self) -> int:
        return self.model.decoder.end_layer

    def get_input_embeddings(self) -> nn.Module:
        return self.model.decoder.embed_tokens

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two [V / tp_size, E] weights, one and the same where the head is tied."""
        embedding: Any = self.get_input_embeddings()
        head: Any = self.lm_head
        return embedding.weight, head.weight

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """(input, output) width of a module before tensor-parallel sharding, by
        which the LoRA memory pool sizes A and B. The layers are all alike."""
        hidden, ffn = self.config.hidden_size, self.config.ffn_dim
        width, vocab = self.config.word_embed_proj_dim, self.config.vocab_size
        dims = {
            "qkv_proj": (hidden, 3 * hidden),
            "out_proj": (hidden, hidden),
            "fc1": (hidden, ffn),
            "fc2": (ffn, hidden),
            "embed_tokens": (vocab, width),
            "lm_head": (width, vocab),
        }
        if module_name not in dims:
            raise NotImplementedError(f"OPT has no LoRA target {module_name!r}; one of {sorted(dims)}")
        return dims[module_name]

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        get_embedding: bool = False,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> LogitsProcessorOutput | EmbeddingPoolerOutput | PPProxyTensors:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if not self.pp_group.is_last_rank:
            return hidden_states
        if get_embedding:
            return self.pooler(hidden_states, forward_batch)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def post_load_weights(self) -> None:
        """Called by loaders that fill the parameters without ``load_weights``."""
        self._has_weights = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy a Hugging Face checkpoint, named ``model.decoder.*`` or ``decoder.*``.

        The first call has to bring every parameter of this rank. Later ones
        update a served model and may bring a few.

        Returns: names of the checkpoint's tensors that went into a parameter.
        Raises: ValueError for a name that the model does not have, or lacks.
        """
        params = self._params_by_checkpoint_name()
        elsewhere = self._prefixes_of_other_ranks()
        loaded: set[str] = set()
        for name, tensor in weights:
            name = f"model.{name}" if name.startswith("decoder.") else name
            if self.quant_config is not None and "scale" in name:
                name = maybe_remap_kv_scale_name(name, params)
            if name is None or name.startswith(elsewhere):
                continue
            if name not in params:
                if self._may_ignore(name):
                    continue
                raise ValueError(f"OPT has no parameter for the weight {name!r}")
            param, shard = params[name]
            loader = getattr(param, "weight_loader", default_weight_loader)
            loader(param, tensor, *shard)
            loaded.add(name)
        if not self._has_weights:
            self._check_complete(params.keys() - loaded)
        self._has_weights = True
        return loaded

    def _params_by_checkpoint_name(self) -> dict[str, tuple[nn.Parameter, tuple]]:
        """Checkpoint name -> (parameter, arguments that name the shard in it)."""
        slots: dict[str, tuple[nn.Parameter, tuple]] = {}
        for name, param in self.named_parameters():
            # A LoRA wrapper keeps the layer that it wraps one level down.
            name = name.replace(".base_layer.", ".")
            if ".qkv_proj." not in name:
                slots[name] = (param, ())
                continue
            for shard in "qkv":
                slots[name.replace("qkv_proj", f"{shard}_proj")] = (param, (shard,))
        return slots

    def _prefixes_of_other_ranks(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, PPMissingLayer))

    def _may_ignore(self, name: str) -> bool:
        """Tensors that checkpoints carry and Transformers ignores as well."""
        if name == "lm_head.weight":
            return self.config.tie_word_embeddings
        if name == "model.decoder.version":  # a marker in metaseq's exports
            return True
        # GPTQ stores zero biases for layers that have none.
        return self.quant_config is not None and name.endswith(".bias")

    def _check_complete(self, missing: Iterable[str]) -> None:
        if self.quant_config is not None:  # a scale that is left out has a default
            missing = [name for name in missing if "scale" not in name]
        if missing:
            raise ValueError(f"the checkpoint lacks weights of OPT: {sorted(missing)}")


EntryClass = OPTForCausalLM
