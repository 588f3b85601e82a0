"""Which rows of a packed batch go through attention together, decided once per forward.

Rows that start from the very same cached tokens (signs and directions of a step over one prompt, options of one
example) become one bundle: its keys are the shared prefix, once, and then the fresh tokens of every member. Bundles of
similar size are padded into a group, and a group costs each layer one gather of KV and one product.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Gathering one key costs about as much as this many query-key pairs (64 dimensions a head).
PAIRS_PER_KEY = 8
# The calls of one more group cost about as much as this many pairs.
GROUP_COST = 1024
# Padding multiplies the cost of a group by no more than this, beyond what one more group would cost.
PADDING_LIMIT = 1.5
# Causal rows longer than this are cut: a later piece finds the earlier ones in the pool, as its prefix.
MAX_FRESH = 512

_SHARED = -1  # key that every member of a bundle sees
_PADDING = -2


def fresh_tokens(forward_batch: "ForwardBatch") -> list[int]:
    """How many tokens each request of a batch runs."""
    mode = forward_batch.forward_mode
    if mode.is_idle():
        return []
    if mode.is_decode():
        return [1] * forward_batch.batch_size
    assert forward_batch.extend_seq_lens_cpu is not None, "a batch that extends says by how much"
    return [int(length) for length in forward_batch.extend_seq_lens_cpu]


@dataclass(frozen=True)
class Row:
    """Fresh tokens start .. start + fresh of the batch; `prefix` tokens of request row `request` come before them."""

    request: int
    prefix: int
    fresh: int
    start: int


@dataclass(frozen=True)
class Bundle:
    """Rows with one and the same prefix; ``queries`` are their fresh tokens."""

    rows: tuple[Row, ...]
    queries: int

    @classmethod
    def of(cls, row: Row) -> "Bundle":
        return cls((row,), row.fresh)

    def with_row(self, row: Row) -> "Bundle":
        return Bundle((*self.rows, row), self.queries + row.fresh)

    @property
    def prefix(self) -> int:
        return self.rows[0].prefix

    @property
    def keys(self) -> int:
        return self.prefix + self.queries

    @property
    def cost(self) -> int:
        return pairs(self.queries, self.keys)


def pairs(queries: int, keys: int) -> int:
    """Cost of attention over one bundle, in query-key pairs."""
    return (queries + PAIRS_PER_KEY) * keys


@dataclass
class Group:
    """Bundles padded to one shape: count bundles, `queries` queries and `keys` keys each.

    tokens: int64 (count, queries), the batch's token of every query; padding repeats token 0.
    kv: int64 (count, keys), where a key lies: in the pool, or in the batch's own k and v where `fresh` is set.
    """

    count: int
    queries: int
    keys: int
    tokens: torch.Tensor
    kv: torch.Tensor
    fresh: bool
    _query_row: np.ndarray
    _query_position: np.ndarray
    _key_row: np.ndarray
    _key_position: np.ndarray
    _masks: dict[tuple, torch.Tensor] = field(default_factory=dict)
    _rows: dict[tuple, torch.Tensor] = field(default_factory=dict)
    _written: torch.Tensor | None = None

    def rows(self, places: torch.Tensor, heads: int) -> torch.Tensor:
        """Rows of (places, heads) tensors, head after head: int64 (count * heads * n,) for `places` (count, n) of
        this group."""
        name = (id(places), heads)
        if name not in self._rows:
            self._rows[name] = (places[:, None, :] * heads + torch.arange(heads)[:, None]).view(-1)
        return self._rows[name]

    def written(self, padding: int) -> torch.Tensor:
        """`tokens`, with padding going to another place."""
        if self._written is None:
            self._written = self.tokens.masked_fill(torch.from_numpy(self._query_row == _PADDING), padding)
        return self._written

    def hidden(self, causal: bool, window: int | None) -> torch.Tensor:
        """bool (count, 1, queries, keys): which keys a query does not see.

        A query sees the shared prefix and its own row, up to itself if causal, and `window` tokens back if given.
        """
        name = (causal, window)
        if name not in self._masks:
            self._masks[name] = torch.from_numpy(~self._visible(causal, window))[:, None]
        return self._masks[name]

    def mask(self, causal: bool, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """(count, 1, queries, keys): 0 where the query sees the key, -inf elsewhere."""
        name = (causal, window, dtype)
        if name not in self._masks:
            hidden = self.hidden(causal, window)
            self._masks[name] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return self._masks[name]

    def _visible(self, causal: bool, window: int | None) -> np.ndarray:
        key_row, key_position = self._key_row[:, None, :], self._key_position[:, None, :]
        query_row, query_position = self._query_row[:, :, None], self._query_position[:, :, None]
        visible = (key_row == _SHARED) | (key_row == query_row)
        if causal:
            visible &= key_position <= query_position
        if window is not None:
            visible &= key_position >= query_position - window
        # A padding query must see something, or its softmax is 0 / 0.
        visible[:, :, 0] |= self._query_row == _PADDING
        return visible


def plan(rows: Sequence[Row], req_to_token: torch.Tensor, causal: bool, from_pool: bool = False) -> list[Group]:
    """Groups that cover every fresh token of `rows` once.

    req_to_token: int32 (requests, context), the pool's index of every token of a request.
    from_pool: read fresh keys from the pool too, for layers that do not bring their own.
    """
    table = req_to_token.numpy()
    if causal:
        rows = cut_rows(rows, MAX_FRESH)
    bundles = bundle_rows(rows, table, _cheaper) if causal else [Bundle.of(row) for row in rows]
    return [_build(group, table, from_pool) for group in _group(bundles)]


def cut_rows(rows: Sequence[Row], most: int) -> list[Row]:
    """Causal rows in pieces of up to `most` fresh tokens."""
    return [
        Row(row.request, row.prefix + at, min(most, row.fresh - at), row.start + at)
        for row in rows
        for at in range(0, row.fresh, most)
    ]


def bundle_rows(
    rows: Sequence[Row], table: np.ndarray, worth_it: Callable[[Bundle, Bundle, Bundle], bool]
) -> list[Bundle]:
    """Join rows of one prefix as long as `worth_it(joined, one, other)`."""
    bundles: list[Bundle] = []
    last_with_prefix: dict[bytes, int] = {}
    for row in rows:
        single = Bundle.of(row)
        prefix = table[row.request, : row.prefix].tobytes()
        at = last_with_prefix.get(prefix) if prefix else None
        if at is not None and worth_it(joined := bundles[at].with_row(row), bundles[at], single):
            bundles[at] = joined
        else:
            last_with_prefix[prefix] = len(bundles)
            bundles.append(single)
    return bundles


def _cheaper(joined: Bundle, one: Bundle, other: Bundle) -> bool:
    """Every member pays for the others' fresh tokens."""
    return joined.cost <= one.cost + other.cost


