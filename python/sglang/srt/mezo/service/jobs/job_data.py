"""From a job's files, and the rows that it was given later, to examples. The same rows give the same examples every
time."""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.core.atomic import atomic_file, sync, sync_names
from sglang.srt.mezo.core.config import MOST_PASS_TOKENS, MezoConfig, Tuning
from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.core.integrity import require_sums, write_sums_of
from sglang.srt.mezo.core.objective import SCORES, Objective
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.examples import Encoder, Example, count_shared, default_objective
from sglang.srt.mezo.data.invocation import AUTO, invocation_setting, invocation_tokens
from sglang.srt.mezo.data.rows import SourceRow, read_jsonl
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription
from sglang.srt.mezo.service.wire.packed import MAX_EXAMPLES, MAX_TOKENS, size
from sglang.srt.mezo.service.wire.records import StoredJob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# All options of an example run in one forward pass, in which a request waits no longer than in one of SGLang's own.
MAX_OPTIONS = 128
MAX_ROW_BYTES = 4 << 20

_ROWS_TOGETHER = 256  # are tokenised at a time


def shared_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """A copy that threads can share. What another user of ``tokenizer`` sets would be an error in the midst of a
    call."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer("Settles truncation and padding, which no later call changes.")
    return tokenizer


RowExample = tuple[SourceRow, Example]


@dataclass(frozen=True)
class SourceFile:
    """``path``: where its content lies. ``name``: what its user calls it."""

    path: Path
    name: str


@dataclass(frozen=True)
class JobData:
    """Tokenised examples of a job's files.

    Attributes:
        shared: how many of those to evaluate on are in the training file too.
        invocation: where the job leaves it open, what the rows suggest, or why they suggest none.
    """

    train: list[Example]
    evaluation: list[Example]
    objective: Objective
    shared: int = 0
    invocation: str | list[int] | DataError | None = None


class JobReader:
    """Reads and tokenises what jobs train on. Its methods block, for minutes where a file is large. It can be pickled.

    Args:
        tokenizer: from ``shared_tokenizer``.
        engine: bounds what an example may take.
        chat: how the server renders messages.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", engine: EngineDescription, chat: ChatSettings):
        self._made_with = tokenizer, engine, chat
        self._tokenizer = tokenizer
        self._chat = ChatRenderer(tokenizer, chat)
        self._max_length = engine.context_length
        self._max_pass_tokens = min(engine.kv_capacity, max(MOST_PASS_TOKENS, 2 * engine.context_length))

    def __reduce__(self) -> tuple[Any, ...]:
        return JobReader, self._made_with

    def read(self, job: StoredJob, training_file: SourceFile, validation_file: SourceFile | None) -> JobData:
        """Examples of the training and the validation file.

        Raises:
            RequestError: naming the file, line and reason of the first row that cannot be used.
        """
        settings = job.settings
        is_open = settings.invocation == AUTO
        tuning, invocation = settings.tuning, () if is_open else self.invocation(job)
        read = partial(self._read_file, settings, invocation=invocation)
        train = read(training_file, "training_file")
        evaluation = read(validation_file, "validation_file") if validation_file else []
        found = None
        if is_open:
            tuning, invocation, found = self._suggested([*train, *evaluation])
        planner = Planner(tuning, invocation)
        train, objective = self._checked(train, "training_file", planner, settings.objective)
        evaluation, _ = self._checked(evaluation, "validation_file", planner, objective)
        return JobData(train, evaluation, objective, count_shared(evaluation, train), found)

    def encode(self, job: StoredJob, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        """Examples of rows in a request.

        Raises:
            RequestError: naming the first row that cannot be used, or there are more than go into one request.
        """
        sources = [SourceRow(row, "rows", number) for number, row in enumerate(rows)]
        try:
            examples = self._encode(job, sources)
        except DataError as error:
            raise RequestError(
                400, f"rows[{error.line}]: {error.reason}", f"rows.{error.line}", "invalid_row"
            ) from error
        tokens = sum(map(size, examples))
        if len(examples) > MAX_EXAMPLES or tokens > MAX_TOKENS:
            raise RequestError(
                400,
                f"rows of {len(examples)} examples and {tokens} tokens are too many for one request: "
                f"at most {MAX_EXAMPLES} examples and {MAX_TOKENS} tokens",
                "rows",
                "too_many_rows",
            )
        return examples

    def encode_file(self, job: StoredJob, path: Path) -> list[Example]:
        """Examples of a file that ``AppendedRows`` wrote; DamagedError where it is not as it was written."""
        require_sums(path.parent, [path.name], _sums(path))
        return self._encode(job, list(read_jsonl(path, path.name)))

    def invocation(self, job: StoredJob) -> tuple[int, ...]:
        """Tokens from which the job's adapter acts; none for what acts on every token."""
        settings = job.settings
        if settings.tuning != "alora":
            return ()
        assert settings.invocation is not None, "activated LoRA has one (``resolve``)"
        return invocation_tokens(settings.invocation, self._tokenizer)

    def _read_file(
        self, settings: MezoConfig, file: SourceFile, param: str, invocation: tuple[int, ...]
    ) -> list[RowExample]:
        with _names(param):
            rows = list(read_jsonl(file.path, file.name, MAX_ROW_BYTES))
            if not rows:
                raise DataError("no row", file.name)
            return self._tokenised(rows, settings, invocation)

    def _suggested(self, encoded: Sequence[RowExample]) -> tuple[Tuning, tuple[int, ...], str | list[int] | DataError]:
        """How an adapter acts that leaves it open: from the chat template's generation prompt on, or else on every
        token."""
        encoder = Encoder(self._tokenizer, self._max_length, chat=self._chat)
        try:
            tokens = encoder.generation_prompt((row for row, _ in encoded), (example.prompt for _, example in encoded))
        except DataError as error:
            return "lora", (), error
        return "alora", tokens, invocation_setting(tokens, self._tokenizer)

    def _encode(self, job: StoredJob, rows: Sequence[SourceRow]) -> list[Example]:
        """Examples of a job whose files have been read."""
        invocation = self.invocation(job)
        encoded = self._tokenised(rows, job.settings, invocation)
        examples, _ = self._usable(encoded, Planner(job.settings.tuning, invocation), job.settings.objective)
        return examples

    def _tokenised(
        self, rows: Sequence[SourceRow], settings: MezoConfig, invocation: tuple[int, ...]
    ) -> list[RowExample]:
        """Each row with its examples, in order; raises DataError at the first that has none."""
        longest = self._max_length - (settings.num_virtual_tokens or 0)
        encoder = Encoder(
            self._tokenizer, longest, invocation=invocation, chat=self._chat, generation=settings.generation
        )
        encoded = []
        for start in range(0, len(rows), _ROWS_TOGETHER):
            together = rows[start : start + _ROWS_TOGETHER]
            few = list(itertools.takewhile(_has_few_options, together))
            for row, outcome in zip(few, encoder.encode_each(few)):
                if isinstance(outcome, DataError):
                    raise outcome
                encoded += [(row, example) for example in outcome]
            if len(few) < len(together):
                row = together[len(few)]
                raise DataError(
                    f"{len(row.fields['options'])} options are too many: at most {MAX_OPTIONS}", row.source, row.line
                )
        return encoded

    def _checked(
        self, encoded: Sequence[RowExample], param: str, planner: Planner, objective: Objective | None
    ) -> tuple[list[Example], Objective]:
        with _names(param):
            return self._usable(encoded, planner, objective)

    def _usable(
        self, encoded: Sequence[RowExample], planner: Planner, objective: Objective | None
    ) -> tuple[list[Example], Objective]:
        """Examples, and the objective that they suggest where the job names none."""
        examples = [example for _, example in encoded]
        objective = objective or default_objective(examples)
        for row, example in encoded:
            self._require_one_pass(planner, example, row)
            if "accuracy" in SCORES[objective] and len(example.options) < 2:
                reason = f"one option leaves nothing to choose from, which {objective} needs"
                raise DataError(reason, row.source, row.line)
        return examples, objective

    def _require_one_pass(self, planner: Planner, example: Example, row: SourceRow) -> None:
        if 2 * (len(example.options) * len(example.prompt) + size(example)) <= self._max_pass_tokens:
            return  # were nothing shared, it would be within it
        plan = planner.plan(example)
        tokens = 2 * plan.slot_tokens + sum(map(len, {row.prefix for row in plan.rows}))
        if tokens > self._max_pass_tokens:
            taken = f"its {len(example.options)} options take {tokens} tokens in one forward pass"
            raise DataError(f"{taken}, and at most {self._max_pass_tokens} go into one", row.source, row.line)


@contextmanager
def _names(param: str) -> Iterator[None]:
    """A bad row is an error of the field that names its file."""
    try:
        yield
    except DataError as error:
        raise RequestError(400, str(error), param, f"invalid_{param}") from error


def _has_few_options(row: SourceRow) -> bool:
    """To be asked before they are tokenised, each with its prompt."""
    options = row.fields.get("options")
    return not isinstance(options, list) or len(options) <= MAX_OPTIONS


class AppendedRows:
    """Rows that a job was given after its creation: a file for each request, in the order in which they came."""

    def __init__(self, job_directory: Path):
        self._directory = job_directory

    def files(self) -> list[Path]:
        return sorted((path for path in self._directory.glob("appended-*.jsonl") if _is_numbered(path)), key=_number)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write a file that is on disk, whole, when this returns; where it raises OSError, there is none."""
        self._directory.mkdir(parents=True, exist_ok=True)
        last = _number(files[-1]) if (files := self.files()) else 0
        path = self._directory / f"appended-{last + 1}.jsonl"
        try:
            with atomic_file(path) as partial:
                partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                write_sums_of({path.name: partial}, self._directory / _sums(path))  # there before the rows are
                sync(partial)
                sync(self._directory / _sums(path))
            sync_names(self._directory)
            sync_names(self._directory.parent)
        except BaseException:
            self.drop(path)
            raise
        finally:
            partial.unlink(missing_ok=True)
        return path

    def drop(self, path: Path) -> None:
        """Delete a file that was not taken."""
        (self._directory / _sums(path)).unlink(missing_ok=True)  # first, as it must not meet another file of that name
        path.unlink(missing_ok=True)


def _sums(path: Path) -> str:
    return f"{path.stem}.sha256"


def _is_numbered(path: Path) -> bool:
    return path.stem.removeprefix("appended-").isdecimal()


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("appended-"))
