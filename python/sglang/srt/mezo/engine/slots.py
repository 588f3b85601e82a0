"""Slots of SGLang's LoRA memory pool: how an adapter's weights get into one."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from uuid import uuid4

import torch

from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.core.errors import CapacityError
from sglang.srt.mezo.core.estimator import SIGNS, Estimator
from sglang.srt.mezo.engine.handle import EngineHandle, free_slots, require_pool
from sglang.srt.mezo.engine.layers import Part, adapted_layers
from sglang.srt.mezo.engine.peft_layers import CheckedFields
from sglang.srt.mezo.engine.points import PackedPoints, Point


class Slot:
    """One adapter's place in the pool, pinned until ``release``; weights never pass through SGLang's loader.

    Raises:
        CapacityError: the pool has no room. Whatever is raised, nothing stays taken.
    """

    def __init__(self, handle: EngineHandle, spec: AdapterSpec, layout: "SlotLayout", name: str):
        from sglang.srt.lora.lora_registry import LoRARef

        self._handle = handle
        self._layout = layout
        # No user can have an adapter of that name.
        self._ref = LoRARef(lora_name=f"mezo://{name}/{uuid4().hex}", lora_path=f"mezo://{name}", pinned=True)
        self.point = Point(self._ref.lora_id)
        with ExitStack() as release_on_error:
            release_on_error.callback(self.release)
            self._claim(spec, name)
            release_on_error.pop_all()

    def _claim(self, spec: AdapterSpec, name: str) -> None:
        manager = self._handle.lora_manager
        config = CheckedFields(
            peft_type="LORA", r=spec.r, lora_alpha=spec.lora_alpha, target_modules=self._layout.targets_in_pool
        )
        result = manager.load_lora_adapter_from_tensors(self._ref, self._layout.empty(), config)
        if not result.success:
            raise CapacityError(f"adapter slot {name!r}: {result.error_message}")
        lora_id = self._ref.lora_id
        manager.fetch_new_loras({lora_id})
        self._targets = self._layout.targets(self._handle, manager.memory_pool.uid_to_buffer_id[lora_id])

    def write(self, weights: torch.Tensor) -> None:
        """Put an adapter into the slot.

        Args:
            weights: float32 [numel] in the flat order of ``Adapter``; cast to the pool's dtype here, once.
        """
        torch._foreach_copy_(self._targets, self._layout.blocks_of(weights))  # pyright: ignore[reportPrivateImportUsage]

    def release(self) -> None:
        result = self._handle.lora_manager.unload_lora_adapter(self._ref)
        if not result.success:
            raise RuntimeError(f"adapter slot {self._ref.lora_name!r} is still taken: {result.error_message}")


@dataclass(frozen=True)
class _Block:
    """Rows first .. end of buffer ``buffer``: they begin at ``offset`` of the flat vector, ``stride`` numbers apart."""

    buffer: int
    first: int
    end: int
    columns: int
    offset: int
    stride: int


class SlotLayout:
    """Where each number of the flat vector lies in a slot of this rank's pool; one for all slots of an adapter.

    The flat vector's positions are stacked and cut for this tensor-parallel rank by the same methods that SGLang
    applies to weights. What comes out are blocks of it, so a write is a copy of each, whatever the layer.

    Attributes:
        scratch: float32 [numel] on the CPU, for an adapter that is made only to be written; elsewhere it is copied once
            more.
    """

    def __init__(self, handle: EngineHandle, adapter: Adapter):
        self.sites = adapter.sites
        self._r = adapter.spec.r
        self._layers = adapted_layers(handle, adapter.spec.target_modules)
        positions = Adapter(adapter.spec, adapter.sites)
        positions.theta = torch.arange(adapter.numel)
        matrices = {site.path: (a, b) for site, a, b in positions.matrices()}
        stacked = []
        for layer in self._layers:
            a, b = zip(
                *(_placed(part, layer.in_features, matrices.get(part.site.path), self._r) for part in layer.parts)
            )
            stacked.append(layer.module.slice_lora_a_weights(torch.cat(a)))
            stacked.append(layer.module.slice_lora_b_weights(torch.cat(b)))
        self._blocks = [block for buffer, places in enumerate(stacked) for block in _blocks(buffer, places)]
        self.scratch = torch.zeros(adapter.numel)
        self._weights = self.scratch.to(handle.device)  # the same memory where that is the CPU
        self._views = [
            self._weights.as_strided((block.end - block.first, block.columns), (block.stride, 1), block.offset)
            for block in self._blocks
        ]

    @property
    def targets_in_pool(self) -> list[str]:
        """SGLang's names of the layers."""
        return sorted({layer.target for layer in self._layers})

    def empty(self) -> dict[str, torch.Tensor]:
        """Zeros for all that the adapter's layers have in a slot, under SGLang's names, so that its loader has
        nothing to arrange."""
        state = {}
        for layer in self._layers:
            state[f"base_model.model.{layer.name}.lora_A.weight"] = torch.zeros(self._r, layer.in_features)
            state[f"base_model.model.{layer.name}.lora_B.weight"] = torch.zeros(layer.out_features, self._r)
        return state

    def blocks_of(self, weights: torch.Tensor) -> list[torch.Tensor]:
        """Flat vector [numel] in the blocks of ``targets``, on the engine's device; good until the next call."""
        if weights is not self._weights:
            self._weights.copy_(weights, non_blocking=True)
        return self._views

    def targets(self, handle: EngineHandle, slot: int) -> list[torch.Tensor]:
        """Views of the pool where the blocks lie in slot ``slot``. What else the adapter's layers have there becomes
        zero."""
        buffers = list(self._buffers(handle, slot))
        torch._foreach_zero_(buffers)  # pyright: ignore[reportPrivateImportUsage]
        return [buffers[block.buffer][block.first : block.end, : block.columns] for block in self._blocks]

    def _buffers(self, handle: EngineHandle, slot: int) -> Iterator[torch.Tensor]:
        """A [parts * r, in] and B [out, r] for every layer."""
        pool = handle.lora_manager.memory_pool
        for layer in self._layers:
            yield pool.A_buffer[layer.target][layer.index][slot][: len(layer.parts) * self._r]
            yield pool.B_buffer[layer.target][layer.index][slot][:, : self._r]


