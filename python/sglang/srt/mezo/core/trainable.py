"""What a run trains: a flat vector of numbers, what they are, and their files."""

from pathlib import Path
from typing import Protocol

import torch

from sglang.srt.mezo.core.noise import Shape


class Trainable(Protocol):
    """``theta`` is the master copy, float32 [numel]; it is changed in place."""

    @property
    def theta(self) -> torch.Tensor: ...

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of the matrices and vectors in ``theta``."""
        ...

    def save_pretrained(self, directory: Path) -> None:
        """Write a folder that others load; it appears whole or not at all.

        Raises:
            OSError: the disk is full or the path cannot be written; an older folder of that name is then untouched.
        """
        ...

    def load_weights(self, directory: Path) -> None:
        """Fill ``theta`` from a folder that ``save_pretrained`` wrote.

        Raises:
            DamagedError: the folder or a file in it is gone, or not as it was written.
            ConfigError: it is of something else.
        """
        ...

    def save_initial(self, run: Path) -> None:
        """Keep in a run's folder what its log starts from, but for what the base model has."""
        ...

    def resume_initial(self, run: Path) -> None:
        """Fill ``theta``, which is as it was made, with what the log starts from; raises what ``load_weights`` does."""
        ...

    def load_initial(self, run: Path) -> None:
        """The same, whatever ``theta`` is by now."""
        ...
