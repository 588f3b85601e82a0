"""PEFT folders from outside: read, checked against the model before anything is taken, brought to one rank and one
scale.

A folder that a user names can hold anything. Whatever it holds is an adapter that is applied as PEFT applies it, or a
ConfigError.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from sglang.srt.mezo.adapters.adapter import CONFIG, AdapterSpec, Site
from sglang.srt.mezo.adapters.peft_config import PeftConfig, read_config
from sglang.srt.mezo.adapters.peft_files import (
    ADDED_TOKENS,
    DTYPES,
    directory_of,
    name_of,
    read_json,
    read_weights,
    refuse_added_tokens,
    require_finite,
    require_own_sums,
    shape_of,
)
from sglang.srt.mezo.core.errors import ConfigError

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class ModelLayers:
    """What adapters can act on.

    Attributes:
        sites: every linear layer of the model's blocks, by its path in Transformers.
        adapted: paths of those that the engine has room for.
        max_rank: that it has room for; None for any.
        dtype: that it keeps matrices in.
        vocab_size: of the model.
    """

    sites: Mapping[str, Site]
    adapted: Collection[str]
    max_rank: int | None
    dtype: torch.dtype
    vocab_size: int


@dataclass(frozen=True)
class PeftAdapter:
    """One rank and one scale, ``lora_alpha / r``, for all matrices: (A [r, in], B [out, r]) by path. No path, no
    change of that layer."""

    r: int
    lora_alpha: float
    matrices: dict[str, tuple[torch.Tensor, torch.Tensor]]
    invocation: tuple[int, ...]

    @property
    def target_modules(self) -> list[str]:
        return sorted({path.rpartition(".")[2] for path in self.matrices})

    def spec(self, base_model: str) -> AdapterSpec:
        """As an adapter of that model; PEFT does not say it of what it has applied."""
        return AdapterSpec(base_model, self.r, self.lora_alpha, tuple(self.target_modules), self.invocation)


def read_adapter(folder: str, layers: ModelLayers) -> PeftAdapter:
    """The adapter in a folder, or in a repository of the hub.

    Raises:
        ConfigError: naming the file or field at fault. Nothing larger than an adapter can be is read.
    """
    directory = directory_of(folder)
    config = read_config(read_json(directory / CONFIG))
    refuse_added_tokens(directory / ADDED_TOKENS, layers.vocab_size)
    ranks = _ranks(config, layers)
    room = sum(
        rank * (layers.sites[path].in_features + layers.sites[path].out_features) for path, (rank, _) in ranks.items()
    )
    tensors = read_weights(directory, room)
    require_own_sums(directory)
    return _fit(config, ranks, tensors, layers)


def fit_adapter(fields: object, tensors: Mapping[str, torch.Tensor], layers: ModelLayers) -> PeftAdapter:
    """The same of an adapter that comes as the fields of its configuration and its tensors."""
    if not isinstance(tensors, Mapping):
        raise ConfigError("tensors", type(tensors).__name__, "a dictionary of tensors")
    config = read_config(fields)
    return _fit(config, _ranks(config, layers), tensors, layers)


# --- against the model ------------------------------------------------------------------------------------------------


def _ranks(config: PeftConfig, layers: ModelLayers) -> dict[str, tuple[int, float]]:
    """Rank and scale of every layer that the adapter acts on."""
    paths = config.targets(list(layers.sites))
    if not paths:
        names = sorted({path.rpartition(".")[2] for path in layers.sites})
        raise ConfigError(
            "target_modules",
            config.target_modules,
            f"some of the model's linear layers, {', '.join(names)}, that nothing excludes",
        )
    ranks = dict(zip(paths, config.ranks_and_scales(paths), strict=True))
    most = max(rank for rank, _ in ranks.values())
    if layers.max_rank is not None and most > layers.max_rank:
        field, value = ("r", most) if most == config.r else ("rank_pattern", config.rank_pattern)
        raise ConfigError(field, value, f"at most {layers.max_rank}, the server's --max-lora-rank")
    last = max(config.invocation, default=0)
    if last >= layers.vocab_size:
        raise ConfigError(
            "alora_invocation_tokens", last, f"below {layers.vocab_size}, the size of the model's vocabulary"
        )
    return ranks


def _fit(
    config: PeftConfig, ranks: Mapping[str, tuple[int, float]], tensors: Mapping[str, torch.Tensor], layers: ModelLayers
) -> PeftAdapter:
    """Matrices of the adapter's own ranks and scales become ones of the largest rank and one scale, which they are
    multiplied with."""
    matrices = _of_targets(config, ranks, tensors, layers)
    for path, sides in matrices.items():
        _check(path, sides, ranks[path][0], config, layers)
    r = max(ranks[path][0] for path in matrices)
    scales = {ranks[path][1] for path in matrices}
    common = scales.pop() if len(scales) == 1 else 1.0
    lora_alpha = config.lora_alpha if common == config.lora_alpha / r else r * common
    if not torch.tensor(common, dtype=torch.float64).to(layers.dtype).isfinite():
        raise ConfigError("lora_alpha", config.lora_alpha, f"one that gives a finite scale in {name_of(layers.dtype)}")
    fitted = {
        path: _brought(sides["A"], sides["B"], r, ranks[path][1] / common if common else 1.0)
        for path, sides in matrices.items()
    }
    for path, pair in fitted.items():
        for side, matrix in zip("AB", pair):
            require_finite(f"{path}.lora_{side}.weight", matrix, layers.dtype)
    return PeftAdapter(r, lora_alpha, fitted, config.invocation)


def _of_targets(
    config: PeftConfig, ranks: Mapping[str, tuple[int, float]], tensors: Mapping[str, torch.Tensor], layers: ModelLayers
) -> dict[str, dict[str, torch.Tensor]]:
    """The matrices of every layer that the configuration names, by path and side; there are no others."""
    found = _by_path(tensors)
    matrices = {path: found.pop(path) for path in ranks if path in found}
    if found:
        path, sides = min(found.items(), key=lambda item: item[0])
        left_out = "none, as target_modules, exclude_modules or layers_to_transform leave its module out"
        allowed = left_out if path in layers.sites else "matrices of linear layers of the model"
        raise ConfigError(f"{path}.lora_{min(sides)}.weight", shape_of(sides[min(sides)]), allowed)
    outside = [path for path in matrices if path not in layers.adapted]
    if outside:
        names = sorted({path.rpartition(".")[2] for path in layers.adapted})
        raise ConfigError(
            "target_modules",
            outside[0],
            f"modules that the server adapts, {', '.join(names)}: name others in --lora-target-modules",
        )
    absent = [path for path in ranks if path not in matrices]
    if absent and not (config.is_all_linear and matrices):
        raise ConfigError(
            "target_modules",
            config.target_modules,
            f"modules that the file has matrices of, and it has none of {absent[0]}",
        )
    return matrices


def _by_path(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Path -> side -> matrix."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name) if isinstance(name, str) and isinstance(tensor, torch.Tensor) else None
        if match is None:
            raise ConfigError(
                str(name)[:200],
                shape_of(tensor),
                "only lora_A.weight and lora_B.weight of linear layers, as PEFT names them",
            )
        sides = found.setdefault(match["path"], {})
        if match["side"] in sides:
            raise ConfigError(name[:200], shape_of(tensor), "given once")
        sides[match["side"]] = tensor
    return found


def _check(path: str, sides: Mapping[str, torch.Tensor], rank: int, config: PeftConfig, layers: ModelLayers) -> None:
    site = layers.sites[path]
    for side, expected in (("A", [rank, site.in_features]), ("B", [site.out_features, rank])):
        name = f"{path}.lora_{side}.weight"
        if side not in sides:
            raise ConfigError(name, None, f"a matrix {expected} beside the other of its module")
        matrix = sides[side]
        if matrix.layout != torch.strided or matrix.dtype not in DTYPES:
            raise ConfigError(name, str(matrix.dtype), "numbers of type " + ", ".join(map(name_of, DTYPES)))
        if list(matrix.shape) != expected:
            says = f"{expected} by the model and r={rank} of {CONFIG}"
            raise ConfigError(
                name,
                shape_of(matrix),
                says if not config.rank_pattern else f"{expected} by the model and rank_pattern of {CONFIG}",
            )


def _brought(a: torch.Tensor, b: torch.Tensor, r: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The pair at rank ``r`` on the CPU, zeros last; B multiplied with ``scale``, in float32."""
    a, b = (matrix.detach().cpu() for matrix in (a, b))
    more = r - a.shape[0]
    if scale != 1.0:
        b = b.float() * scale
    return torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous(), torch.nn.functional.pad(b, (0, more)).contiguous()
