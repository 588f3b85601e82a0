"""What a run trains and where copies of it lie, by the way of tuning; all else goes by the two interfaces."""

import math
from typing import NamedTuple

import torch

from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.adapters.foreign import ForeignAdapter
from sglang.srt.mezo.adapters.peft_adapter import PeftAdapter
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter, PrefixSpec
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.trainable import Trainable
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.layers import adapted_sites
from sglang.srt.mezo.engine.points import Points
from sglang.srt.mezo.engine.prefix_points import PrefixPoints
from sglang.srt.mezo.engine.slots import PerturbedSlots
from sglang.srt.mezo.engine.weight_points import WeightPoints
from sglang.srt.mezo.engine.weights import trained_weights, untrain

Spec = AdapterSpec | WeightsSpec | PrefixSpec


class Trained(NamedTuple):
    """largest: number that theta may hold."""

    trainable: Trainable
    points: Points
    largest: float


def trained(
    handle: EngineHandle,
    config: MezoConfig,
    spec: Spec,
    start: ForeignAdapter | None,
    spare_slots: int,
    kept_tokens: int,
) -> Trained:
    """What ``spec`` describes, in an engine; the arguments are ``Learner``'s, and it raises what that does.

    An engine whose own weights an earlier run has trained gets the checkpoint's back.
    """
    untrain(handle)
    if isinstance(spec, WeightsSpec):
        weights, pieces = trained_weights(handle, spec)
        points = WeightPoints(handle, weights, pieces, config.estimator)
        return Trained(weights, points, torch.finfo(handle.model_runner.dtype).max)
    if isinstance(spec, PrefixSpec):
        assert start is None or isinstance(start, PrefixAdapter), "it is what the spec describes"
        prefix = PrefixAdapter(spec, None if start is None else start.theta)
        seed = config.seed if start is None else None
        points = PrefixPoints(handle, prefix, config.num_perturbations, config.estimator, kept_tokens, seed)
        return Trained(prefix, points, torch.finfo(handle.model_runner.dtype).max)
    assert start is None or isinstance(start, PeftAdapter), "it is what the spec describes"
    sites = adapted_sites(handle, spec.target_modules)
    adapter = (
        Adapter.initial(spec, sites, config.seed) if start is None else Adapter.holding(spec, sites, start.matrices)
    )
    slots = PerturbedSlots(handle, adapter, config.num_perturbations, config.estimator, spare_slots)
    return Trained(adapter, slots, _largest_weight(spec, handle.model_runner.dtype))


def _largest_weight(spec: AdapterSpec, dtype: torch.dtype) -> float:
    """Of an adapter whose layers can still give finite numbers: products of two weights, scaled, are finite in
    float32."""
    return min(torch.finfo(dtype).max, math.sqrt(torch.finfo(torch.float32).max / spec.lora_alpha))
