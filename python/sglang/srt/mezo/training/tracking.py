"""What a run shows and writes while it goes: progress bar, metrics.jsonl, reports."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.integrity import drop_half_line
from sglang.srt.mezo.training.reporting import Reporter

logger = logging.getLogger(__name__)


class Tracker:
    """Collects the metrics of a run; one line of metrics.jsonl per record.

    Args:
        path: metrics.jsonl; records are appended, in the place of one that a full disk has cut short.
        first_step: step that the run starts or resumes at.
        max_steps: where it ends.
    """

    def __init__(self, config: MezoConfig, path: Path, first_step: int, max_steps: int):
        drop_half_line(path)
        self._file = open(path, "a", encoding="utf-8")
        self._bar = tqdm(
            total=max_steps,
            initial=first_step,
            disable=config.disable_tqdm,
            unit="step",
            desc="MeZO",
            dynamic_ncols=True,
        )
        self._reporter = Reporter.open(config, first_step, max_steps)

    def advance(self, **shown: Any) -> None:
        """Move the bar by one step and show numbers beside it."""
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._reporter is not None:
            self._reporter.log(step, metrics)

    def say(self, line: str) -> None:
        """A line of text above the bar."""
        self._bar.write(line)

    def warn(self, message: str, step: int) -> None:
        """Something that the user should look at, seen at ``step``."""
        logger.warning(message)

    def checkpoint(self, step: int, directory: Path) -> None:
        """A checkpoint has been written."""
        self.say(f"step {step}: saved {directory}")

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        if self._reporter is not None:
            self._reporter.close()


def parse_metrics(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Records of lines of metrics.jsonl; one that is damaged is left out."""
    records = []
    for line in lines:
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            logger.warning("a line of metrics.jsonl is damaged, and left out: %s", error)
    return records
