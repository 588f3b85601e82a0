"""Where an engine has a model's parameters, by the names and in the shapes of Transformers.

SGLang fuses some, cuts them for its ranks, and pads others.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sglang.srt.mezo.adapters.families import model_parameters
from sglang.srt.mezo.adapters.weights import FullWeights, Parameter, WeightsSpec, model_folder, views
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.engine.handle import EngineHandle, checkpoint_config, config_source
from sglang.srt.mezo.engine.layers import STACKED, naming

_TRAINED = "mezo_trained"  # attribute of a model runner
_SUMMED = 1 << 20  # numbers whose checksum is worked out at a time
_COUNTED = 251  # a prime below 2^8, up to which bfloat16 has all numbers
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Piece:
    """What this rank has of a parameter, or of one of several that the checkpoint has fused.

    Attributes:
        name: of the parameter in Transformers.
        view: of the engine's memory.
        dim: along which the parameter is cut.
        first: where along ``dim`` of the whole parameter this begins.
        total: what all ranks have of it along ``dim``.
        is_first_copy: whether no rank before this one has the same.
        refresh: to be called when ``view`` has changed: its layer has made something of it.
    """

    name: str
    view: torch.Tensor
    dim: int
    first: int
    total: int
    is_first_copy: bool = True
    refresh: Callable[[], None] | None = None


Pieces = Mapping[str, Sequence[Piece]]
"""Of every parameter, by its name."""


def trained_weights(handle: EngineHandle, spec: WeightsSpec) -> tuple[FullWeights, list[Piece]]:
    """The parameters that ``spec`` chooses, as the engine has them now, and where it has them, in their order.

    Raises:
        ConfigError: none is chosen; or the engine has a parameter otherwise than the checkpoint: quantised, packed,
            wider, or in a layer that is not known here.
    """
    runner = handle.model_runner
    parameters = model_parameters(checkpoint_config(*config_source(runner.server_args)))
    trained = spec.chosen(parameters)
    pieces = engine_pieces(runner.model, parameters)
    _require_loaded(handle, trained, pieces)
    theta = torch.empty(sum(one.numel for one in trained), device=handle.device)
    for one, view in zip(trained, views(theta, trained)):
        view.copy_(_whole(handle, one, pieces[one.name]))
    try:
        _require_named(handle, trained, pieces)
    finally:
        _restore(trained, pieces, theta)
    frozen = {one.name: _whole(handle, one, pieces[one.name]) for one in parameters if one not in trained}
    model = runner.model_config
    folder = model_folder(model.model_path, model.revision, runner.load_config.download_dir)
    weights = FullWeights(spec, folder, trained, theta, frozen, runner.dtype)
    return weights, [piece for one in trained for piece in pieces[one.name]]


def mark_trained(handle: EngineHandle) -> None:
    """The engine's weights are no longer the checkpoint's."""
    setattr(handle.model_runner, _TRAINED, True)


def untrain(handle: EngineHandle) -> None:
    """Load the checkpoint's weights into an engine whose own a run has trained."""
    if getattr(handle.model_runner, _TRAINED, False):
        _load_checkpoint(handle)
        setattr(handle.model_runner, _TRAINED, False)


def engine_pieces(model: torch.nn.Module, parameters: Sequence[Parameter]) -> Pieces:
    """Where this rank has the model's parameters.

    Raises:
        ConfigError: naming the first that is missing, or is not in the engine as it is in the checkpoint.
    """
    found: dict[str, list[Piece]] = {one.name: [] for one in parameters}
    checkpoint_name = naming(model)
    for piece in _pieces(model, found):
        if (name := checkpoint_name(piece.name)) in found:
            found[name].append(replace(piece, name=name))
    for one in parameters:
        _require_plain(one, found[one.name])
    return found


def _require_plain(parameter: Parameter, pieces: Sequence[Piece]) -> None:
    if not pieces:
        raise _refusal(parameter, "is not there, as its layer is quantised, or one of several experts")
    for piece in pieces:
        if piece.view.dtype not in _DTYPES:
            raise _refusal(parameter, f"is {str(piece.view.dtype).removeprefix('torch.')}")
        shape = list(piece.view.shape)
        shape[piece.dim] = sum(one.total for one in pieces)
        if tuple(shape) != parameter.shape:
            raise _refusal(parameter, f"has shape {shape}, not {list(parameter.shape)}")


