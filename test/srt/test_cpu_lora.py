"""The LoRA backend against one dense product per token."""

import random

import pytest
import torch

from sglang.srt.mezo.cpu.lora import CpuLoRABackend, merge_segments, plan_blocks

SLOTS, MAX_RANK, IN = 6, 8, 24
RANKS = [0, 4, 4, 8, 4, 2]
SCALINGS = [0.0, 2.0, 0.5, 1.0, 3.0, 1.5]


class Layer:
    """A linear layer of `slices` fused outputs, with adapters in slots as SGLang's memory pool lays them out."""

    def __init__(self, outputs, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        self.offsets = [0]
        for size in outputs:
            self.offsets.append(self.offsets[-1] + size)
        self.slices = len(outputs)
        self.weight = torch.randn(self.offsets[-1], IN).to(dtype)
        # What lies beyond an adapter's own rank is left over from another adapter and must not count.
        self.lora_a = torch.randn(SLOTS, self.slices * MAX_RANK, IN).to(dtype)
        self.lora_b = torch.randn(SLOTS, self.offsets[-1], MAX_RANK).to(dtype)

    def delta(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        """scaling * B A x of one token, slice by slice, in float64."""
        rank, parts = RANKS[slot], []
        for i in range(self.slices):
            a = self.lora_a[slot, i * rank : (i + 1) * rank].double()
            b = self.lora_b[slot, self.offsets[i] : self.offsets[i + 1], :rank].double()
            parts.append(SCALINGS[slot] * (b @ (a @ x.double())))
        return torch.cat(parts)

    def expected(self, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        rows = [self.weight.double() @ row.double() + self.delta(row, slot) for row, slot in zip(x, slots, strict=True)]
        return torch.stack(rows)

    def run(self, backend: CpuLoRABackend, x: torch.Tensor, all_reduce=None) -> torch.Tensor:
        return backend.forward_with_base(
            None, x, lambda: x @ self.weight.T, self.lora_a, self.lora_b, None, self.offsets, all_reduce=all_reduce
        )


def backend_for(lengths, slots) -> CpuLoRABackend:
    backend = CpuLoRABackend(max_loras_per_batch=SLOTS, device=torch.device("cpu"))
    backend.prepare_lora_token_segments(segment_lens=lengths, weight_indices=slots, lora_ranks=RANKS, scalings=SCALINGS)
    return backend


SEGMENTS = {
    "one adapter": ([7], [1]),
    "base only": ([7], [0]),
    "base, then adapter": ([5, 2, 4, 3], [0, 1, 0, 2]),
    "equal neighbours of consecutive slots": ([3, 3], [1, 2]),
    "equal neighbours of scattered slots": ([3, 3, 3], [4, 1, 2]),
    "equal lengths of different rank": ([3, 3, 3, 3], [1, 3, 5, 2]),
    "slots that come back": ([2] * 8, [1, 2, 1, 2, 1, 2, 1, 2]),
    "ragged, slots that come back": ([2, 5, 1, 3, 4], [1, 0, 1, 3, 1]),
    "empty segments": ([0, 4, 0, 2, 0], [1, 2, 3, 2, 0]),
    "no tokens": ([], []),
}


@pytest.mark.parametrize("outputs", [[20], [16, 8, 8]], ids=["plain", "qkv"])
@pytest.mark.parametrize("name", SEGMENTS)
def test_equals_dense_per_token(name, outputs):
    lengths, slots = SEGMENTS[name]
    layer, x = Layer(outputs), torch.randn(sum(lengths), IN)
    output = layer.run(backend_for(lengths, slots), x)
    per_token = [slot for length, slot in zip(lengths, slots) for _ in range(length)]
    if per_token:
        torch.testing.assert_close(output.double(), layer.expected(x, per_token), atol=1e-3, rtol=1e-4)
    else:
        assert output.shape == (0, sum(outputs))


@pytest.mark.parametrize("seed", range(4))
def test_random_segments(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(0, 6) for _ in range(30)]
    slots = [rng.randrange(SLOTS) for _ in range(30)]
    layer, x = Layer([16, 8, 8], seed=seed), torch.randn(sum(lengths), IN)
    per_token = [slot for length, slot in zip(lengths, slots) for _ in range(length)]
    output = layer.run(backend_for(lengths, slots), x)
    torch.testing.assert_close(output.double(), layer.expected(x, per_token), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("slots", [[1, 2], [1, 2, 1]], ids=["in place", "gathered"])
def test_a_slice_that_no_adapter_targets_is_left_out(slots):
    layer, x = Layer([16, 8, 8]), torch.randn(3 * len(slots), IN)
    for slot in (1, 2):
        layer.lora_a[slot, RANKS[slot] : 2 * RANKS[slot]] = 0
    layer.lora_b[:, 16:24] = torch.nan  # would show in a product
    output = layer.run(backend_for([3] * len(slots), slots), x)
    layer.lora_b[:, 16:24] = 0
    expected = layer.expected(x, [slot for slot in slots for _ in range(3)])
    torch.testing.assert_close(output.double(), expected, atol=1e-3, rtol=1e-4)


def test_a_slice_that_some_adapters_target_counts():
    layer, x = Layer([16, 8, 8]), torch.randn(9, IN)
    layer.lora_a[1, 4:8] = 0  # k of the first slot
    x[0] = 0
    output = layer.run(backend_for([3, 3, 3], [1, 2, 4]), x)
    torch.testing.assert_close(output.double(), layer.expected(x, [1] * 3 + [2] * 3 + [4] * 3), atol=1e-3, rtol=1e-4)


def test_bfloat16():
    layer, x = Layer([16], dtype=torch.bfloat16), torch.randn(6, IN).bfloat16()
    output = layer.run(backend_for([3, 3], [1, 2]), x)
    torch.testing.assert_close(output.double(), layer.expected(x, [1] * 3 + [2] * 3), atol=1.0, rtol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("width", "rank"), [(24, 4), (64, 8), (41, 3), (100, 5), (80, 34)])
def test_what_an_adapter_or_a_token_holds_stays_in_its_rows(dtype, value, width, rank):
    """Adapters 1 to 4 in turn, several times, and in one batched product; slot 2's numbers are none, as is a token
    of slot 4."""
    torch.manual_seed(0)
    x = torch.randn(68, width).to(dtype)
    lora_a, lora_b = torch.randn(5, rank, width).to(dtype), torch.randn(5, 48, rank).to(dtype)
    for slots in ([0, 1, 2, 3, 4, 2, 1, 2, 4, 1], [1, 2, 3, 4]):
        backend = CpuLoRABackend(max_loras_per_batch=5, device=torch.device("cpu"))
        lengths = [len(x) // len(slots)] * len(slots)
        backend.prepare_lora_token_segments(
            segment_lens=lengths, weight_indices=slots, lora_ranks=[0, *[rank] * 4], scalings=[2.0] * 5
        )
        slot_of = torch.tensor(slots).repeat_interleave(lengths[0])
        tokens, bad_a, bad_b = x[: len(slot_of)].clone(), lora_a.clone(), lora_b.clone()

        def run(a, b):
            return backend.forward_with_base(
                None, tokens, lambda: torch.zeros(len(tokens), 48, dtype=dtype), a, b, None, [0, 48]
            )

        expected = run(lora_a, lora_b)
        bad_a[2], bad_b[2, ::2] = value, value
        touched = slot_of == 2
        tokens[(last := (slot_of == 4).nonzero()[-1, 0])], touched[last] = value, True
        torch.testing.assert_close(run(bad_a, bad_b)[~touched], expected[~touched], atol=0, rtol=0)


def test_row_parallel_shards_add_up_in_one_reduction():
    """Every rank holds a slice of x, of the weight and of A; the sum over ranks is the whole layer."""
    layer, x = Layer([20]), torch.randn(9, IN)
    lengths, slots = [4, 5], [1, 3]
    partial = []
    for shard in (slice(0, IN // 2), slice(IN // 2, IN)):
        rank = Layer([20])
        rank.weight, rank.lora_a = layer.weight[:, shard], layer.lora_a[:, :, shard]
        rank.lora_b = layer.lora_b
        rank.run(backend_for(lengths, slots), x[:, shard], all_reduce=partial.append)
    assert len(partial) == 2
    torch.testing.assert_close(sum(partial).double(), layer.expected(x, [1] * 4 + [3] * 5), atol=1e-3, rtol=1e-4)


def test_neighbours_of_one_slot_are_merged():
    segments = merge_segments([2, 3, 0, 1, 4], [1, 1, 2, 1, 0])
    assert [(s.slot, s.start, s.end) for s in segments] == [(1, 0, 6), (0, 6, 10)]


def test_signs_and_directions_of_a_step_are_one_product():
    segments = merge_segments([2] * 16, [slot for slot in (1, 2, 4, 5) for _ in range(4)])
    blocks = plan_blocks(segments, [0, 4, 4, 0, 4, 4], [1.0] * 6)
    assert [(block.count, block.length) for block in blocks] == [(4, 8)]


def test_batch_without_adapters_needs_no_product():
    assert backend_for([3, 4], [0, 0]).blocks == []


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_embedding_targets_are_refused(target):
    backend = backend_for([], [])
    backend.validate_lora_targets(torch.nn.Module(), {"qkv_proj", "o_proj"})
    with pytest.raises(ValueError, match=rf"target_modules=\['{target}'\].*o_proj"):
        backend.validate_lora_targets(torch.nn.Module(), {"o_proj", target})


def test_other_layer_kinds_are_refused():
    with pytest.raises(NotImplementedError, match="lm_head"):
        backend_for([1], [1]).forward_with_base(None, None, None, None, None, None, [0, 1], kind="lm_head")