_NOWHERE = -1  # position of what SGLang's layer has for parts that are not adapted, and beyond the checkpoint's widths


def _placed(
    part: Part, in_features: int, positions: tuple[torch.Tensor, torch.Tensor] | None, r: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of A and B of the checkpoint's layer, or None where it is not adapted, as SGLang has them for one
    part of its own."""
    a, b = torch.full((r, in_features), _NOWHERE), torch.full((part.width, r), _NOWHERE)
    if positions is not None:
        a[:, : part.site.in_features] = positions[0]
        b[: part.rows] = positions[1][part.first : part.first + part.rows]
    return a, b


def _blocks(buffer: int, positions: torch.Tensor) -> Iterator[_Block]:
    """Rows that follow each other at equal distances in the flat vector, together; positions: int64 (rows, columns)."""
    columns = int((positions != _NOWHERE).any(0).sum())
    starts = positions[:, 0].tolist()
    somewhere = positions[positions[:, 0] != _NOWHERE]
    if (
        not torch.equal(somewhere[:, :columns], somewhere[:, :1] + torch.arange(columns))
        or (positions[:, columns:] != _NOWHERE).any()
    ):
        raise ValueError("a row of a LoRA weight lies in parts in SGLang's pool, where whole rows are copied")
    first = 0
    while first < len(starts):
        stride = starts[first + 1] - starts[first] if first + 1 < len(starts) else columns
        end = first + 1
        while (
            starts[first] != _NOWHERE and stride > 0 and end < len(starts) and starts[end] == starts[end - 1] + stride
        ):
            end += 1
        if starts[first] != _NOWHERE:
            yield _Block(buffer, first, end, columns, starts[first], stride if end > first + 1 else columns)
        first = end


class PerturbedSlots(PackedPoints):
    """Slots as the ``Points`` of an adapter.

    Args:
        num_perturbations: directions of a step; they take turns where the pool has less room.
        spare: adapters that the pool is to have room for besides, the base model not counted.

    Raises:
        CapacityError: the pool could not hold those of one direction even without requests.
    """

    tokens = 0

    def __init__(
        self, handle: EngineHandle, adapter: Adapter, num_perturbations: int, estimator: Estimator, spare: int = 0
    ):
        of_direction = len(SIGNS[estimator])
        require_pool(handle, 1 + of_direction + spare, adapter.spec.r)
        self._handle = handle
        self._spec = adapter.spec
        self._layout = SlotLayout(handle, adapter)
        width = min(num_perturbations, (free_slots(handle) - 1 - spare) // of_direction)
        super().__init__(adapter, estimator, width, self._layout.scratch)
        self._slots: list[Slot] = []

    @property
    def slots(self) -> int:
        return self.count

    @property
    def claimed(self) -> bool:
        return bool(self._slots)

    def claim(self) -> None:
        """Take the slots. Between two batches, and only where the adapters of requests in flight leave the room."""
        names = ["mezo-current"] + [
            f"mezo-{k}{'+' if sign > 0 else '-'}" for k, sign in itertools.product(range(self.width), self._signs)
        ]
        with ExitStack() as release_on_error:
            slots = []
            for name in names:
                slots.append(Slot(self._handle, self._spec, self._layout, name))
                release_on_error.callback(slots[-1].release)
            release_on_error.pop_all()
        self._slots, self._points = slots, [slot.point for slot in slots]

    def release(self) -> None:
        slots, self._slots, self._points = self._slots, [], []
        with ExitStack() as stack:  # all of them, even if one fails
            for slot in slots:
                stack.callback(slot.release)

    def write(self, number: int, theta: torch.Tensor) -> None:
        self._slots[number].write(theta)
