"""A prefix: keys and values of some virtual tokens in every layer, which all tokens attend to, and its PEFT files."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import torch

from sglang.srt.mezo.adapters.adapter import CONFIG, INITIAL, fill, peft_folder
from sglang.srt.mezo.adapters.architectures import architecture_of, is_masked, pipeline_tag, task_type
from sglang.srt.mezo.core.config import MezoConfig, PrefixPositions
from sglang.srt.mezo.core.errors import ConfigError, DamagedError
from sglang.srt.mezo.core.integrity import write_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDINGS = "prompt_embeddings"
POSITIONS = "prefix_positions"  # field of ours in adapter_config.json, where they are not PEFT's


class KVShape(NamedTuple):
    """Of the keys, and of the values, that a model computes for a token."""

    layers: int
    heads: int
    head_dim: int

    @classmethod
    def of(cls, model_config: "PretrainedConfig") -> Self:
        config = model_config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, heads, head_dim)


@dataclass(frozen=True)
class PrefixSpec:
    """What describes a prefix.

    Attributes:
        base_model: name or path of the base model.
        num_virtual_tokens: as PEFT has it.
        kv: of the base model.
        positions: of the text behind it: those behind the virtual tokens, as in PEFT, or as if there were none.
        task_type: PEFT's; None of a masked language model.
    """

    base_model: str
    num_virtual_tokens: int
    kv: KVShape
    positions: PrefixPositions = "shifted"
    task_type: str | None = "CAUSAL_LM"
    invocation = ()

    @classmethod
    def of(cls, config: MezoConfig, base_model: str, model_config: "PretrainedConfig") -> Self:
        """The prefix that a run of ``config`` trains; raises ConfigError for positions that its model cannot have."""
        positions = positions_of(config, model_config)
        return cls(base_model, config.num_virtual_tokens, KVShape.of(model_config), positions, task_type(model_config))

    @property
    def virtual_tokens(self) -> int:
        """How much shorter than the context a text may be."""
        return self.num_virtual_tokens

    def require_agreement(self, config: MezoConfig) -> None:
        """Raise ConfigError for a field of the configuration that says otherwise."""
        own = {"tuning": "prefix", "num_virtual_tokens": self.num_virtual_tokens, "prefix_positions": self.positions}
        for name, value in own.items():
            if getattr(config, name) not in (None, value):
                raise ConfigError(name, getattr(config, name), f"{value!r}, as the prefix has it")


def positions_of(config: MezoConfig, model_config: "PretrainedConfig") -> PrefixPositions:
    """Of the text, as a run says or leaves open.

    Raises:
        ConfigError: a masked language model's are to be PEFT's, which has no prefixes for such models.
    """
    if not is_masked(model_config):
        return config.prefix_positions or "shifted"
    if config.prefix_positions == "shifted":
        raise ConfigError(
            "prefix_positions",
            "shifted",
            f"unshifted for {architecture_of(model_config)}, for which PEFT has no prefixes that it could agree with",
        )
    return "unshifted"


class PrefixAdapter:
    """Master copy ``theta``: float32 [numel] on the CPU, in the order of PEFT's prompt embeddings: for each virtual
    token, for each layer, its keys of all heads, then its values."""

    invocation = ()  # it acts on every token

    def __init__(self, spec: PrefixSpec, theta: torch.Tensor | None = None):
        self.spec = spec
        self.theta = torch.zeros(spec.num_virtual_tokens * 2 * spec.kv.layers * spec.kv.heads * spec.kv.head_dim)
        if theta is not None:
            self.theta.copy_(theta)

    @classmethod
    def from_pretrained(cls, directory: Path) -> Self:
        """The prefix in a folder that ``save_pretrained`` wrote; raises what ``load_weights`` does."""
        path = Path(directory) / CONFIG
        try:
            fields = json.loads(path.read_bytes())
            heads = fields["num_attention_heads"]
            kv = KVShape(fields["num_layers"], heads, fields["token_dim"] // heads)
            positions, task = fields.get(POSITIONS, "shifted"), fields["task_type"]
            spec = PrefixSpec(fields["base_model_name_or_path"], fields["num_virtual_tokens"], kv, positions, task)
            adapter = cls(spec)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedError(path, str(error) or type(error).__name__) from error
        adapter.load_weights(directory)
        return adapter

    @property
    def numel(self) -> int:
        return self.theta.numel()

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """One matrix, with a row for each virtual token."""
        tokens = self.spec.num_virtual_tokens
        return ((tokens, self.numel // tokens),)

    @property
    def by_layer(self) -> tuple[int, int, int, int, int]:
        """Shape of ``theta``: [tokens, layers, keys or values, heads, head_dim]."""
        kv = self.spec.kv
        return (self.spec.num_virtual_tokens, kv.layers, 2, kv.heads, kv.head_dim)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """PEFT's name to a view of ``theta``."""
        return {EMBEDDINGS: self.theta.view(self.shapes[0])}

    def save_pretrained(self, directory: Path) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads; it appears whole or not at all.

        Raises:
            OSError: the disk is full or the path cannot be written; an older folder of that name is then untouched.
        """
        with peft_folder(directory, self.state_dict(), self._peft_config(), self._model_card()) as partial:
            if self.spec.positions != "shifted":
                path = partial / CONFIG
                write_json(path, json.loads(path.read_text()) | {POSITIONS: self.spec.positions})

    def load_weights(self, directory: Path) -> None:
        """Fill ``theta`` from a folder that ``save_pretrained`` wrote for a prefix of the same shape.

        Raises:
            DamagedError: the folder or a file in it is gone, or not as it was written.
            ConfigError: it is of another shape.
        """
        fill(self.state_dict(), directory, f"a prefix of shape {list(self.shapes[0])}")

    def save_initial(self, run: Path) -> None:
        self.save_pretrained(run / INITIAL)

    def resume_initial(self, run: Path) -> None:
        self.load_weights(run / INITIAL)

    load_initial = resume_initial

    def _peft_config(self):
        import peft

        kv = self.spec.kv
        return peft.PrefixTuningConfig(
            task_type=self.spec.task_type,
            base_model_name_or_path=self.spec.base_model,
            inference_mode=True,
            num_virtual_tokens=self.spec.num_virtual_tokens,
            num_layers=kv.layers,
            token_dim=kv.heads * kv.head_dim,
            num_attention_heads=kv.heads,  # of keys and values: PEFT cuts the token's numbers by it
            num_transformer_submodules=1,
            encoder_hidden_size=kv.heads * kv.head_dim,
        )

    def _model_card(self) -> str:
        if self.spec.task_type is None:
            note = "Its text has the positions that it has without the prefix; PEFT has no prefixes for such models.\n"
        elif self.spec.positions != "shifted":
            note = "Its text has the positions that it has without the prefix, which PEFT does not give it.\n"
        else:
            note = ""
        return (
            f"---\nbase_model: {self.spec.base_model}\nlibrary_name: peft\n"
            f"pipeline_tag: {pipeline_tag(self.spec.task_type)}\ntags:\n- prefix-tuning\n- mezo\n---\n\n"
            f"Prefix of {self.spec.num_virtual_tokens} virtual tokens, fitted with forward passes only (MeZO, arXiv "
            f"2305.17333) by sglang-mezo.\n{note}"
        )
