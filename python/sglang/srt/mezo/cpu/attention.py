"""Batched attention: through a kernel in C, or on plain PyTorch, a gather of KV and a product per group of rows."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mezo.cpu import kernel
from sglang.srt.mezo.cpu.attention_plan import Group, Row, fresh_tokens, plan
from sglang.srt.mezo.cpu.linear import rounded_rows
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Up to these sizes two batched products are faster than PyTorch's attention kernel, which is made for long queries.
FEW_QUERIES, FEW_KEYS = 32, 256


class CpuAttentionBackend(TorchNativeAttnBackend):
    """Same results as upstream's torch_native backend, which runs one sequence at a time.

    Cross attention, and pools that keep a sliding window apart, stay with upstream's code.
    """

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        # Planned by the first layer: causal or not is known there.
        self._plans: dict[tuple[bool, bool, bool], kernel.Batch | list[Group]] = {}

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if not self._is_batched(layer, forward_batch):
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        if not self._is_batched(layer, forward_batch):
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._attend(q, k, v, layer, forward_batch, save_kv_cache)

    def _is_batched(self, layer: RadixAttention, forward_batch: ForwardBatch) -> bool:
        return not (
            layer.is_cross_attention or forward_batch.encoder_lens is not None or self.use_sliding_window_kv_pool
        )

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        """q: (tokens, heads * dim); k, v: (tokens, kv_heads * dim), or None where the layer reads another's KV.

        Returns (tokens, heads * v_dim).
        """
        fresh = None if k is None or v is None else (k, v)
        if save_kv_cache and fresh is not None:
            place: Any = KVWriteLoc(forward_batch.out_cache_loc, None)  # SGLang's declaration knows tensors alone
            self.token_to_kv_pool.set_kv_buffer(layer, place, *fresh)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        pool = (
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
        )
        batch = None
        if fresh is not None and fresh[0].dtype == pool[0].dtype:
            batch = (
                fresh[0].reshape(-1, layer.tp_k_head_num, layer.qk_head_dim),
                fresh[1].reshape(-1, layer.tp_v_head_num, layer.v_head_dim),
            )
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        rows = rounded_rows(len(query)) + 1  # the next layer runs so many; padding is written to the last
        output = query.new_empty(rows, layer.tp_q_head_num, layer.v_head_dim)
        all_in_pool = save_kv_cache or fresh is None
        in_c = kernel.LIBRARY is not None and all_in_pool and _plain_float32(query, *pool)
        planned = self._plan(forward_batch, causal, batch is None, in_c)
        if isinstance(planned, kernel.Batch):
            planned.attend(
                query, *pool, output, layer.scaling, _window(layer) if causal else None, layer.logit_cap or 0.0
            )
        else:
            for group in planned:
                keys, values = batch if batch is not None and group.fresh else pool
                _attend_group(group, query, keys, values, output, layer, causal)
        return output[: len(query)].view(len(query), -1)

    def _plan(
        self, forward_batch: ForwardBatch, causal: bool, from_pool: bool, in_c: bool
    ) -> kernel.Batch | list[Group]:
        name = (causal, from_pool, in_c)
        if name not in self._plans:
            requests: Any = self.req_to_token_pool
            rows, table = _rows(forward_batch), requests.req_to_token
            self._plans[name] = kernel.Batch(rows, table, causal) if in_c else plan(rows, table, causal, from_pool)
        return self._plans[name]


def _plain_float32(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Laid out as the kernel reads them."""
    plain = query.stride()[1:] == (query.shape[2], 1) and keys.is_contiguous() and values.is_contiguous()
    return plain and all(tensor.dtype == torch.float32 for tensor in (query, keys, values))


def _rows(forward_batch: ForwardBatch) -> list[Row]:
    lengths = (forward_batch.seq_lens if forward_batch.seq_lens_cpu is None else forward_batch.seq_lens_cpu).tolist()
    rows, start = [], 0
    for request, length, new in zip(
        forward_batch.req_pool_indices.tolist(), lengths, fresh_tokens(forward_batch), strict=True
    ):
        rows.append(Row(request, length - new, new, start))
        start += new
    return rows


