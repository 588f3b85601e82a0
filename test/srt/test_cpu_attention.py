"""The batched attention backend against a softmax written one query at a time, and against upstream's loop."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mezo.cpu import kernel
from sglang.srt.mezo.cpu.attention import CpuAttentionBackend
from sglang.srt.mezo.cpu.attention_plan import GROUP_COST, MAX_FRESH, PADDING_LIMIT, Row, pairs, plan
from sglang.srt.model_executor.forward_batch_info import ForwardMode

POOL_TOKENS, CONTEXT = 20000, 700


@pytest.fixture(params=["kernel", "PyTorch"], autouse=True)
def path(request, monkeypatch):
    """Both ways of attention; the kernel is built wherever there is a compiler."""
    if request.param == "kernel" and kernel.LIBRARY is None:
        pytest.skip("attention.c was not built")
    if request.param == "PyTorch":
        monkeypatch.setattr(kernel, "LIBRARY", None)


class Pool:
    """One layer's keys and values, (tokens, kv_heads, dim)."""

    def __init__(self, kv_heads: int, dim: int, dtype: torch.dtype):
        self.keys, self.values = (torch.randn(POOL_TOKENS, kv_heads, dim).to(dtype) for _ in range(2))

    def set_kv_buffer(self, layer, where, k, v) -> None:
        self.keys[where.loc] = k.view(-1, *self.keys.shape[1:]).to(self.keys.dtype)
        self.values[where.loc] = v.view(-1, *self.values.shape[1:]).to(self.values.dtype)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values


