"""The adapter being trained: one flat float32 vector with named LoRA matrices in it, and its PEFT files."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors.torch
import torch

from sglang.srt.mezo.adapters.architectures import pipeline_tag
from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DamagedError
from sglang.srt.mezo.core.integrity import require_sums, write_sums
from sglang.srt.mezo.core.noise import initial_uniform
from sglang.srt.mezo.core.optimizer import is_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INITIAL = "initial_adapter"
"""Folder in that of a run: what the first record of its seed log moves."""
FILES = (CONFIG, WEIGHTS)
"""Of a PEFT folder, those that make an adapter what it is."""


class Site(NamedTuple):
    """A linear layer of the base model that the adapter acts on, by its Hugging Face module path."""

    path: str
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """As ``target_modules`` has it."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True)
class AdapterSpec:
    """What PEFT's adapter_config.json says of an adapter.

    Attributes:
        base_model: name or path of the base model.
        invocation: PEFT's ``alora_invocation_tokens``; empty for ordinary LoRA.
        task_type: "CAUSAL_LM", or None of a masked language model.
    """

    base_model: str
    r: int
    lora_alpha: float
    target_modules: tuple[str, ...]
    invocation: tuple[int, ...] = ()
    task_type: str | None = "CAUSAL_LM"
    virtual_tokens = 0

    @classmethod
    def of(
        cls,
        config: MezoConfig,
        base_model: str,
        invocation: Sequence[int] = (),
        target_modules: Sequence[str] | None = None,
        task_type: str | None = "CAUSAL_LM",
    ) -> Self:
        """The adapter that a run of ``config`` trains.

        Args:
            target_modules: those of a configuration that leaves them open.

        Raises:
            ConfigError: nobody says what to adapt, or the configuration says otherwise.
        """
        targets = target_modules or config.target_modules
        if not targets:
            raise ConfigError("target_modules", targets, "at least one module")
        spec = cls(base_model, config.r, config.lora_alpha, tuple(targets), tuple(invocation), task_type)
        spec.require_agreement(config)
        return spec

    def require_agreement(self, config: MezoConfig) -> None:
        """Raise ConfigError for a field of the configuration that says otherwise."""
        if config.tuning is None:
            raise ConfigError(
                "tuning", None, "what the adapter of init_from is: sglang.srt.mezo.training.start.settled says it"
            )
        if config.tuning == "alora" and not self.invocation:
            raise ConfigError(
                "invocation", config.invocation, "activated LoRA needs the text from which it acts, such as ' It was'"
            )
        if config.tuning == "lora" and self.invocation:
            raise ConfigError(
                "invocation", config.invocation, "ordinary LoRA acts on every token and takes no invocation"
            )
        for name, own in (("r", self.r), ("lora_alpha", self.lora_alpha)):
            if getattr(config, name) != own:
                raise ConfigError(name, getattr(config, name), f"{own}, as the adapter has it")
        if config.target_modules is not None and set(config.target_modules) != set(self.target_modules):
            raise ConfigError(
                "target_modules", config.target_modules, f"{list(self.target_modules)}, as the adapter has it"
            )


