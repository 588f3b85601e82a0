# SPDX-License-Identifier: Apache-2.0
"""Masked language models for SGLang: RoBERTa (arXiv 1907.11692), XLM-R (1911.02116) and BERT (1810.04805), LoRA, TP.

The network is the one of Transformers' ``RobertaForMaskedLM``. Its modules have the names that SGLang's LoRA goes by:
layers are found by ``layers.N``, and projections by their last name, which in a checkpoint is ``dense`` three times.
``checkpoint_name`` leads back. Nothing is computed here but the body and what the head does to single rows: such a
model is trained offline and not served.

Shape names: T tokens of the packed batch, H ``hidden_size``, V the vocabulary size.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import BertConfig, RobertaConfig
from transformers.activations import ACT2FN

from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix

Config = RobertaConfig | BertConfig
Quant = QuantizationConfig | None


def _layer_norm(config: Config) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class Embeddings(nn.Module):
    """Words, positions and the first of the token types, which is that of every text here.

    Args:
        first_position: row of the table that the first token of a text has.
    """

    def __init__(self, config: Config, first_position: int):
        super().__init__()
        hidden = config.hidden_size
        self.first_position = first_position
        self.word_embeddings = VocabParallelEmbedding(config.vocab_size, hidden)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, hidden)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, hidden)
        self.layer_norm = _layer_norm(config)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """[T] tokens, and positions from 0 -> [T, H]."""
        words = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.layer_norm(words + self.position_embeddings(positions + self.first_position))


class Attention(nn.Module):
    """Every token attends to all of its text."""

    def __init__(self, config: Config, layer_id: int, quant: Quant, prefix: str):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_attention_heads
        tp_size = get_parallel().tp_size
        if hidden % heads or heads % tp_size:
            raise ValueError(
                f"hidden_size={hidden} must be a multiple of num_attention_heads={heads}, and that of tp_size={tp_size}"
            )
        head_dim = hidden // heads
        self.qkv_proj = QKVParallelLinear(
            hidden, head_dim, heads, quant_config=quant, prefix=add_prefix("qkv_proj", prefix)
        )
        self.out_proj = RowParallelLinear(hidden, hidden, quant_config=quant, prefix=add_prefix("out_proj", prefix))
        self.attn = RadixAttention(
            heads // tp_size,
            head_dim,
            scaling=head_dim**-0.5,
            num_kv_heads=heads // tp_size,
            layer_id=layer_id,
            attn_type=AttentionType.ENCODER_ONLY,
            quant_config=quant,
            prefix=add_prefix("attn", prefix),
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.chunk(3, dim=-1)
        output, _ = self.out_proj(self.attn(q, k, v, forward_batch))
        return output


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual and a layer norm behind it."""

    def __init__(self, config: Config, layer_id: int, quant: Quant, prefix: str):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.self_attn = Attention(config, layer_id, quant, add_prefix("self_attn", prefix))
        self.self_attn_layer_norm = _layer_norm(config)
        self.fc1 = ColumnParallelLinear(hidden, inner, quant_config=quant, prefix=add_prefix("fc1", prefix))
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = RowParallelLinear(inner, hidden, quant_config=quant, prefix=add_prefix("fc2", prefix))
        self.final_layer_norm = _layer_norm(config)

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        hidden_states = self.self_attn_layer_norm(hidden_states + self.self_attn(hidden_states, forward_batch))
        inner, _ = self.fc1(hidden_states)
        output, _ = self.fc2(self.activation_fn(inner))
        return self.final_layer_norm(hidden_states + output)


