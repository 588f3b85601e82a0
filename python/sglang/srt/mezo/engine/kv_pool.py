"""KV that nobody may read any more: attention kernels also read places that are free, and multiply what they hold by
0."""

import torch


def erase(pool, places: torch.Tensor) -> None:
    """Write zeros over the keys and values at ``places``, int64 indices of SGLang's KV pool.

    Of the pools that keep them as numbers; those that pack or map them otherwise are left as they are.
    """
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    if type(pool) is SWAKVPool:  # layers with a sliding window have a pool of their own
        erase(pool.full_kv_pool, places)
        erase(pool.swa_kv_pool, pool.translate_loc_from_full_to_swa(places).to(torch.int64))
    elif type(pool) in (MHATokenToKVPool, MLATokenToKVPool):
        for layer in range(pool.start_layer, pool.start_layer + pool.layer_num):
            for buffer in pool.get_kv_buffer(layer):
                (buffer.view(torch.uint8) if buffer.element_size() == 1 else buffer).index_fill_(0, places, 0)