class Adapter:
    """Master weights ``theta``: float32 [numel] on the CPU. For every site come A (r x in), then B (out x r)."""

    def __init__(self, spec: AdapterSpec, sites: Sequence[Site]):
        self.spec = spec
        self.sites = tuple(sites)
        self.theta = torch.zeros(sum(spec.r * (site.in_features + site.out_features) for site in sites))

    @classmethod
    def initial(cls, spec: AdapterSpec, sites: Sequence[Site], seed: int) -> Self:
        """PEFT's start: A uniform with bound 1 / sqrt(in) (Kaiming with a = sqrt(5)), B zero."""
        adapter = cls(spec, sites)
        for index, (site, a, _) in enumerate(adapter.matrices()):
            a.copy_(initial_uniform(seed, index, a.numel()).view_as(a)).div_(math.sqrt(site.in_features))
        return adapter

    @classmethod
    def holding(
        cls, spec: AdapterSpec, sites: Sequence[Site], matrices: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
    ) -> Self:
        """The adapter with these matrices, (A [r, in], B [out, r]) by the paths of the sites."""
        adapter = cls(spec, sites)
        for site, a, b in adapter.matrices():
            a.copy_(matrices[site.path][0])
            b.copy_(matrices[site.path][1])
        return adapter

    @property
    def numel(self) -> int:
        return self.theta.numel()

    def matrices(self) -> Iterator[tuple[Site, torch.Tensor, torch.Tensor]]:
        """Views into ``theta``: (site, A [r, in], B [out, r])."""
        offset = 0
        r = self.spec.r
        for site in self.sites:
            a = self.theta[offset : offset + r * site.in_features].view(r, site.in_features)
            offset += a.numel()
            b = self.theta[offset : offset + r * site.out_features].view(site.out_features, r)
            offset += b.numel()
            yield site, a, b

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of the matrices in ``theta``."""
        return tuple((matrix.shape[0], matrix.shape[1]) for _, a, b in self.matrices() for matrix in (a, b))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """PEFT's names to views into ``theta``."""
        state = {}
        for site, a, b in self.matrices():
            state[f"base_model.model.{site.path}.lora_A.weight"] = a
            state[f"base_model.model.{site.path}.lora_B.weight"] = b
        return state

    def save_pretrained(self, directory: Path) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` and SGLang load; it appears whole or not at all.

        Raises:
            OSError: the disk is full or the path cannot be written; an older folder of that name is then untouched.
        """
        with peft_folder(directory, self.state_dict(), self._peft_config(), self._model_card()) as partial:
            _sort_targets(partial / CONFIG)

    def save_initial(self, run: Path) -> None:
        self.save_pretrained(run / INITIAL)

    def resume_initial(self, run: Path) -> None:
        self.load_weights(run / INITIAL)

    load_initial = resume_initial

    def load_weights(self, directory: Path) -> None:
        """Fill ``theta`` from a folder that ``save_pretrained`` wrote for the same sites and rank.

        Raises:
            DamagedError: the folder or a file in it is gone, or not as it was written.
            ConfigError: it is of other sites, or another rank.
        """
        fill(self.state_dict(), directory, f"matrices of rank {self.spec.r} on {self.spec.target_modules}")

    def _peft_config(self):
        import peft

        alpha = self.spec.lora_alpha
        return peft.LoraConfig(
            task_type=self.spec.task_type,
            base_model_name_or_path=self.spec.base_model,
            inference_mode=True,
            r=self.spec.r,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=0.0,
            target_modules=list(self.spec.target_modules),
            alora_invocation_tokens=list(self.spec.invocation) or None,
        )

    def _model_card(self) -> str:
        kind = "aLoRA" if self.spec.invocation else "LoRA"
        return (
            f"---\nbase_model: {self.spec.base_model}\nlibrary_name: peft\n"
            f"pipeline_tag: {pipeline_tag(self.spec.task_type)}\ntags:\n- {kind.lower()}\n- mezo\n---\n\n"
            f"{kind} adapter of rank {self.spec.r} on {', '.join(self.spec.target_modules)}, "
            "fitted with forward passes only (MeZO, arXiv 2305.17333) by sglang-mezo.\n"
        )


def _sort_targets(path: Path) -> None:
    """PEFT writes a set in the order of its hashes, which differs between processes."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


@contextmanager
def peft_folder(directory: Path, state: Mapping[str, torch.Tensor], config: Any, model_card: str) -> Iterator[Path]:
    """A folder in PEFT's form that appears, whole, when the block has ended; in it the files may still be changed."""
    with atomic_directory(directory) as partial:
        # A copy, as safetensors refuses tensors that share storage.
        copied = {name: tensor.detach().clone() for name, tensor in state.items()}
        # Not save_file: it reports a full disk with an exception of its own.
        (partial / WEIGHTS).write_bytes(safetensors.torch.save(copied, metadata={"format": "pt"}))
        config.save_pretrained(str(partial))
        (partial / "README.md").write_text(model_card, encoding="utf-8")
        yield partial
        write_sums(partial, FILES)


def fill(state: Mapping[str, torch.Tensor], directory: Path, expected: str) -> None:
    """Copy the tensors of a folder that ``peft_folder`` wrote into those of ``state``.

    Args:
        expected: what the folder is to hold, in words.

    Raises:
        DamagedError: the folder or a file in it is gone, or not as it was written.
        ConfigError: it holds other tensors.
    """
    path = Path(directory) / WEIGHTS
    require_sums(Path(directory), FILES)
    try:
        stored = safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise DamagedError(path, f"it cannot be read ({error.strerror})") from error
    except safetensors.SafetensorError as error:
        raise DamagedError(path, str(error)) from error
    if stored.keys() != state.keys() or any(stored[name].shape != state[name].shape for name in state):
        raise ConfigError("adapter", str(directory), expected)
    for name, tensor in stored.items():
        if not is_finite(tensor):
            raise ConfigError("adapter", str(directory), f"finite numbers, and {name} has others")
    for name, tensor in state.items():
        tensor.copy_(stored[name])