def _group(bundles: Sequence[Bundle]) -> list[list[Bundle]]:
    """Neighbours in size share a group while that costs less than one group more."""
    groups: list[list[Bundle]] = []
    queries = keys = padded = real = 0
    # Groups without any prefix read the batch's own k and v, so they stay apart.
    for bundle in sorted(bundles, key=lambda b: (b.prefix > 0, b.queries.bit_length(), b.keys)):
        widest, longest = max(queries, bundle.queries), max(keys, bundle.keys)
        if groups and (groups[-1][0].prefix > 0) == (bundle.prefix > 0):
            joined = (len(groups[-1]) + 1) * pairs(widest, longest)
            limit = min(padded + bundle.cost, PADDING_LIMIT * (real + bundle.cost))
            if joined <= limit + GROUP_COST:
                groups[-1].append(bundle)
                queries, keys, padded, real = widest, longest, joined, real + bundle.cost
                continue
        groups.append([bundle])
        queries, keys, padded, real = bundle.queries, bundle.keys, bundle.cost, bundle.cost
    return groups


def _build(bundles: Sequence[Bundle], table: np.ndarray, from_pool: bool) -> Group:
    count = len(bundles)
    queries, keys = max(b.queries for b in bundles), max(b.keys for b in bundles)
    tokens = np.zeros((count, queries), np.int64)
    kv = np.zeros((count, keys), np.int64)
    query_row, key_row = np.full((count, queries), _PADDING), np.full((count, keys), _PADDING)
    query_position, key_position = np.zeros((count, queries), np.int64), np.zeros((count, keys), np.int64)
    fresh = not from_pool and all(b.prefix == 0 for b in bundles)
    for i, bundle in enumerate(bundles):
        prefix = bundle.prefix
        kv[i, :prefix] = table[bundle.rows[0].request, :prefix]
        key_row[i, :prefix] = _SHARED
        key_position[i, :prefix] = np.arange(prefix)
        at = 0
        for row in bundle.rows:
            query, key = slice(at, at + row.fresh), slice(prefix + at, prefix + at + row.fresh)
            positions = np.arange(prefix, prefix + row.fresh)
            tokens[i, query] = np.arange(row.start, row.start + row.fresh)
            kv[i, key] = tokens[i, query] if fresh else table[row.request, prefix : prefix + row.fresh]
            query_row[i, query] = key_row[i, key] = row.start
            query_position[i, query] = key_position[i, key] = positions
            at += row.fresh
    return Group(
        count=count,
        queries=queries,
        keys=keys,
        tokens=torch.from_numpy(tokens),
        kv=torch.from_numpy(kv),
        fresh=fresh,
        _query_row=query_row,
        _query_position=query_position,
        _key_row=key_row,
        _key_position=key_position,
    )
