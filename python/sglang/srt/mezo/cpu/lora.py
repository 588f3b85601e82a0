"""LoRA on plain PyTorch: any run of tokens under any adapter slot, a few matrix products per layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo
from sglang.srt.mezo.cpu.attention_plan import fresh_tokens
from sglang.srt.mezo.cpu.linear import keeps_rows_apart

# Their layers look tokens up by other rows than the ones that a segment names (token ids, pruned rows).
UNSUPPORTED_TARGETS = {"embed_tokens", "lm_head"}


@dataclass(frozen=True)
class Segment:
    """Rows start..end of the packed batch run under adapter slot `slot`."""

    slot: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Block:
    """Rows of one or several slots of equal rank that go through one batched product.

    rows: a slice of contiguous rows, or int64 (length,) row numbers; holds len(slots) runs of `length` rows each.
    slots: a slice of consecutive slots, or int64 (count,).
    scaling: (count, 1, 1), lora_alpha / r of each slot.
    """

    rows: slice | torch.Tensor
    slots: slice | torch.Tensor
    count: int
    length: int
    rank: int
    scaling: torch.Tensor


def merge_segments(lengths: Sequence[int], slots: Sequence[int]) -> list[Segment]:
    """Consecutive segments that cover sum(lengths) rows; neighbours of one slot become one segment."""
    merged: list[Segment] = []
    start = 0
    for length, slot in zip(lengths, slots, strict=True):
        end = start + int(length)
        if end == start:
            continue
        if merged and merged[-1].slot == slot:
            merged[-1] = Segment(slot, merged[-1].start, end)
        else:
            merged.append(Segment(slot, start, end))
        start = end
    return merged


def plan_blocks(segments: Sequence[Segment], ranks: Sequence[int], scalings: Sequence[float]) -> list[Block]:
    """The products that apply every adapter to its rows; slots of rank 0 (the base model) need none.

    A slot with several runs of rows is gathered into one product. Slots with a single run are taken together where
    runs of equal length and rank follow each other: the signs and directions of a step lie like that.
    """
    by_slot: dict[int, list[Segment]] = {}
    for segment in segments:
        if ranks[segment.slot] > 0:
            by_slot.setdefault(segment.slot, []).append(segment)
    blocks = [_gathered_block(runs, ranks, scalings) for runs in by_slot.values() if len(runs) > 1]
    single = [runs[0] for runs in by_slot.values() if len(runs) == 1]
    return blocks + [_batched_block(run, ranks, scalings) for run in _equal_neighbours(single, ranks)]


def _equal_neighbours(segments: Sequence[Segment], ranks: Sequence[int]) -> list[list[Segment]]:
    runs: list[list[Segment]] = []
    for segment in segments:
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and last.end == segment.start
            and last.length == segment.length
            and ranks[last.slot] == ranks[segment.slot]
        ):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return runs


def _batched_block(run: Sequence[Segment], ranks: Sequence[int], scalings: Sequence[float]) -> Block:
    slots = [segment.slot for segment in run]
    consecutive = all(b == a + 1 for a, b in pairwise(slots))
    return Block(
        rows=slice(run[0].start, run[-1].end),
        slots=slice(slots[0], slots[-1] + 1) if consecutive else torch.tensor(slots),
        count=len(run),
        length=run[0].length,
        rank=ranks[slots[0]],
        scaling=torch.tensor([scalings[slot] for slot in slots]).view(-1, 1, 1),
    )


def _gathered_block(runs: Sequence[Segment], ranks: Sequence[int], scalings: Sequence[float]) -> Block:
    slot = runs[0].slot
    rows = torch.cat([torch.arange(segment.start, segment.end) for segment in runs])
    return Block(
        rows=rows,
        slots=slice(slot, slot + 1),
        count=1,
        length=len(rows),
        rank=ranks[slot],
        scaling=torch.tensor([scalings[slot]]).view(1, 1, 1),
    )


def add_lora(
    output: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    offsets: Sequence[int],
    block: Block,
) -> None:
    """Add scaling * B A x to the rows of one block, in place.

    output: (tokens, out), the base layer's result.
    x: (tokens, in).
    lora_a: (slots, slices * max_rank, in), the slices of a slot packed by its own rank.
    lora_b: (slots, out, max_rank).
    offsets: slices + 1 bounds in the output dimension (q | k | v of a fused projection). The slots hold zeros for a
        slice that the adapter does not target; those add nothing, and no time is spent on adding it.
    """
    rank, slices = block.rank, len(offsets) - 1
    rows = x[block.rows].view(block.count, block.length, -1)
    hidden = _product(rows, lora_a[block.slots, : slices * rank].transpose(1, 2))
    hidden *= block.scaling.to(hidden.dtype)
    for index, (low, high) in enumerate(pairwise(offsets)):
        part = hidden[:, :, index * rank : (index + 1) * rank]
        if not part[0, 0].any() and not part.any():
            continue
        weight = lora_b[block.slots, low:high, :rank].transpose(1, 2)
        if not isinstance(block.rows, slice):
            output[:, low:high].index_add_(0, block.rows, _product(part, weight)[0])
        elif keeps_rows_apart(rank, part.dtype):
            output[block.rows].view(block.count, block.length, -1)[:, :, low:high].baddbmm_(part, weight)
        else:
            output[block.rows, low:high] += _product(part, weight).view(-1, high - low)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b of every slot, in which a row of `a` that holds no numbers leaves the others alone; rows may be other
    requests'."""
    if keeps_rows_apart(a.shape[2], a.dtype):
        return torch.bmm(a, b)
    return torch.bmm(a.float(), b.float()).to(a.dtype)


