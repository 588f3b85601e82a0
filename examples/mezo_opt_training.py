"""Fine-tune an OPT model, or one of another family of docs/models.md, with forward passes only.

    python examples/mezo_opt_training.py                                           # embedded model and task, minutes
    python examples/mezo_opt_training.py --model facebook/opt-125m --task sst2      # the real thing
    python examples/mezo_opt_training.py --model facebook/opt-125m --task sst2 --tuning lora --learning_rate 1e-4

The same as ``sglang-mezo train``, but for a command line that names no model: it gets the repository's own.
"""

import sys
from pathlib import Path
from typing import Any

from sglang.srt.mezo.commands.train import KINDS, end, train
from sglang.srt.mezo.training.arguments import read

ASSETS = Path(__file__).parent / "assets"
MODEL = {"model": str(ASSETS / "opt-reviews"), "dtype": "float32"}
TASK = {"task": "sst2", "dataset": str(ASSETS / "reviews"), "dev_split": "validation", "test_split": "test"}
"""The model and the task that the repository carries: what a command line gets that names none."""
STEPS = {"max_steps": 250}


def completed(given: dict[str, Any]) -> dict[str, Any]:
    """The fields on the command line, and those of what the repository carries where they leave that open."""
    if "model" in given:
        return given
    task = {} if "dataset" in given else TASK
    steps = {} if {"max_steps", "num_train_epochs"} & given.keys() else STEPS
    return MODEL | task | steps | given


if __name__ == "__main__":
    end(lambda: train(completed(read(sys.argv[1:], KINDS, __doc__))))
