"""Parameters of a model that are trained themselves: one flat float32 vector, and the folder of a model that they make.

Names and shapes are those of Transformers, whatever an engine makes of them.
"""

import json
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from sglang.srt.mezo.adapters.architectures import auto_class, pipeline_tag, task_type
from sglang.srt.mezo.core.atomic import atomic_directory
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DamagedError
from sglang.srt.mezo.core.integrity import require_sums, write_json, write_sums
from sglang.srt.mezo.core.noise import Shape

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = "5GB"  # as Transformers cuts large models
_NOT_COPIED = re.compile(r".*\.(safetensors|bin|pth?|h5|msgpack|ckpt|gguf|onnx|tflite|index\.json|md)|\..*|SHA256SUMS")

_CHAT_TEMPLATES = "additional_chat_templates"  # the folder in which Transformers keeps those that have names


class Parameter(NamedTuple):
    """A parameter as Transformers has it."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def flat_shape(self) -> Shape:
        """Of the matrix or vector that it counts as."""
        return self.shape if len(self.shape) < 2 else (self.shape[0], self.numel // self.shape[0])


@dataclass(frozen=True)
class WeightsSpec:
    """Which parameters of a model are trained.

    Attributes:
        base_model: name or path of the model.
        parameters: regular expression that is found in their names; None for all.
    """

    base_model: str
    parameters: str | None = None
    invocation = ()
    virtual_tokens = 0

    def require_agreement(self, config: MezoConfig) -> None:
        """Raise ConfigError for a field of the configuration that says otherwise."""
        if config.tuning != "full":
            raise ConfigError("tuning", config.tuning, "full, where a model's parameters are trained")
        if config.parameters != self.parameters:
            raise ConfigError("parameters", config.parameters, f"{self.parameters!r}, as is trained")

    def chosen(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Those of a model's that are trained, in its order.

        Raises:
            ConfigError: there are none.
        """
        chosen = [one for one in parameters if re.search(self.parameters or "", one.name)]
        if not chosen:
            raise ConfigError(
                "parameters", self.parameters, f"found in a name of the model's, such as {parameters[0].name}"
            )
        return chosen


