"""What a run chooses its adapter by."""

import math

import pytest

from sglang.srt.mezo.core.objective import SCORES, is_better, metric_name, metrics_of


@pytest.mark.parametrize("objective", SCORES)
def test_a_metric_is_given_with_or_without_its_prefix(objective):
    for metric in metrics_of(objective):
        assert metric_name(metric) == metric_name(metric.removeprefix("eval_")) == metric


@pytest.mark.parametrize(
    ("metric", "values", "best"), [("eval_loss", [2.0, 1.0, 1.0, 3.0], 1), ("eval_f1", [0.1, 0.4, 0.4], 1)]
)
def test_the_first_of_the_best_is_the_best_and_what_is_no_number_never(metric, values, best):
    for sequence in (values, [math.nan, *values], [*values, math.nan]):
        kept = None
        for place, value in enumerate(sequence):
            if is_better(metric, value, None if kept is None else sequence[kept]):
                kept = place
        assert sequence[kept] == values[best] and kept == sequence.index(values[best])
