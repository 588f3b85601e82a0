"""One EXTEND batch through SGLang's ModelRunner: sequences that start from cached KV, each token with its adapter."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang.srt.mezo.core.errors import CapacityError, DivergedError
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.kv_pool import erase


@dataclass(frozen=True)
class Sequenced:
    """A sequence of an EXTEND batch.

    Attributes:
        cached: int64 [prefix], KV indices of the tokens before ``tokens``.
        tokens: token ids to run, at least one.
        segments: (adapter id or None for the base model, number of tokens), covering ``tokens`` in order.
        follows: instead of ``cached``, (earlier sequence of the batch, how many of its tokens): those come before
            ``tokens``. The attention backend must write the KV of a batch before it reads it.
        shift: added to the positions of ``tokens``, which count what comes before them.
    """

    cached: torch.Tensor
    tokens: Sequence[int]
    segments: Sequence[tuple[str | None, int]]
    follows: tuple[int, int] | None = None
    shift: int = 0


def extend(handle: EngineHandle, sequences: Sequence[Sequenced]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the tokens of all sequences in one packed batch.

    Returns:
        hidden: [tokens, hidden], the input of the head, in the order of the sequences.
        kv_indices: int64 [tokens]; the caller owns these KV tokens and must free them or hand them to the tree.

    Raises:
        CapacityError: the KV pool or the request rows cannot hold the batch. Nothing stays allocated.
    """
    from sglang.srt.mem_cache.allocation import alloc_token_slots

    num_tokens = sum(len(sequence.tokens) for sequence in sequences)
    if num_tokens > handle.free_kv_tokens:
        raise CapacityError(
            f"{num_tokens} KV tokens are needed and {handle.free_kv_tokens} of {handle.kv_capacity} are free: raise "
            "max_total_tokens or lower the batch size"
        )
    kv_indices = alloc_token_slots(handle.tree_cache, num_tokens)
    try:
        return extend_into(handle, sequences, kv_indices), kv_indices
    except BaseException:
        handle.kv_allocator.free(kv_indices)
        raise


def require_finite_base(handle: EngineHandle, hidden: torch.Tensor, places: torch.Tensor) -> None:
    """Raise DivergedError where a pass of the base model is not finite; what it left in ``places`` is erased."""
    if not hidden.isfinite().all():
        erase(handle.kv_allocator.get_kvcache(), places)
        raise DivergedError(
            f"the base model does not give finite numbers in {hidden.dtype} for one of the prompts: "
            "serve it in another dtype"
        )


def extend_into(handle: EngineHandle, sequences: Sequence[Sequenced], places: torch.Tensor) -> torch.Tensor:
    """The same with the KV in places that the caller owns, int64 [tokens]; returns ``hidden``.

    Raises:
        CapacityError: the request rows cannot hold the batch.
    """
    rows = handle.req_to_token_pool.alloc_rows(len(sequences))
    if rows is None:
        raise CapacityError(
            f"{len(sequences)} request rows are needed and {handle.free_rows} are free: lower max_tokens_per_batch or "
            "raise max_running_requests"
        )
    try:
        return _run(handle, sequences, rows, places)
    finally:
        handle.req_to_token_pool.free_rows(rows)


def _run(
    handle: EngineHandle, sequences: Sequence[Sequenced], rows: list[int], kv_indices: torch.Tensor
) -> torch.Tensor:
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    runner = handle.model_runner
    handle.counted.passes += 1
    handle.counted.tokens += kv_indices.numel()
    with torch.inference_mode():
        batch = _forward_batch(handle, sequences, rows, kv_indices)
        _route_adapters(handle, batch, sequences)
        with forward_context(ForwardContext(attn_backend=runner.attn_backend), forward_batch=batch):
            runner.attn_backend.init_forward_metadata(batch)
            model: Any = runner.model.model
            return model(batch.input_ids, batch.positions, batch)


def _forward_batch(handle: EngineHandle, sequences: Sequence[Sequenced], rows: list[int], kv_indices: torch.Tensor):
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    extends = [len(sequence.tokens) for sequence in sequences]
    new = kv_indices.split(extends)
    cached = before(sequences, new)
    prefixes = [indices.numel() for indices in cached]
    totals = [p + e for p, e in zip(prefixes, extends)]
    starts = [0, *itertools.accumulate(extends[:-1])]
    device = handle.device
    _fill_rows(handle.req_to_token_pool.req_to_token, rows, totals, cached, new)
    lora_ids: list[Any] = [sequence.segments[-1][0] for sequence in sequences]  # None for the base model
    shifts = [sequence.shift for sequence in sequences]
    positions = torch.cat([torch.arange(p + shift, t + shift) for p, t, shift in zip(prefixes, totals, shifts)])
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=len(sequences),
        input_ids=torch.tensor([token for sequence in sequences for token in sequence.tokens], device=device),
        req_pool_indices=torch.tensor(rows, device=device),
        req_pool_indices_cpu=torch.tensor(rows),
        seq_lens=torch.tensor(totals, device=device),
        seq_lens_cpu=torch.tensor(totals),
        orig_seq_lens=torch.tensor(totals, dtype=torch.int32, device=device),
        seq_lens_sum=sum(totals),
        out_cache_loc=kv_indices,
        positions=positions.to(device),
        extend_num_tokens=sum(extends),
        extend_seq_lens=torch.tensor(extends, dtype=torch.int32, device=device),
        extend_prefix_lens=torch.tensor(prefixes, dtype=torch.int32, device=device),
        extend_start_loc=torch.tensor(starts, dtype=torch.int32, device=device),
        extend_prefix_lens_cpu=prefixes,
        extend_seq_lens_cpu=extends,
        lora_ids=lora_ids,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        spec_algorithm=SpeculativeAlgorithm.NONE,
    )
    translator = handle.model_runner.kv_index_translator
    translator.own_plan(batch).bind(batch, translator)
    return batch


def before(sequences: Sequence[Sequenced], new: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """KV indices of what comes before the tokens of each sequence, those being ``new``; on the device of these, where
    nothing may have been made elsewhere."""
    cached: list[torch.Tensor] = []
    for sequence, own in zip(sequences, new):
        if sequence.follows is None:
            cached.append(sequence.cached if len(sequence.cached) else own[:0])
        else:
            other, tokens = sequence.follows
            cached.append(torch.cat((cached[other], new[other]))[:tokens])
    return cached


def _fill_rows(
    table: torch.Tensor,
    rows: list[int],
    lengths: list[int],
    cached: Sequence[torch.Tensor],
    new: Sequence[torch.Tensor],
) -> None:
    """Write the KV indices of every sequence into its row of the table, all in one go."""
    indices = torch.cat([part for pair in zip(cached, new) for part in pair if part.numel()])
    row_of = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    table[row_of.to(table.device), position.to(table.device)] = indices.to(table.dtype)


def _route_adapters(handle: EngineHandle, batch, sequences: Sequence[Sequenced]) -> None:
    """Name the adapter of each sequence, or of each run of tokens where one sequence uses several."""
    manager = handle.model_runner.lora_manager
    if manager is None:
        return
    segments = [segment for sequence in sequences for segment in sequence.segments]
    manager.fetch_new_loras({lora_id for lora_id, _ in segments} | {None})
    if len(segments) == len(sequences):
        manager.prepare_lora_batch(batch)
    else:
        manager.prepare_lora_token_segments(
            lora_ids=[lora_id for lora_id, _ in segments], segment_lens=[length for _, length in segments]
        )
