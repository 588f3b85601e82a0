"""The trainer, as Transformers' users know one."""

from collections.abc import Sequence
from functools import partial

from sglang.srt.mezo.core.errors import DataError, UsageError
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.scoring.measures import Measure
from sglang.srt.mezo.training.learner import Learner
from sglang.srt.mezo.training.memory import MemoryMeter
from sglang.srt.mezo.training.reporting import integrations
from sglang.srt.mezo.training.results import TrainResult
from sglang.srt.mezo.training.run import train
from sglang.srt.mezo.training.source import DrawnSource


class MezoTrainer(Learner):
    """Fits an adapter of the engine's model, or the model's own parameters; what it takes, ``Learner`` says.

    Attributes:
        has_begun: whether ``train`` has been called.
    """

    has_begun = False

    def train(self) -> TrainResult:
        """Run to ``max_steps``, write the run directory, keep the best adapter in ``<output_dir>/adapter``, or the best
        model in ``<output_dir>/model``.

        The time of evaluations is not counted as training time.

        Raises:
            UsageError: it has been called before, and theta is where that has left it.
            DataError: there is no example.
        """
        if isinstance(self.source, DrawnSource) and not self.source.plans:
            raise DataError("there is no example to train on")
        if self.has_begun:
            raise UsageError("a trainer trains once: make another one, with resume_from_checkpoint=True to go on")
        self.has_begun = True
        integrations(self.config.report_to)  # before a run directory is begun for nothing
        self.memory = self.memory or MemoryMeter()
        self.scorer.during_prefixes = partial(self.memory.phase, "prefixes")
        return train(self)

    def evaluate(
        self, eval_dataset: Sequence[Example] | None = None, measure: Measure | None = None
    ) -> dict[str, float]:
        """``eval_loss``, and ``eval_accuracy`` where there are options to choose from, of what is trained as it is.

        Args:
            eval_dataset: by default that of the trainer.
            measure: by default what is trained on.

        Raises:
            DataError: there is no example.
        """
        plans = self.eval_plans if eval_dataset is None else self.plan(eval_dataset)
        if not plans:
            raise DataError("there is no example to evaluate")
        return drain(self.evaluation_passes(plans, measure))
