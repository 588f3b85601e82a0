"""Linear probing (arXiv 2305.17333, LP of tasks with one-token options): logistic regression on what the head reads
where it predicts the option, by Transformers and scikit-learn."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from sglang.srt.mezo.adapters.architectures import is_masked
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.splits import DataArguments, Splits
from sglang.srt.mezo.experiments.first_order import read_splits
from sglang.srt.mezo.experiments.reference import Reference, load_reference
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import ModelArguments
from sglang.srt.mezo.training.memory import MemoryMeter

logger = logging.getLogger(__name__)

_STRENGTHS, _FOLDS, _MAX_ITER, _TOL = 10, 5, 5000, 1e-4  # of the paper's code
_ROWS_TOGETHER = 16


def linear_probing(model: ModelArguments, data: DataArguments, seed: int = 0) -> dict[str, Any]:
    """Fit the regression to the training rows, whose strength of regularisation is chosen by cross-validation, and
    report the test rows. The paper's code puts it into the model's head, which then chooses alike.

    Raises:
        ConfigError: options have several tokens, a class has one training row, or scikit-learn is missing.
        DataError: a row cannot be used.

    Returns:
        What ``first_order`` tells of a run, as far as there is such a thing.
    """
    memory = MemoryMeter()
    with memory.phase("load"):
        regression = _regression_class()
        config, tokenizer = read_checkpoint(model.model)
        splits = read_splits(model, data, config, tokenizer)
        train, test = _examples(splits)
        folds = _folds(train)
        reference = load_reference(model)
    started = time.perf_counter()
    with memory.phase("step"):
        known = _features(reference, train)
        train_tokens, labels = reference.tokens, [_word(example, example.label) for example in train]
        fitted = regression(
            Cs=_STRENGTHS,
            cv=folds,
            solver="lbfgs",
            l1_ratios=(0.0,),  # L2
            fit_intercept=is_masked(config),
            max_iter=_MAX_ITER,
            tol=_TOL,
            scoring="accuracy",
            random_state=seed,
            use_legacy_attributes=False,
        ).fit(known, labels)
    seconds = time.perf_counter() - started
    with memory.phase("evaluation"):
        accuracy = _accuracy(test, fitted.predict(_features(reference, test))) if test else None
    return {
        "accuracy": accuracy,
        "train_accuracy": _accuracy(train, fitted.predict(known)),
        "C": float(fitted.C_),
        "train_seconds": seconds,
        "forward_passes": -(-len(train) // _ROWS_TOGETHER),
        "backward_passes": 0,
        "train_tokens": train_tokens,
        "eval_tokens": reference.tokens - train_tokens,
        "num_trainable_params": fitted.coef_.size + (fitted.intercept_.size if is_masked(config) else 0),
        "shared_examples": splits.shared,
        "peak_rss_bytes": memory.total.host,
        "peak_memory_bytes": memory.to_dict(),
    }


def _regression_class() -> Any:
    try:
        from sklearn.linear_model import LogisticRegressionCV
    except ImportError as error:
        missing = "one that needs no scikit-learn, or pip install 'sglang-mezo[experiments]'"
        raise ConfigError("method", "linear-probing", missing) from error
    return LogisticRegressionCV


def _examples(splits: Splits) -> tuple[list[Example], list[Example]]:
    """To fit and to report."""
    assert isinstance(splits.train, list), "streams are refused"
    examples = [*splits.train, *splits.test]
    if splits.objective != "classification" or any(len(word) > 1 for one in examples for word in one.options):
        raise ConfigError(
            "method", "linear-probing", "head-tuning for a task whose options are not single tokens to classify by"
        )
    return splits.train, splits.test


def _folds(train: Sequence[Example]) -> int:
    """Of the cross-validation: no more than rows of the rarest class."""
    rows = Counter(_word(example, example.label) for example in train)
    rarest = min(rows.values())
    if len(rows) < 2 or rarest < 2:
        raise ConfigError("num_train", len(train), "so many that there are two classes or more, each with two rows")
    if rarest < _FOLDS:
        logger.warning("%d folds instead of %d, as the rarest class has no more rows", rarest, _FOLDS)
    return min(rarest, _FOLDS)


def _features(reference: Reference, examples: Sequence[Example]) -> Any:
    """float64 [examples, width], in NumPy."""
    parts = (examples[start : start + _ROWS_TOGETHER] for start in range(0, len(examples), _ROWS_TOGETHER))
    with torch.no_grad():
        return torch.cat([reference.features(reference.plan(part)) for part in parts]).double().numpy()


def _accuracy(examples: Sequence[Example], words: Sequence[int]) -> float:
    """Share of the examples whose predicted word is a right option."""
    right = [
        word in [_word(example, option) for option in example.right or (example.label,)]
        for example, word in zip(examples, words)
    ]
    return sum(right) / len(right)


def _word(example: Example, option: int) -> int:
    """The token that an option is, by which the paper's code names a class."""
    return example.options[option][0]
