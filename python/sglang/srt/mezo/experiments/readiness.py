"""What is missing on this machine for an experiment, before a long run finds out: memory, models and data, disk.

Memory is by a model, and no measurement: the weights in the engine's type, each rank its part of them, and beside them
of MeZO's full tuning a float32 copy of the whole on each; of fine-tuning with AdamW, on one device, 16 bytes for each
trained number (weights, gradients and two moments in float32); a tenth for activations and KV.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.experiments.cost import parameters_of
from sglang.srt.mezo.experiments.spec import Cell, Experiment, arguments_of
from sglang.srt.mezo.training.finetune import ModelArguments

_BYTES = {"float32": 4, "float": 4}  # of a number of the weights; others have two
_TRAINED = {"mezo-full": 4, "ft-full": 16}
_SPARE = 1.1
_SECONDS = 10  # to wait for the hub


class Need(NamedTuple):
    """What an experiment needs, what there is, and whether that is enough."""

    what: str
    found: str
    enough: bool


def needs_of(experiment: Experiment) -> list[Need]:
    """Of a whole experiment."""
    cells = experiment.cells()
    model, _, _ = arguments_of(cells[0])
    return [*_memory(cells, model), _model(model), *_data(cells), _disk(model)]


def memory_of(method: str, parameters: float, dtype: str, tp_size: int = 1) -> float:
    """Bytes on each device that a method takes for a model of so many parameters, by the model above."""
    return _SPARE * parameters * (_BYTES.get(dtype, 2) / tp_size + _TRAINED.get(method, 0))


def _memory(cells: list[Cell], model: ModelArguments) -> Iterator[Need]:
    size = parameters_of(model.model)
    cards = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    where = (
        f"{len(cards)} GPUs of {min(cards) / 1e9:.0f} GB" if cards else f"no GPU, and {_host() / 1e9:.0f} GB of host"
    )
    for method, cell in {cell.method: cell for cell in cells}.items():
        tp_size = arguments_of(cell)[0].tp_size
        if size is None:
            yield Need(f"memory for {method}", f"nobody knows how large {model.model} is", False)
            continue
        needed = memory_of(method, size, model.dtype, tp_size)
        enough = len(cards) >= tp_size and min(cards) >= needed if cards else _host() >= tp_size * needed
        each = f" on each of {tp_size} devices" if tp_size > 1 else ""
        yield Need(f"{needed / 1e9:.1f} GB{each} for {method} (cost model)", where, enough)


def _model(model: ModelArguments) -> Need:
    return _at_hand(f"model {model.model}", model.model, "model_info")


def _data(cells: list[Cell]) -> Iterator[Need]:
    for task in dict.fromkeys(cell.task for cell in cells):
        data = arguments_of(next(cell for cell in cells if cell.task == task))[1]
        path = named_data(data.task, data.dataset, data.dataset_config).path
        yield _at_hand(f"data of {task}: {path}", path, "dataset_info")


def _at_hand(what: str, path: str, ask: str) -> Need:
    """Of what is a folder, or on the hub."""
    if Path(path).expanduser().exists():
        return Need(what, "here", True)
    from huggingface_hub import HfApi

    try:
        getattr(HfApi(), ask)(path, timeout=_SECONDS)
    except Exception as error:  # every way in which a hub cannot be reached has its own
        return Need(what, f"neither here nor on a hub that answers ({type(error).__name__})", False)
    return Need(what, "on the hub", True)


def _disk(model: ModelArguments) -> Need:
    size = parameters_of(model.model) or 0
    needed, free = 2.5 * size * _BYTES.get(model.dtype, 2), shutil.disk_usage(os.getcwd()).free
    what = f"{needed / 1e9:.1f} GB of disk, for the model and one that is trained"
    return Need(what, f"{free / 1e9:.1f} GB", free >= needed)


def _host() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