class CpuLoRABackend(TorchNativeLoRABackend):
    """SGLang's LoRA backend interface over `plan_blocks` and `add_lora`."""

    name = "torch_native"
    # A batch without adapters runs the plain layers.
    skip_inactive_lora_batches = True

    def __init__(self, max_loras_per_batch: int, device: torch.device, **kwargs):
        super().__init__(max_loras_per_batch, device, **kwargs)
        self.blocks: list[Block] = []

    def validate_lora_targets(self, base_model: torch.nn.Module, target_modules: set[str]) -> None:
        unsupported = sorted(UNSUPPORTED_TARGETS & set(target_modules))
        if unsupported:
            raise ValueError(
                f"lora target_modules={unsupported} are not supported on CPU: name linear layers, "
                f"for example {sorted(set(target_modules) - UNSUPPORTED_TARGETS) or ['qkv_proj']} "
                "(`all` includes the embeddings)"
            )

    def prepare_lora_batch(
        self,
        forward_batch,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Route every sequence to its slot."""
        lengths = fresh_tokens(forward_batch)
        self.prepare_lora_token_segments(
            segment_lens=lengths,
            weight_indices=weight_indices[: len(lengths)],
            lora_ranks=lora_ranks,
            scalings=scalings,
        )

    def prepare_lora_token_segments(
        self, *, segment_lens: list[int], weight_indices: list[int], lora_ranks: list[int], scalings: list[float]
    ) -> None:
        """Route runs of tokens to slots, whatever sequences they belong to."""
        segments = merge_segments(segment_lens, weight_indices)
        self.blocks = plan_blocks(segments, lora_ranks, scalings)
        self.batch_info = _batch_info(segments, lora_ranks, scalings)

    def forward_with_base(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        base_fn: Callable[[], torch.Tensor],
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        output_offset: torch.Tensor,
        offsets: Sequence[int],
        *,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        kind: str = "linear",
        pruned_batch_info: object = None,
    ) -> torch.Tensor:
        """The base layer's output plus the adapters', shapes as in add_lora.

        A row-parallel layer holds a slice of x and of A: B (A_slice x_slice) sums over the ranks to the whole delta,
        so the base layer's one reduction serves both.
        """
        if kind != "linear":
            raise NotImplementedError(f"LoRA on a layer of kind {kind!r} is not supported on CPU")
        output = base_fn()
        for block in self.blocks:
            add_lora(output, x, lora_a, lora_b, offsets, block)
        return output if all_reduce is None else all_reduce(output)


def _batch_info(
    segments: Sequence[Segment], lora_ranks: Sequence[int], scalings: Sequence[float]
) -> TorchNativeLoRABatchInfo:
    """The record that SGLang's layers look at to see whether a batch is prepared."""
    lengths = [segment.length for segment in segments]
    indptr = [0] + [segment.end for segment in segments]
    return TorchNativeLoRABatchInfo(
        use_cuda_graph=False,
        bs=len(segments),
        num_segments=len(segments),
        seg_indptr=torch.tensor(indptr, dtype=torch.int32),
        seg_lens=torch.tensor(lengths, dtype=torch.int32),
        weight_indices=torch.tensor([segment.slot for segment in segments], dtype=torch.int32),
        lora_ranks=torch.tensor(lora_ranks, dtype=torch.int32),
        scalings=torch.tensor(scalings, dtype=torch.float32),
        max_len=max(lengths, default=0),
        expected_tokens=indptr[-1],
    )