class FullWeights:
    """Master weights ``theta``: float32 [numel], the trained parameters one after the other.

    Args:
        folder: of the base model.
        trained: parameters in ``theta``.
        theta: their numbers.
        frozen: the model's other parameters by their names.
        dtype: that the model is run and saved in; ``theta`` as it was loaded fits into it.
    """

    def __init__(
        self,
        spec: WeightsSpec,
        folder: Path,
        trained: Sequence[Parameter],
        theta: torch.Tensor,
        frozen: Mapping[str, torch.Tensor],
        dtype: torch.dtype,
    ):
        self.spec = spec
        self.theta = theta
        self._folder = folder
        self._trained = tuple(trained)
        self._frozen = frozen
        self._dtype = dtype

    @property
    def numel(self) -> int:
        return self.theta.numel()

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(parameter.flat_shape for parameter in self._trained)

    def parameters(self) -> Iterator[tuple[Parameter, torch.Tensor]]:
        """Views into ``theta``."""
        yield from zip(self._trained, views(self.theta, self._trained))

    def state_dict(self) -> dict[str, torch.Tensor]:
        """All of the model's parameters by Transformers' names, the trained ones as views into ``theta``."""
        return {parameter.name: view for parameter, view in self.parameters()} | dict(self._frozen)

    def save_pretrained(self, directory: Path) -> None:
        """Write a model that Transformers and SGLang load, in the engine's dtype; it appears whole or not at all.

        Raises:
            OSError: the disk is full or the path cannot be written; an older folder of that name is then untouched.
        """
        with atomic_directory(directory) as partial:
            for path in self._folder.iterdir():
                if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
                    shutil.copyfile(path, partial / path.name)
                elif path.is_dir() and path.name == _CHAT_TEMPLATES:
                    shutil.copytree(path, partial / path.name)
            _write_config(self._folder / CONFIG, partial / CONFIG, self._dtype)
            names = self._write_weights(partial)
            (partial / "README.md").write_text(self._model_card(), encoding="utf-8")
            write_sums(partial, [CONFIG, *names])

    def _write_weights(self, directory: Path) -> list[str]:
        """In as many files as there need be, one in memory at a time; their names."""
        from huggingface_hub import split_state_dict_into_shards_factory

        state = self.state_dict()
        split = split_state_dict_into_shards_factory(
            state,
            get_storage_size=lambda tensor: tensor.numel() * self._dtype.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=_SHARD,
        )
        for file, names in split.filename_to_tensors.items():
            # A copy, as safetensors refuses tensors that share storage. Not save_file: it reports a full disk with an
            # exception of its own.
            shard = {name: state[name].detach().to("cpu", self._dtype, copy=True).contiguous() for name in names}
            (directory / file).write_bytes(safetensors.torch.save(shard, metadata={"format": "pt"}))
        if split.is_sharded:
            write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        return list(split.filename_to_tensors)

    def load_weights(self, directory: Path) -> None:
        """Fill ``theta`` from a folder that ``save_pretrained`` wrote.

        Raises:
            DamagedError: the folder or a file in it is gone, or not as it was written.
            ConfigError: it is of other parameters.
        """
        files = sorted(path.name for path in Path(directory).glob("*.safetensors"))
        if not files:
            raise DamagedError(Path(directory) / WEIGHTS, "it is gone")
        require_sums(Path(directory), [CONFIG, *files])
        missing = {parameter.name: (parameter, view) for parameter, view in self.parameters()}
        for file in files:
            path = Path(directory) / file
            try:
                with safetensors.safe_open(path, framework="pt") as stored:
                    for name in missing.keys() & set(stored.keys()):
                        parameter, view = missing.pop(name)
                        view.copy_(_of_shape(stored.get_tensor(name), parameter, directory))
            except (OSError, safetensors.SafetensorError) as error:
                raise DamagedError(path, str(error)) from error
        if missing:
            raise ConfigError("model", str(directory), f"a model with {next(iter(missing))}")

    def save_initial(self, run: Path) -> None:
        """Nothing: the base model has it."""

    def resume_initial(self, run: Path) -> None:
        """Nothing: ``theta`` as it was made is the base model."""

    def load_initial(self, run: Path) -> None:
        """Fill ``theta`` with the base model's numbers."""
        state = dict(_load(self._folder, self._dtype).named_parameters())
        for parameter, view in self.parameters():
            view.copy_(state[parameter.name].detach())

    def _model_card(self) -> str:
        from transformers import AutoConfig

        tag = pipeline_tag(task_type(AutoConfig.from_pretrained(self._folder)))
        trained = f"parameters with {self.spec.parameters!r} in their names" if self.spec.parameters else "parameters"
        return (
            f"---\nbase_model: {self.spec.base_model}\nlibrary_name: transformers\npipeline_tag: {tag}\n"
            "tags:\n- mezo\n---\n\n"
            f"A copy of {self.spec.base_model} whose {trained} were fitted with forward passes only (MeZO, arXiv "
            "2305.17333) by sglang-mezo.\n"
        )


def views(theta: torch.Tensor, parameters: Sequence[Parameter]) -> list[torch.Tensor]:
    """Of a flat vector, in the shapes of what it holds."""
    parts = theta.split([parameter.numel for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters)]


def checkpoint_weights(spec: WeightsSpec, precision: str) -> FullWeights:
    """Those that an engine of a precision begins with, without one.

    Args:
        precision: as ``base_model.precision`` names it.

    Raises:
        ConfigError: there is no such model, or it has no such parameters.
    """
    dtype: torch.dtype = getattr(torch, precision)
    try:
        folder = model_folder(spec.base_model)
        model = _load(folder, dtype)
    except (OSError, ValueError) as error:
        raise ConfigError("model", spec.base_model, f"a hub name or the folder of a model ({error})") from error
    state = {name: one.detach() for name, one in model.named_parameters()}
    trained = spec.chosen([Parameter(name, tuple(one.shape)) for name, one in state.items()])
    theta = torch.cat([state.pop(one.name).flatten().float() for one in trained])
    return FullWeights(spec, folder, trained, theta, state, dtype)


def _load(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=dtype)


def model_folder(name: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Where the files of a model lie that has been loaded."""
    if (path := Path(name)).exists():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, cache_dir=download_dir, local_files_only=True))


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    """The configuration with the type of the weights that lie beside it."""
    config = json.loads(source.read_text(encoding="utf-8"))
    for name in {"dtype", "torch_dtype"} & config.keys() or {"dtype"}:
        config[name] = str(dtype).removeprefix("torch.")
    write_json(target, config)


def _of_shape(tensor: torch.Tensor, parameter: Parameter, directory: Path) -> torch.Tensor:
    if tuple(tensor.shape) != parameter.shape:
        raise ConfigError("model", str(directory), f"a model with {parameter.name} of shape {parameter.shape}")
    return tensor