def _refusal(parameter: Parameter, found: str) -> ConfigError:
    return ConfigError(
        "tuning", "full", f"alora or lora: in the engine {parameter.name} {found}, and full tuning needs plain weights"
    )


# --- what the engine's layers hold ------------------------------------------------------------------------------------


def _pieces(model: torch.nn.Module, names: Collection[str]) -> Iterator[Piece]:
    """Of everything that the model calls a parameter; what is used twice comes once.

    Args:
        names: of the checkpoint's parameters; of the layers that SGLang fuses it may have some fused itself.
    """
    from sglang.srt.layers.linear import (
        ColumnParallelLinear,
        MergedColumnParallelLinear,
        QKVParallelLinear,
        RowParallelLinear,
    )
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
    from sglang.srt.runtime_context import get_parallel

    rank = get_parallel().tp_rank
    modules: dict[str, Any] = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        module, data = modules[name.rpartition(".")[0]], parameter.data
        if isinstance(module, QKVParallelLinear | MergedColumnParallelLinear):
            yield from _fused(module, name, data, rank, names)
        elif isinstance(module, RowParallelLinear) and data.dim() == 2:
            yield Piece(name, data, 1, rank * data.shape[1], module.input_size)
        elif isinstance(module, ColumnParallelLinear):
            yield Piece(name, data, 0, rank * data.shape[0], module.output_size)
        elif isinstance(module, VocabParallelEmbedding):
            own = module.shard_indices
            first, end = own.org_vocab_start_index, own.org_vocab_end_index
            yield Piece(name, data[: end - first], 0, first, module.org_vocab_size)
        else:
            refresh = getattr(module, "refresh_gemma_weight", None)
            yield Piece(name, data, 0, 0, data.shape[0] if data.dim() else 0, rank == 0, refresh)


def _fused(module: Any, name: str, data: torch.Tensor, rank: int, names: Collection[str]) -> Iterator[Piece]:
    """The parts of a fused layer, which are parameters of their own unless the checkpoint has it fused too."""
    path, _, leaf = name.rpartition(".")
    parent, _, layer = path.rpartition(".")
    at = before = 0
    for part, (total, own, place, is_first_copy) in zip(STACKED.get(layer, (layer,)), _parts(module, rank)):
        first = place * own
        if name in names:
            part, first = layer, before + first
        yield Piece(f"{parent}.{part}.{leaf}", data[at : at + own], 0, first, total, is_first_copy)
        at, before = at + own, before + total


