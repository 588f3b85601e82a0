"""What a server needs to answer under prefixes as PEFT does."""

from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.mezo.engine.held_places import keeps_keys

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

POOL_SHARE = 0.25  # of the KV pool that all served prefixes may have


def why_no_prefixes(scheduler: "Scheduler") -> str | None:
    """Why this server would answer under a prefix wrongly; None where it would not."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    engine: Any = scheduler
    args, pool = engine.server_args, engine.token_to_kv_pool_allocator.get_kvcache()
    needs = {
        "page_size=1": engine.page_size == 1,
        "keys and values of every token in all layers": type(pool) is MHATokenToKVPool,
        "kv_cache_dtype=auto": pool.dtype in (torch.float32, torch.bfloat16, torch.float16),
        "the radix cache": engine.tree_cache.supports_prefix_sharing(),
        "no events or storage of the cache": keeps_keys(engine.tree_cache),
        "no hierarchical cache": not engine.enable_hierarchical_cache,
        "no disaggregation": engine.disaggregation_mode.value == "null",
        "no speculative decoding": engine.spec_algorithm.is_none(),
        "no pipeline parallelism": args.pp_size == 1,
        "no data-parallel attention": not args.enable_dp_attention,
        "a model that generates": engine.is_generation,
    }
    missing = [need for need, is_met in needs.items() if not is_met]
    return f"a server of prefixes needs {', '.join(missing)}" if missing else None
