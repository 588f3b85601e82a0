"""Prefixes of the base model over a run: which examples' are in the KV pool at a time, and how they come back after
a restart."""

from collections.abc import Sequence

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.passes import Passes
from sglang.srt.mezo.core.tokens import distinct_tokens
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.points import Points
from sglang.srt.mezo.scoring.plan import ExamplePlan, PrefixScope
from sglang.srt.mezo.scoring.scorer import Scorer
from sglang.srt.mezo.training.source import Source

_POOL_SHARE = 0.75  # of the KV pool that prefixes of all examples may fill; a batch and other prefixes need the rest


def window_of(handle: EngineHandle, scorer: Scorer, plans: Sequence[ExamplePlan], kept_tokens: int) -> int | None:
    """Examples whose prefixes are kept at a time; None where the pool has room for all.

    Args:
        kept_tokens: most KV tokens that stay locked between steps.
    """
    prefixes = {row.prefix for plan in plans for row in plan.rows}
    room = _POOL_SHARE * handle.kv_capacity
    if not scorer.prefix_reuse or sum(map(len, prefixes)) <= room or (tokens := distinct_tokens(prefixes)) <= room:
        return None
    return max(1, int(kept_tokens / tokens * len(plans)))


class PrefixWindow:
    """Gives up the prefixes of one part of the examples when the steps come to the next."""

    def __init__(self, handle: EngineHandle, config: MezoConfig, scorer: Scorer, source: Source):
        self._handle = handle
        self._config = config
        self._scorer = scorer
        self._source = source
        self._in_pool: object = None

    def enter(self, step: int) -> None:
        """Give up the prefixes of the window before, if ``step`` is in another."""
        window = self._source.window_of(step)
        if window != self._in_pool:
            self._in_pool = window
            self._scorer.base_prefixes.release()

    def restore(self, steps: int, dev: Sequence[ExamplePlan], points: Points) -> Passes[None]:
        """Compute base-model prefixes in the batches in which the first ``steps`` steps met them.

        KV differs in its last bits between batches, and a long run magnifies that: with this a run that goes on in a
        new engine ends as the whole run would have. Nothing to do where the pool cannot hold them all.
        """
        if not self._scorer.prefix_reuse or self._scorer.scope is not PrefixScope.BASE:
            return
        tokens = sum(map(len, {row.prefix for plan in [*dev, *self._source.plans] for row in plan.rows}))
        if not self._handle.broadcast(tokens <= self._handle.free_kv_tokens):
            return
        size = self._config.per_device_eval_batch_size
        for start in range(0, len(dev), size):
            yield from self._scorer.prefix_passes(dev[start : start + size], [(points.current,)])
        for batch in self._source.first_batches(steps):
            yield from self._scorer.prefix_passes(batch, points.rounds(self._config.num_perturbations)[0].groups)