def _parts(module: Any, rank: int) -> list[tuple[int, int, int, bool]]:
    """(rows in all, rows here, how many such parts come before, whether this is the first copy) of the parts of a fused
    layer.

    Where there are more ranks than key and value heads, several have the same.
    """
    from sglang.srt.layers.linear import QKVParallelLinear
    from sglang.srt.runtime_context import get_parallel

    if not isinstance(module, QKVParallelLinear):
        return [(total, total // get_parallel().tp_size, rank, True) for total in module.output_sizes]
    size, replicas = module.head_size, module.num_kv_head_replicas
    q = (module.total_num_heads * size, module.num_heads * size, rank, True)
    kv = (module.total_num_kv_heads * size, module.num_kv_heads * size, rank // replicas, rank % replicas == 0)
    return [q, kv, kv]


# --- whole parameters -------------------------------------------------------------------------------------------------


def _whole(handle: EngineHandle, parameter: Parameter, pieces: Sequence[Piece]) -> torch.Tensor:
    """A parameter that is cut for the ranks, on each of them; of one rank's alone it is a view."""
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().tp_size == 1 and len(pieces) == 1:
        return pieces[0].view
    # -0 is what leaves every number as it is when it is added.
    whole = torch.full(parameter.shape, -0.0, dtype=pieces[0].view.dtype, device=pieces[0].view.device)
    for piece in pieces:
        if piece.is_first_copy:
            own(whole, piece).copy_(piece.view)
    return handle.sum_of_ranks(whole)


def own(whole: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What of a whole parameter is the piece."""
    return whole.narrow(piece.dim, piece.first, piece.view.shape[piece.dim])


# --- checks at start --------------------------------------------------------------------------------------------------


def _require_loaded(handle: EngineHandle, trained: Sequence[Parameter], pieces: Pieces) -> None:
    """Load the checkpoint once more: what is packed or scaled after it has been loaded is then no longer as it was."""
    before = [_checksums(pieces[one.name]) for one in trained]
    _load_checkpoint(handle)
    for one, sums in zip(trained, before):
        if _checksums(pieces[one.name]) != sums:
            raise _refusal(one, "is not as the checkpoint has it")


def _checksums(pieces: Sequence[Piece]) -> list[tuple[int, int]]:
    """Of each piece, the sum of its bits and of their multiples by place, modulo 2^64."""
    found = []
    for piece in pieces:
        plain, by_place = 0, 0
        integer = {4: torch.int32, 2: torch.int16}[piece.view.element_size()]
        for start, part in enumerate(piece.view.flatten().view(integer).split(_SUMMED)):
            bits = part.long()
            places = torch.arange(start * _SUMMED, start * _SUMMED + len(bits), device=bits.device)
            plain, by_place = plain + int(bits.sum()), by_place + int((bits * places).sum())
        found.append((plain, by_place))
    return found


def _load_checkpoint(handle: EngineHandle) -> None:
    from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader

    runner = handle.model_runner
    loader = get_model_loader(runner.load_config, runner.model_config)
    if isinstance(loader, DefaultModelLoader):  # others make weights up
        model: Any = runner.model
        with torch.inference_mode():
            model.load_weights(loader._get_all_weights(runner.model_config, model))


def _require_named(handle: EngineHandle, trained: Sequence[Parameter], pieces: Pieces) -> None:
    """Have SGLang load something else by the name of each parameter, and see whether it arrives where it should, and
    nowhere else. The weights are lost."""
    model: Any = handle.model_runner.model
    derived = [tensor.clone() for tensor in _derived(model)]
    for one in trained:
        for dim in range(len(one.shape)):
            numbers = _numbered(one, dim, pieces[one.name][0].view)
            with torch.inference_mode():
                try:
                    model.load_weights([(one.name, numbers)])
                except RuntimeError as error:  # a model that changes what it is given
                    raise _refusal(one, f"is not what SGLang is given ({error})") from error
            expected = _numbered(one, dim, pieces[one.name][0].view)
            if not all(torch.equal(piece.view, own(expected, piece)) for piece in pieces[one.name]):
                raise _refusal(one, "is not what SGLang is given")
    if not all(map(torch.equal, derived, _derived(model))):
        raise ConfigError(
            "tuning", "full", "alora or lora, as a layer of this model keeps what it has made of its weights"
        )


def _restore(trained: Sequence[Parameter], pieces: Pieces, theta: torch.Tensor) -> None:
    for one, view in zip(trained, views(theta, trained)):
        for piece in pieces[one.name]:
            piece.view.copy_(own(view, piece))
            if piece.refresh is not None:
                piece.refresh()


def _numbered(parameter: Parameter, dim: int, like: torch.Tensor) -> torch.Tensor:
    """Numbers that count along one dimension, up to what every type has exactly; of several dimensions a view without
    memory of its own."""
    numbers = torch.arange(parameter.shape[dim], device=like.device).remainder_(_COUNTED).to(like.dtype)
    shape = [1] * len(parameter.shape)
    shape[dim] = -1
    return numbers.view(shape).expand(parameter.shape)


def _derived(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What the model keeps beside its parameters, but for what is made anew when they change."""
    for module in model.modules():
        if not hasattr(module, "refresh_gemma_weight"):
            held = {**module._buffers, **vars(module)}
            yield from (value for value in held.values() if isinstance(value, torch.Tensor))