class Case:
    """A packed batch of rows (prefix, fresh); rows that name a `shared` row start from that row's own prefix tokens."""

    def __init__(self, rows, decode=False, heads=4, kv_heads=4, dim=16, dtype=torch.float32, shared=None, seed=0):
        torch.manual_seed(seed)
        slots = iter(random.Random(seed).sample(range(1, POOL_TOKENS), POOL_TOKENS - 1))
        self.rows, self.heads, self.dim = rows, heads, dim
        self.pool = Pool(kv_heads, dim, dtype)
        table = torch.zeros(len(rows) + 3, CONTEXT, dtype=torch.int32)
        self.requests = list(range(2, len(rows) + 2))
        for i, (prefix, fresh) in enumerate(rows):
            mine = [next(slots) for _ in range(prefix + fresh)]
            if shared is not None and shared[i] != i:
                mine[:prefix] = table[self.requests[shared[i]], :prefix].tolist()
            table[self.requests[i], : prefix + fresh] = torch.tensor(mine)
        tokens = sum(fresh for _, fresh in rows)
        self.q = torch.randn(tokens, heads * dim).to(dtype)
        self.k, self.v = (torch.randn(tokens, kv_heads * dim).to(dtype) for _ in range(2))
        self.runner = SimpleNamespace(
            device="cpu", req_to_token_pool=SimpleNamespace(req_to_token=table), token_to_kv_pool=self.pool
        )
        out_cache_loc = torch.cat([table[r, p : p + f] for r, (p, f) in zip(self.requests, rows)]).long()
        lengths = torch.tensor([p + f for p, f in rows])
        self.batch = SimpleNamespace(
            batch_size=len(rows),
            forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
            req_pool_indices=torch.tensor(self.requests),
            seq_lens=lengths,
            seq_lens_cpu=lengths,
            extend_seq_lens=torch.tensor([f for _, f in rows]),
            extend_seq_lens_cpu=[f for _, f in rows],
            extend_prefix_lens=torch.tensor([p for p, _ in rows]),
            extend_prefix_lens_cpu=[p for p, _ in rows],
            out_cache_loc=out_cache_loc,
            encoder_lens=None,
        )
        self.layer = SimpleNamespace(
            layer_id=0,
            tp_q_head_num=heads,
            tp_k_head_num=kv_heads,
            tp_v_head_num=kv_heads,
            qk_head_dim=dim,
            v_head_dim=dim,
            scaling=dim**-0.5,
            is_cross_attention=False,
            attn_type=AttentionType.DECODER,
            sliding_window_size=-1,
            logit_cap=0.0,
        )

    def run(self, backend_class, with_kv=True) -> torch.Tensor:
        backend = backend_class(self.runner)
        backend.init_forward_metadata(self.batch)
        forward = backend.forward_decode if self.batch.forward_mode.is_decode() else backend.forward_extend
        if with_kv:
            return forward(self.q, self.k, self.v, self.layer, self.batch)
        return forward(self.q, None, None, self.layer, self.batch, save_kv_cache=False)

    def expected(self) -> torch.Tensor:
        """One query and head at a time, in numpy and float64; reads the pool, so a run must have filled it."""
        table = self.runner.req_to_token_pool.req_to_token
        out, start = np.zeros((len(self.q), self.heads, self.dim)), 0
        group = self.heads // self.pool.keys.shape[1]
        for request, (prefix, fresh) in zip(self.requests, self.rows):
            places = table[request, : prefix + fresh].long()
            keys, values = (x[places].double().numpy() for x in (self.pool.keys, self.pool.values))
            for i in range(fresh):
                for head in range(self.heads):
                    query = self.q.view(-1, self.heads, self.dim)[start + i, head].double().numpy()
                    low, high = self._window(prefix + i, prefix + fresh)
                    scores = keys[low:high, head // group] @ query * self.layer.scaling
                    if self.layer.logit_cap:
                        scores = self.layer.logit_cap * np.tanh(scores / self.layer.logit_cap)
                    weights = np.exp(scores - scores.max())
                    out[start + i, head] = weights / weights.sum() @ values[low:high, head // group]
            start += fresh
        return torch.from_numpy(out).view(len(self.q), -1)

    def _window(self, position: int, length: int) -> tuple[int, int]:
        if self.layer.attn_type == AttentionType.ENCODER_ONLY:
            return 0, length
        window = self.layer.sliding_window_size
        return (max(0, position - window) if window > -1 else 0), position + 1


def random_rows(prefixes, fresh, count=16, seed=0):
    rng = random.Random(seed)
    return [(rng.randint(*prefixes), rng.randint(*fresh)) for _ in range(count)]


CASES = {
    "two new tokens over a prefix": dict(rows=random_rows((10, 60), (2, 2))),
    "ragged tokens over a prefix": dict(rows=random_rows((1, 60), (1, 30))),
    "no prefix": dict(rows=random_rows((0, 0), (1, 60))),
    "some with a prefix": dict(rows=random_rows((0, 3), (1, 9))),
    "one row": dict(rows=[(0, 5)]),
    "decode": dict(rows=random_rows((0, 80), (1, 1)), decode=True),
    "grouped heads": dict(rows=random_rows((0, 40), (1, 9)), heads=6, kv_heads=2),
    "grouped heads decode": dict(rows=random_rows((5, 40), (1, 1)), heads=6, kv_heads=2, decode=True),
    "shared prefixes": dict(rows=[(30, 3), (12, 2), (30, 5), (12, 2), (30, 1), (31, 2)], shared=[0, 1, 0, 1, 0, 5]),
    "heads of 64": dict(rows=random_rows((0, 40), (1, 9)), dim=64),
    "heads of 128, grouped": dict(rows=random_rows((0, 40), (1, 9)), heads=6, kv_heads=2, dim=128),
    "many rows over one prefix": dict(rows=[(21, 3)] * 100, shared=[0] * 100),
    "some long, some short": dict(rows=random_rows((0, 60), (1, 2)) + random_rows((0, 60), (33, 60), count=4)),
    "rows that do not fill tiles": dict(
        rows=[(0, 130), (33, 65), (31, 9), (160, 64), (5, 8), (0, 7)], heads=6, kv_heads=2, dim=80
    ),
    "long rows over one prefix": dict(
        rows=[(40, 30), (40, 66), (40, 7), (40, 9)], shared=[0, 0, 0, 0], heads=6, kv_heads=2, dim=64
    ),
    "longer than one piece": dict(rows=[(3, MAX_FRESH + 90), (0, MAX_FRESH + 1), (4, 2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_softmax(name):
    case = Case(**CASES[name])
    torch.testing.assert_close(case.run(CpuAttentionBackend).double(), case.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_equals_upstream(name):
    case = Case(**CASES[name])
    torch.testing.assert_close(case.run(CpuAttentionBackend), case.run(TorchNativeAttnBackend), atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_close():
    case = Case(random_rows((5, 40), (1, 9)), dtype=torch.bfloat16)
    torch.testing.assert_close(case.run(CpuAttentionBackend).double(), case.expected(), atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("window", [0, 3, 1000])
@pytest.mark.parametrize("decode", [False, True])
def test_sliding_window(window, decode):
    rows = random_rows((0, 20), (1, 1) if decode else (1, 9))
    case = Case(rows, decode=decode)
    case.layer.sliding_window_size = window
    torch.testing.assert_close(case.run(CpuAttentionBackend).double(), case.expected(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [2, 40])
def test_sliding_window_of_long_rows(window):
    case = Case([(0, 150), (70, 90), (33, 20)], dim=64)
    case.layer.sliding_window_size = window
    torch.testing.assert_close(case.run(CpuAttentionBackend).double(), case.expected(), atol=2e-5, rtol=1e-4)


def test_encoder_only_sees_the_whole_sequence():
    case = Case(random_rows((0, 0), (1, 30)) + [(0, 200)])
    case.layer.attn_type = AttentionType.ENCODER_ONLY
    torch.testing.assert_close(case.run(CpuAttentionBackend).double(), case.expected(), atol=2e-5, rtol=1e-4)


def test_logit_cap():
    case = Case(random_rows((0, 20), (1, 9)), heads=4, kv_heads=2)
    case.layer.logit_cap = 1.5
    torch.testing.assert_close(case.run(CpuAttentionBackend).double(), case.expected(), atol=2e-5, rtol=1e-4)


def test_layer_that_reads_another_layers_kv():
    case = Case(random_rows((0, 0), (1, 9)))
    case.run(CpuAttentionBackend)
    case.q = torch.randn_like(case.q)
    output = case.run(CpuAttentionBackend, with_kv=False)
    torch.testing.assert_close(output.double(), case.expected(), atol=2e-5, rtol=1e-4)


def test_layers_of_one_forward_with_different_masks():
    case = Case(random_rows((0, 0), (5, 9)))
    backend = CpuAttentionBackend(case.runner)
    backend.init_forward_metadata(case.batch)
    decoder, encoder = AttentionType.DECODER, AttentionType.ENCODER_ONLY
    for attn_type, window in ((decoder, -1), (encoder, -1), (decoder, 2)):
        case.layer.attn_type, case.layer.sliding_window_size = attn_type, window
        output = backend.forward_extend(case.q, case.k, case.v, case.layer, case.batch)
        torch.testing.assert_close(output.double(), case.expected(), atol=2e-5, rtol=1e-4)


def rows_of(case: Case) -> list[Row]:
    rows, start = [], 0
    for request, (prefix, fresh) in zip(case.requests, case.rows):
        rows.append(Row(request, prefix, fresh, start))
        start += fresh
    return rows


def test_step_over_cached_prompts_is_one_or_two_groups_and_gathers_a_shared_prompt_once():
    half = random_rows((10, 60), (2, 2), count=16)
    case = Case(half * 2, shared=list(range(16)) * 2)
    groups = plan(rows_of(case), case.runner.req_to_token_pool.req_to_token, causal=True)
    assert len(groups) <= 2
    assert sum(group.count for group in groups) == 16
    assert sum(group.count * group.keys for group in groups) < sum(p + f for p, f in half * 2)


@pytest.mark.parametrize("seed", range(5))
def test_padding_is_bounded_and_every_token_is_covered_once(seed):
    case = Case(random_rows((0, 500), (1, 60), count=32, seed=seed), seed=seed)
    groups = plan(rows_of(case), case.runner.req_to_token_pool.req_to_token, causal=True)
    real = sum(pairs(fresh, prefix + fresh) for prefix, fresh in case.rows)
    padded = sum(group.count * pairs(group.queries, group.keys) for group in groups)
    assert padded <= PADDING_LIMIT * real + GROUP_COST * len(groups)
    written = torch.cat([group.written(padding=10**9).flatten() for group in groups])
    covered = written[written < 10**9]
    assert sorted(covered.tolist()) == list(range(sum(fresh for _, fresh in case.rows)))


def test_fresh_keys_come_from_the_batch_where_no_row_has_a_prefix():
    case = Case(random_rows((0, 0), (10, 60)))
    groups = plan(rows_of(case), case.runner.req_to_token_pool.req_to_token, causal=True)
    assert all(group.fresh for group in groups)


@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 64), (6, 2, 64), (4, 4, 80), (4, 2, 128)])
def test_the_kernel_gives_a_token_the_same_bits_wherever_its_row_is_cut(heads, kv_heads, dim):
    if kernel.LIBRARY is None:
        pytest.skip("PyTorch adds in another order")
    whole = Case([(0, 150)], heads=heads, kv_heads=kv_heads, dim=dim)
    expected = whole.run(CpuAttentionBackend)
    table, loc = whole.runner.req_to_token_pool.req_to_token, whole.batch.out_cache_loc
    for prefix in (1, 2, 3, 20, 63, 64, 101, 149):
        case = Case([(prefix, 150 - prefix), (7, 5)], heads=heads, kv_heads=kv_heads, dim=dim)
        case.pool = case.runner.token_to_kv_pool = whole.pool
        case.runner.req_to_token_pool.req_to_token[case.requests[0], :150] = table[whole.requests[0], :150]
        case.batch.out_cache_loc[: 150 - prefix] = loc[prefix:]
        for name in ("q", "k", "v"):
            getattr(case, name)[: 150 - prefix] = getattr(whole, name)[prefix:]
        assert torch.equal(case.run(CpuAttentionBackend)[: 150 - prefix], expected[prefix:])


def test_what_is_not_a_number_stays_so():
    case = Case(random_rows((0, 20), (1, 9)))
    case.q[0] = float("nan")
    assert case.run(CpuAttentionBackend)[0].isnan().all()


def spoil(case: Case, value: float, seed: int = 0) -> torch.Tensor:
    """Put `value` into the keys and values of some fresh tokens of every second row; returns bool (tokens,), who
    sees one of them."""
    rng = random.Random(seed)
    sees, start = torch.zeros(len(case.q), dtype=torch.bool), 0
    for number, (prefix, fresh) in enumerate(case.rows):
        bad = [t for t in range(fresh) if rng.random() < 0.3] or [fresh - 1]
        for t in bad if number % 2 == 0 else ():
            case.k[start + t], case.v[start + t] = value, value
            for query in range(fresh):
                low, high = case._window(prefix + query, prefix + fresh)
                sees[start + query] |= low <= prefix + t < high
        start += fresh
    return sees


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("name", CASES)
def test_who_does_not_see_a_token_is_not_touched_by_its_numbers(name, value):
    clean, spoiled = Case(**CASES[name]), Case(**CASES[name])
    sees = spoil(spoiled, value)
    expected, output = clean.run(CpuAttentionBackend), spoiled.run(CpuAttentionBackend)
    assert sees.any() and (not sees.all() or len(clean.rows) == 1)
    torch.testing.assert_close(output[~sees], expected[~sees], atol=0 if kernel.LIBRARY is not None else 1e-5, rtol=0)
    assert value == 3e38 or not output[sees].isfinite().any(), "who sees it says so"


@pytest.mark.parametrize("window", [0, 2, 40])
def test_who_does_not_see_a_token_is_not_touched_with_a_window_or_a_cap_either(window):
    rows = [(0, 150), (70, 90), (33, 20), (33, 7), (5, 2)]
    clean, spoiled = (Case(rows, heads=6, kv_heads=2, shared=[0, 1, 2, 2, 4]) for _ in range(2))
    clean.layer.sliding_window_size = spoiled.layer.sliding_window_size = window
    for cap in (0.0, 1.5):
        clean.layer.logit_cap = spoiled.layer.logit_cap = cap
        sees = spoil(spoiled, float("nan"))
        expected, output = clean.run(CpuAttentionBackend), spoiled.run(CpuAttentionBackend)
        torch.testing.assert_close(output[~sees], expected[~sees], atol=1e-5, rtol=0)
        assert output[sees].isnan().all()


def test_who_does_not_see_a_token_is_not_touched_in_bfloat16_either():
    clean, spoiled = (Case(random_rows((0, 30), (1, 40)), dtype=torch.bfloat16, dim=64) for _ in range(2))
    sees = spoil(spoiled, float("nan"))
    expected, output = clean.run(CpuAttentionBackend), spoiled.run(CpuAttentionBackend)
    torch.testing.assert_close(output[~sees].float(), expected[~sees].float(), atol=3e-2, rtol=3e-2)
    assert output[sees].isnan().all()


def test_the_kernel_leaves_denormal_numbers_alone():
    assert torch.tensor(1e-40).mul(0.5).item() > 0


def test_the_kernel_reads_queries_that_lie_apart():
    case = Case(random_rows((0, 20), (1, 9)))
    expected = case.run(CpuAttentionBackend)
    case.q = torch.cat([case.q, torch.randn_like(case.q)], dim=1)[:, : case.q.shape[1]]
    torch.testing.assert_close(case.run(CpuAttentionBackend), expected, atol=0, rtol=0)
