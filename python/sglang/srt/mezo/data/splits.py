"""What a run trains on, chooses its adapter on and reports: splits of a data set, or rows held out of one,
tokenised."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from sglang.srt.mezo.core.errors import ConfigError, DataError
from sglang.srt.mezo.core.objective import Generation, Objective
from sglang.srt.mezo.core.settings import setting
from sglang.srt.mezo.data.chat import Renderer
from sglang.srt.mezo.data.examples import Encoder, Example, count_shared, default_objective
from sglang.srt.mezo.data.named import TEXT, Named, is_text, named_data
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.selection import NUM_TRAIN, TRAIN, RowArguments, drawn_rows, require_splits
from sglang.srt.mezo.data.streams import TextStream, blocks_of
from sglang.srt.mezo.data.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataArguments(RowArguments):
    """Where examples come from, and how many are used; ConfigError names the field at fault."""

    streaming: bool = setting(
        False,
        "Of whole texts: rows are read as they are needed, in their order, again from the first where they end; "
        "development and test examples are the first of them.",
    )
    pack: bool = setting(
        False,
        "Of whole texts: they follow one another, the EOS token between them, in blocks of max_length tokens; by "
        "default each is cut for itself.",
    )

    def __post_init__(self):
        super().__post_init__()
        for name, done in (("streaming", "streamed"), ("pack", "packed")):
            if getattr(self, name) and not is_text(self.task):
                raise ConfigError(name, True, f"false unless task={TEXT}, as only whole texts can be {done}")
        if self.streaming:
            self._require_streamable()

    def _require_streamable(self) -> None:
        if self.num_train not in (None, NUM_TRAIN):
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
        written: of tests whose completions the model writes itself, while it is trained on given ones.
    """

    train: list[Example] | TextStream
    dev: list[Example]
    test: list[Example]
    known: list[Example]
    objective: Objective
    invocation: tuple[int, ...]
    shared: dict[str, int]
    written: Generation | None = None


def load_splits(
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    invocation: Sequence[int] | None,
    data: DataArguments,
    chat: Renderer | None = None,
    generation: Generation | None = None,
    kind: type[Encoder] = Encoder,
    objective: Objective | None = None,
) -> Splits:
    """Read and tokenise, as ``Encoder`` does. Examples that are in more than one split are counted in a warning.

    Args:
        invocation: None for the chat template's generation prompt.
        objective: where it is not the one that the data suggests.
        kind: of encoder, as the model needs it.

    Raises:
        ConfigError: there is no data set, or it has no splits and one is named; or the prompts end with no common
            generation prompt.
        DataError: names the file and line of the first bad row.
    """
    named = named_data(data.task, data.dataset, data.dataset_config)
    objective = objective or (named.task.objective if named.task else None)
    one_option = objective == "completion"
    encoder = kind(tokenizer, max_length, named.task, invocation or (), chat, generation, one_option)
    if data.pack and tokenizer.eos_token_id is None:
        raise ConfigError("pack", True, "false for a tokenizer without an EOS token, which is to be between texts")
    if data.streaming:
        return _streamed(named, encoder, data)
    rows = drawn_rows(named, data)
    if not rows[0]:
        raise DataError(f"no training row is left beside {len(rows[1])} development rows (num_dev)", named.path)
    written = written_test(named.task, objective) if generation is None else None
    judge = kind(tokenizer, max_length, named.task, invocation or (), chat, written or generation)
    train, dev, test = (
        _encoded(part, of_part, data) if part else [] for part, of_part in zip(rows, (encoder, encoder, judge))
    )
    known = [*train, *dev, *test]
    if invocation is None:
        invocation = generation_prompt(encoder, rows[0], known)
    shared = _shared(train, dev, test, one_option and named.task is not None)
    return Splits(train, dev, test, known, objective or default_objective(train), tuple(invocation), shared, written)


def written_test(task: Task | None, objective: Objective | None) -> Generation | None:
    """How a task's test answers are written that a model learns word for word; None where it chooses."""
    if task is None or task.max_new_tokens is None or objective != "completion":
        return None
    return Generation("f1", None, task.max_new_tokens, 0.0, "\n")


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
    require_splits(named, data)

    def stream(split: str) -> TextStream:
        return TextStream(lambda: named.texts(split), encoder, data.pack, data.on_bad_row)

    train = stream(TRAIN)
    ahead = iter(train)
    dev = [*islice(stream(data.dev_split) if data.dev_split else ahead, data.dev_rows(None))]
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


def _shared(
    train: list[Example], dev: list[Example], test: list[Example], prompts_alone: bool = False
) -> dict[str, int]:
    """Count examples that are in two splits, and warn of them.

    Args:
        prompts_alone: do not look at the options, as not all splits have them.
    """
    if prompts_alone:
        train, dev, test = ([Example(example.prompt) for example in part] for part in (train, dev, test))
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
