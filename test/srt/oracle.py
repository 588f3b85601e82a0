"""The reference that trainer and scorer are held against: Transformers + PEFT, one unpadded sequence at a time."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from sglang.srt.mezo.adapters.adapter import Adapter
from sglang.srt.mezo.data.examples import Example

VOCAB = 211
INVOCATION = (7, 8)
START, MASK, END = 3, 4, 5  # of the texts of encoders

OPT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_OPT = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=96,
    max_position_embeddings=128,
    word_embed_proj_dim=64,
    dropout=0.0,
    init_std=0.15,
)
_ENCODER = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    max_position_embeddings=130,
    type_vocab_size=2,
    pad_token_id=1,
    initializer_range=0.15,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
CONFIGS = {
    "opt-125m": OPTConfig(**_OPT),
    "opt-350m": OPTConfig(**{**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "galactica": OPTConfig(**_OPT, enable_bias=False, activation_function="gelu", _remove_final_layer_norm=False),
    "llama": LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        initializer_range=0.15,
    ),
    "roberta": RobertaConfig(**_ENCODER),
    "xlm-roberta": XLMRobertaConfig(**_ENCODER),
    "bert": BertConfig(**_ENCODER),
}
ENCODERS = ("roberta", "xlm-roberta", "bert")
"""Masked language models."""
TARGETS = {
    kind: LLAMA_TARGETS if kind == "llama" else ("query", "key", "value") if kind in ENCODERS else OPT_TARGETS
    for kind in CONFIGS
}


def save_model(kind: str, folder: Path, **changes: Any) -> str:
    """A random model of that kind, with biases and norms that are not at their trivial start.

    ``changes`` are those of its configuration. The biases before OPT's ReLU keep its units well on or well off: the
    loss is then smooth around the adapter, so that a finite difference can be held against the gradient to a per cent.
    """
    torch.manual_seed(1)
    config = deepcopy(CONFIGS[kind])
    config.update(changes)
    model = (AutoModelForMaskedLM if kind in ENCODERS else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if name.endswith("fc1.bias"):
                parameter.add_(torch.randn_like(parameter).sign() * 8)
    model.save_pretrained(folder)
    return str(folder)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts that end in the invocation; every third holds it twice."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = int(torch.randint(4, 18, (), generator=generator))
        words = torch.randint(10, VOCAB, (length,), generator=generator).tolist()
        if i % 3 == 2:
            words[1:1] = INVOCATION
        made.append((2, *words, *INVOCATION))
    return made


def examples(count: int, options: Sequence[Sequence[int]] | None = None, seed: int = 0) -> list[Example]:
    """Examples with the given options, or with two to four options of one to four tokens each."""
    made = []
    for i, prompt in enumerate(prompts(count, seed)):
        generator = torch.Generator().manual_seed(100 * seed + i)
        if options is None:
            lengths = torch.randint(1, 5, (2 + i % 3,), generator=generator).tolist()
            own = tuple(tuple(torch.randint(10, VOCAB, (n,), generator=generator).tolist()) for n in lengths)
        else:
            own = tuple(map(tuple, options))
        made.append(Example(prompt, own, i % len(own)))
    return made


def with_shared_beginnings(made: Sequence[Example], seed: int = 9) -> list[Example]:
    """The same examples after a template that all begin with, and one of two passages."""
    generator = torch.Generator().manual_seed(seed)
    template, *passages = (tuple(torch.randint(10, VOCAB, (n,), generator=generator).tolist()) for n in (30, 35, 40))
    return [replace(e, prompt=(2, *template, *passages[i % 2], *e.prompt[1:])) for i, e in enumerate(made)]


def masked(made: Sequence[Example], seed: int = 8) -> list[Example]:
    """The same examples for an encoder: a mask behind the prompt, the first tokens of the options for words, and other
    text to the end."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for i, e in enumerate(made):
        rest = torch.randint(10, VOCAB, (1 + 3 * (i % 4),), generator=generator).tolist()
        prompt = (START, *e.prompt[1:], MASK, *rest, END)
        examples.append(Example(prompt, tuple(option[:1] for option in e.options), e.label, len(e.prompt)))
    return examples


def load(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model in a folder."""
    encoder = AutoConfig.from_pretrained(path).architectures[0].endswith("ForMaskedLM")
    kind = AutoModelForMaskedLM if encoder else AutoModelForCausalLM
    # PyTorch's fused attention, which is Transformers' own choice, leaves soft caps out.
    return kind.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


class Scores:
    """Losses of a Transformers model."""

    model: Any
    device: torch.device | str = "cpu"

    def token_log_probs(self, example: Example, option: Sequence[int]) -> torch.Tensor:
        """Log-probability of each token of an option after the prompt, or in the place of its mask: [tokens]."""
        if example.mask is None:
            ids = torch.tensor([[*example.prompt, *option]], device=self.device)
            logits = self.model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
        else:
            ids = torch.tensor([example.prompt], device=self.device)
            logits = self.model(input_ids=ids).logits[0, example.mask][None]
        return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(option, device=self.device)[:, None])[:, 0]

    def option_losses(self, batch: Sequence[Example]) -> torch.Tensor:
        """Cross-entropy over options of every example: [examples]."""
        losses = []
        for example in batch:
            scores = torch.stack([self.token_log_probs(example, option).mean() for option in example.options])
            losses.append(-torch.log_softmax(scores, 0)[example.label])
        return torch.stack(losses)

    def token_loss(self, batch: Sequence[Example]) -> torch.Tensor:
        """Mean negative log-probability of all tokens of the right options."""
        return -torch.cat([self.token_log_probs(example, example.options[example.label]) for example in batch]).mean()


class Reference(Scores):
    """A PEFT model on the files that the adapter wrote."""

    def __init__(
        self,
        model_path: str,
        adapter: Adapter,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        adapter.save_pretrained(folder)
        model = PeftModel.from_pretrained(load(model_path, dtype), folder, is_trainable=True)
        self.model, self.device = model.to(device, dtype).eval(), device
        self._adapter = adapter

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        """Gradient of ``loss`` in the adapter's flat order: float64 [numel]."""
        self.model.zero_grad()
        loss.backward()
        grads = {
            name.replace(".default", ""): p.grad for name, p in self.model.named_parameters() if p.grad is not None
        }
        return torch.cat([grads[name].flatten().double().cpu() for name in self._adapter.state_dict()])


class ModelReference(Scores):
    """A Transformers model whose own parameters are set, those in whose names a pattern is found."""

    def __init__(self, model_path: str, dtype: torch.dtype = torch.float32, pattern: str = ""):
        self.model = load(model_path, dtype)
        self._trained = [p for name, p in self.model.named_parameters() if re.search(pattern, name)]

    @property
    def theta(self) -> torch.Tensor:
        """[numel], in the order of the model."""
        return torch.cat([p.detach().flatten() for p in self._trained])

    @torch.no_grad()
    def set(self, theta: torch.Tensor) -> None:
        for p, part in zip(self._trained, theta.split([p.numel() for p in self._trained])):
            p.copy_(part.view_as(p))