def _attend_group(
    group: Group,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    layer: RadixAttention,
    causal: bool,
) -> None:
    """Write the group's tokens of `output`, (tokens + 1, heads, v_dim); keys and values are (places, kv_heads, dim)."""
    heads, kv_heads = query.shape[1], keys.shape[1]
    # Rows of single heads are gathered, so that each head's lie together.
    kv_rows = group.rows(group.kv, kv_heads)
    q = _gather(query, group.rows(group.tokens, heads)).view(group.count, heads, group.queries, -1)
    k = _gather(keys, kv_rows).view(group.count, kv_heads, group.keys, -1).to(q.dtype)
    v = _gather(values, kv_rows).view(group.count, kv_heads, group.keys, -1).to(q.dtype)
    window = _window(layer) if causal else None
    hidden = group.hidden(causal, window)
    if layer.logit_cap or (group.queries <= FEW_QUERIES and group.keys <= FEW_KEYS):
        result = _attention(q, k, v, hidden, layer.scaling, layer.logit_cap)
    else:
        mask = group.mask(causal, window, query.dtype)
        result = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=layer.scaling, enable_gqa=heads != kv_heads
        )
    if not result.isfinite().all():
        for bundle in zip(result.unbind(), q.split(1), k.split(1), v.split(1), hidden.split(1), strict=True):
            _attend_apart(*bundle, layer.scaling, layer.logit_cap)
    written = group.rows(group.written(len(output) - 1), heads)
    output.view(-1, output.shape[2]).index_copy_(0, written, result.reshape(-1, output.shape[2]))


def _gather(source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """source: (places, heads, dim); rows: int64, place * heads + head. Returns (rows, dim)."""
    return source.reshape(-1, source.shape[2]).index_select(0, rows)


def _window(layer: RadixAttention) -> int | None:
    """Tokens that a query sees before itself, None for all of them; SGLang has None or -1 for that."""
    size = layer.sliding_window_size
    return None if size is None or size < 0 else size


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scaling: float, cap: float
) -> torch.Tensor:
    """softmax(cap tanh(q k / cap)) v over the keys that are not hidden, without the cap where it is 0.

    q: (count, heads, queries, dim), k, v: (count, kv_heads, keys, dim), hidden: bool (count, 1, queries, keys).
    """
    count, heads, queries, _ = q.shape
    batch, keys = count * k.shape[1], k.shape[2]  # heads that read the same keys and values are taken together
    scores = torch.bmm(q.view(batch, -1, q.shape[3]), k.view(batch, keys, -1).transpose(1, 2)).float().mul_(scaling)
    if cap:
        scores = scores.div_(cap).tanh_().mul_(cap)
    scores = torch.softmax(scores.view(count, heads, queries, keys).masked_fill_(hidden, float("-inf")), -1).to(q.dtype)
    return torch.bmm(scores.view(batch, -1, keys), v.view(batch, keys, -1)).view(count, heads, queries, -1)


def _attend_apart(
    result: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    cap: float,
) -> None:
    """``_attention`` of one bundle into `result`, (heads, queries, dim), where some numbers are infinite or none.

    A weight of 0 times such a value is no number either: who does not see it would be touched by it. Who sees it gets
    none.
    """
    lost = ~v.isfinite().all(-1, keepdim=True)
    # In float32, where a product keeps rows apart (see ``linear.apart``).
    result.copy_(_attention(q.float(), k.float(), v.masked_fill(lost, 0).float(), hidden, scaling, cap)[0])
    seen = (lost[0].transpose(1, 2) & ~hidden[0]).any(-1, keepdim=True)  # (kv_heads, queries, 1)
    result.masked_fill_(seen.repeat_interleave(len(result) // len(seen), 0), float("nan"))
