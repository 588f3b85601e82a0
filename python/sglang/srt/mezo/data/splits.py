"""What a run trains on, chooses its adapter on and reports: splits of a data set, or rows held out of one,
tokenised."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Optional

from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.objective import Generation, Objective
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.data.chat import Renderer
from sglang.srt.mezo.data.examples import Encoder, Example, OnBadRow, count_shared, default_objective
from sglang.srt.mezo.data.named import TEXT, Named, is_text, named_data
from sglang.srt.mezo.data.rows import SourceRow, has_splits, sample_rows
from sglang.srt.mezo.data.streams import TextStream, blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TRAIN = "train"
_DATA_SEED = 0  # which rows are drawn is the same in every run, as in the MeZO paper
_NUM_TRAIN = 1000


@dataclass(frozen=True)
class DataArguments:
    """Where examples come from, and how many are used; ConfigError names the field at fault."""

    task: Optional[str] = setting(
        None, "Task that renders the rows; text: they are whole texts, in a column text; none for files of prompts."
    )
    dataset: Optional[str] = setting(None, "Hub name, folder or file; the task's own by default.")
    dataset_config: Optional[str] = setting(None, "Configuration of a hub data set; the task's own by default.")
    streaming: bool = setting(
        False,
        "Of whole texts: rows are read as they are needed, in their order, again from the first where they end; "
        "development and test examples are the first of them.",
    )
    max_length: Optional[int] = setting(
        None,
        "Most tokens of an example; the model's context by default. A whole text is cut into blocks of so many; any "
        "other row that is longer is a bad row, as nothing is cut off.",
        at_least=2,
    )
    pack: bool = setting(
        False,
        "Of whole texts: they follow one another, the EOS token between them, in blocks of max_length tokens; by "
        "default each is cut for itself.",
    )
    dev_split: Optional[str] = setting(
        None, "Split to choose the adapter on; held out of train by default, and of a file."
    )
    test_split: Optional[str] = setting(
        None, "Split to report; the task's by default, else held out of train, and of a file."
    )
    num_train: Optional[int] = setting(
        _NUM_TRAIN, "Training rows to use, or none for all, as always of a stream.", at_least=1
    )
    num_dev: int = setting(
        500,
        "Development rows to use; where held out, of what is left at most a fifth. Of a stream, blocks.",
        at_least=0,
    )
    num_test: Optional[int] = setting(
        1000, "Test rows to use, or none for all; where held out, at most a fifth. Of a stream, blocks.", at_least=0
    )
    on_bad_row: OnBadRow = setting("raise", "raise: stop before training; skip: leave the row out.")

    def __post_init__(self):
        require_settings(self)
        for name in ("dev_split", "test_split"):
            split = getattr(self, name)
            if split is not None and {_TRAIN, "all"} & set(re.findall(r"[^\[\]+]+(?=\[|\+|$)", split)):
                raise ConfigError(
                    name,
                    split,
                    f"another split than {_TRAIN}, which is trained on; rows are held out of it where none is named",
                )
        for name, done in (("streaming", "streamed"), ("pack", "packed")):
            if getattr(self, name) and not is_text(self.task):
                raise ConfigError(name, True, f"false unless task={TEXT}, as only whole texts can be {done}")
        if self.streaming:
            self._require_streamable()

    def _require_streamable(self) -> None:
        if self.num_train not in (None, _NUM_TRAIN):
            raise ConfigError("num_train", self.num_train, "none beside streaming: max_steps says how far a run goes")
        if self.num_test is None and self.test_split is None:
            raise ConfigError("num_test", None, "a number beside streaming, as nobody knows how much all is")


@dataclass(frozen=True)
class Splits:
    """Tokenised examples of a run.

    Attributes:
        train: all of them, or a stream.
        known: all three; of a stream its first.
        invocation: tokens from which an activated LoRA adapter acts; none for ordinary LoRA.
        shared: how many examples of a split are in another too, such as {"test in train": 3}; only where there are any.
    """

    train: list[Example] | TextStream
    dev: list[Example]
    test: list[Example]
    known: list[Example]
    objective: Objective
    invocation: tuple[int, ...]
    shared: dict[str, int]


def load_splits(
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    invocation: Sequence[int] | None,
    data: DataArguments,
    chat: Renderer | None = None,
    generation: Generation | None = None,
    kind: type[Encoder] = Encoder,
) -> Splits:
    """Read and tokenise, as ``Encoder`` does. Examples that are in more than one split are counted in a warning.

    Args:
        invocation: None for the chat template's generation prompt.
        kind: of encoder, as the model needs it.

    Raises:
        ConfigError: there is no data set, or it has no splits and one is named; or the prompts end with no common
            generation prompt.
        DataError: names the file and line of the first bad row.
    """
    named = named_data(data.task, data.dataset, data.dataset_config)
    encoder = kind(tokenizer, max_length, named.task, invocation or (), chat, generation)
    if data.pack and tokenizer.eos_token_id is None:
        raise ConfigError("pack", True, "false for a tokenizer without an EOS token, which is to be between texts")
    if data.streaming:
        return _streamed(named, encoder, data)
    rows = _read(named, data)
    train, dev, test = (_encoded(part, encoder, data) if part else [] for part in rows)
    if not train:
        raise DataError("no training row is left", named.path)
    known = [*train, *dev, *test]
    if invocation is None:
        invocation = generation_prompt(encoder, rows[0], known)
    return Splits(train, dev, test, known, default_objective(train), tuple(invocation), _shared(train, dev, test))


def _encoded(rows: list[SourceRow], encoder: Encoder, data: DataArguments) -> list[Example]:
    if not data.pack:
        return encoder.encode_rows(rows, data.on_bad_row)
    blocks = [*blocks_of(rows, encoder, True, data.on_bad_row)]
    if not blocks:
        raise DataError(
            f"{len(rows)} texts together have fewer than max_length={encoder.max_length} tokens", rows[0].source
        )
    return blocks


def _streamed(named: Named, encoder: Encoder, data: DataArguments) -> Splits:
    """A stream to train on, and what it is judged by: the first blocks of other splits, or those before it."""
    _require_splits(named, data)

    def stream(split: str) -> TextStream:
        return TextStream(lambda: named.texts(split), encoder, data.pack, data.on_bad_row)

    train = stream(_TRAIN)
    ahead = iter(train)
    dev = [*islice(stream(data.dev_split) if data.dev_split else ahead, data.num_dev)]
    test = [*islice(stream(data.test_split) if data.test_split else ahead, data.num_test)]
    held_out = sum(len(part) for part, split in ((dev, data.dev_split), (test, data.test_split)) if split is None)
    first = [*islice(ahead, 1)]
    if not first:
        raise DataError(
            f"no block of max_length={encoder.max_length} tokens is left to train on behind the {held_out} of num_dev "
            "and num_test",
            named.path,
        )
    known = [*first, *dev, *test]
    return Splits(train.after(held_out), dev, test, known, "completion", (), _shared([], dev, test))


def generation_prompt(encoder: Encoder, rows: list[SourceRow], examples: list[Example]) -> tuple[int, ...]:
    """The invocation that a chat template gives; ConfigError where the prompts end with no common one."""
    try:
        return encoder.generation_prompt(rows, (example.prompt for example in examples))
    except DataError as error:
        needed = f"the text from which activated LoRA acts, such as ' It was', or --tuning lora, as {error}"
        raise ConfigError("invocation", None, needed) from error


def _require_splits(named: Named, data: DataArguments) -> None:
    if has_splits(named.path):
        return
    for name, count in (("dev_split", "num_dev"), ("test_split", "num_test")):
        if getattr(data, name) is not None:
            raise ConfigError(
                name,
                getattr(data, name),
                f"none for {named.path}, which has no splits: {count} of its rows are held out. "
                f"Or put a file for each split into a folder: {_TRAIN}.jsonl, validation.jsonl, test.jsonl",
            )


def _read(named: Named, data: DataArguments) -> tuple[list[SourceRow], list[SourceRow], list[SourceRow]]:
    """Rows to train on, to choose on and to report."""
    test_split = data.test_split or (named.task.eval_split if named.task and has_splits(named.path) else None)
    _require_splits(named, data)
    train = sample_rows(named.rows(_TRAIN), None, _DATA_SEED)
    if test_split:
        test = sample_rows(named.rows(test_split), data.num_test, _DATA_SEED)
    else:
        train, test = _hold_out(train, data.num_test)
    if data.dev_split:
        dev = sample_rows(named.rows(data.dev_split), data.num_dev, _DATA_SEED)
    else:
        wanted = None if data.num_train is None else data.num_train + data.num_dev
        train, dev = _hold_out(train[:wanted], data.num_dev)
    return train[: data.num_train], dev, test


def _hold_out(rows: list[SourceRow], count: int | None) -> tuple[list[SourceRow], list[SourceRow]]:
    """All but the last ``count`` rows, and those; at most a fifth is held out."""
    most = len(rows) // 5
    kept = len(rows) - (most if count is None else min(count, most))
    return rows[:kept], rows[kept:]


def _shared(train: list[Example], dev: list[Example], test: list[Example]) -> dict[str, int]:
    """Count examples that are in two splits, and warn of them."""
    pairs = {
        "dev in train": (dev, train, "the adapter is chosen on what it has learned"),
        "test in train": (test, train, "the reported figures are in part of what it has learned"),
        "test in dev": (test, dev, "the reported figures are in part of what it was chosen on"),
    }
    shared = {}
    for name, (held_out, others, consequence) in pairs.items():
        if count := count_shared(held_out, others):
            shared[name] = count
            split, _, other = name.split()
            logger.warning(
                "%d of %d %s examples are %s examples too: %s", count, len(held_out), split, other, consequence
            )
    return shared