class Encoder(nn.Module):
    """The body, without the head."""

    def __init__(self, config: Config, first_position: int, quant: Quant, prefix: str):
        super().__init__()
        self.embeddings = Embeddings(config, first_position)
        self.layers = nn.ModuleList(
            Layer(config, number, quant, add_prefix(f"layers.{number}", prefix))
            for number in range(config.num_hidden_layers)
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """[T] tokens, and positions from 0 -> [T, H]."""
        hidden_states = self.embeddings(input_ids, positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states, forward_batch)
        return hidden_states


class MaskedLMHead(nn.Module):
    """What the head has of its own: its product is with the word embeddings."""

    def __init__(self, config: Config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.layer_norm = _layer_norm(config)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, H] -> [rows, H]."""
        return self.layer_norm(self.activation_fn(self.dense(hidden_states)))


class RobertaForMaskedLM(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    supported_lora_modules = ["qkv_proj"]

    names: tuple[tuple[str, str], ...] = (
        ("head.", "lm_head."),
        ("model.embeddings.layer_norm.", "roberta.embeddings.LayerNorm."),
        ("model.embeddings.", "roberta.embeddings."),
        ("model.layers.", "roberta.encoder.layer."),
        (".self_attn.q_proj.", ".attention.self.query."),
        (".self_attn.k_proj.", ".attention.self.key."),
        (".self_attn.v_proj.", ".attention.self.value."),
        (".self_attn.out_proj.", ".attention.output.dense."),
        (".self_attn_layer_norm.", ".attention.output.LayerNorm."),
        (".fc1.", ".intermediate.dense."),
        (".fc2.", ".output.dense."),
        (".final_layer_norm.", ".output.LayerNorm."),
    )
    """What stands in our names, and what in a checkpoint's in its place, one after the other."""

    tied = {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }
    """Second names that a checkpoint has for what is there once."""

    ignored: tuple[str, ...] = ("roberta.pooler.", "roberta.embeddings.position_ids")
    """What checkpoints carry beside the model, and Transformers ignores as well."""

    def __init__(self, config: Config, quant_config: Quant = None, prefix: str = ""):
        super().__init__()
        self.config = config
        self.model = Encoder(config, self.first_position(config), quant_config, add_prefix("model", prefix))
        self.head = MaskedLMHead(config)
        self.lm_head = self.model.embeddings.word_embeddings
        self.logits_processor = LogitsProcessor(config)
        self._has_weights = False

    @staticmethod
    def first_position(config: Config) -> int:
        """Positions come behind the one that padding has."""
        padding: Any = config.pad_token_id
        return padding + 1

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """What a checkpoint calls a module or a parameter of ours."""
        name = f"{name}."
        for ours, theirs in cls.names:
            name = name.replace(ours, theirs)
        return name.removesuffix(".")

    def head_hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[rows, H] of the body -> [rows, H], whose product with ``lm_head`` and ``head_bias`` are the logits."""
        return self.head(hidden_states)

    @property
    def head_bias(self) -> torch.Tensor:
        """[V]."""
        return self.head.bias

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embeddings.word_embeddings

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """(input, output) width of a module before tensor-parallel sharding, by
        which the LoRA memory pool sizes A and B. The layers are all alike."""
        hidden = self.config.hidden_size
        dims = {"qkv_proj": (hidden, 3 * hidden)}
        if module_name not in dims:
            raise NotImplementedError(
                f"{type(self).__name__} has no LoRA target {module_name!r}; one of {sorted(dims)}"
            )
        return dims[module_name]

    def forward(self, *arguments: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} is trained offline, by sglang-mezo train, and not served")

    def post_load_weights(self) -> None:
        """Called by loaders that fill the parameters without ``load_weights``."""
        self._has_weights = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Copy a Hugging Face checkpoint.

        The first call has to bring every parameter. Later ones may bring a few.

        Returns: names of the checkpoint's tensors that went into a parameter.
        Raises: ValueError for a name that the model does not have, or lacks.
        """
        params = self._params_by_checkpoint_name()
        loaded: set[str] = set()
        for name, tensor in weights:
            # As the first BERT was exported.
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            name = self.tied.get(name, name)
            if name.startswith(self.ignored):
                continue
            if name not in params:
                raise ValueError(f"{type(self).__name__} has no parameter for the weight {name!r}")
            param, shard = params[name]
            loader = getattr(param, "weight_loader", default_weight_loader)
            loader(param, tensor, *shard)
            loaded.add(name)
        if not self._has_weights and (missing := params.keys() - loaded):
            raise ValueError(f"the checkpoint lacks weights of {type(self).__name__}: {sorted(missing)}")
        self._has_weights = True
        return loaded

    def _params_by_checkpoint_name(self) -> dict[str, tuple[nn.Parameter, tuple]]:
        """Checkpoint name -> (parameter, arguments that name the shard in it)."""
        slots: dict[str, tuple[nn.Parameter, tuple]] = {}
        for name, param in self.named_parameters():
            # A LoRA wrapper keeps the layer that it wraps one level down.
            name = name.replace(".base_layer.", ".")
            if ".qkv_proj." not in name:
                slots[self.checkpoint_name(name)] = (param, ())
                continue
            for shard in "qkv":
                slots[self.checkpoint_name(name.replace("qkv_proj", f"{shard}_proj"))] = (param, (shard,))
        return slots


class XLMRobertaForMaskedLM(RobertaForMaskedLM):
    """RoBERTa's network; its tied weight is called by its other name."""

    names = (
        RobertaForMaskedLM.names[0],
        ("model.embeddings.word_embeddings.", "lm_head.decoder."),
        *RobertaForMaskedLM.names[1:],
    )
    tied = {
        "roberta.embeddings.word_embeddings.weight": "lm_head.decoder.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    }


class BertForMaskedLM(RobertaForMaskedLM):
    names = (
        ("head.dense.", "cls.predictions.transform.dense."),
        ("head.layer_norm.", "cls.predictions.transform.LayerNorm."),
        ("head.", "cls.predictions."),
        *((ours, theirs.replace("roberta.", "bert.")) for ours, theirs in RobertaForMaskedLM.names[1:]),
    )
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    ignored = ("bert.pooler.", "bert.embeddings.position_ids", "cls.seq_relationship.")

    @staticmethod
    def first_position(config: Config) -> int:
        return 0


EntryClass = [RobertaForMaskedLM, XLMRobertaForMaskedLM, BertForMaskedLM]
