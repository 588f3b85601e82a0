"""From files and hub data sets to tokenised examples.

Rows come as a task's columns, or in one of the free forms ``{"prompt", "completion"}``, ``{"messages"}``,
``{"prompt", "options", "label"}`` and ``{"text"}``. A bad row is reported with its file, line and reason.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sglang.srt.mezo.config import Objective
from sglang.srt.mezo.errors import DataError, shown
from sglang.srt.mezo.invocation import invocation_start
from sglang.srt.mezo.tasks import TASKS, Task, TextExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

OnBadRow = Literal["raise", "skip"]


@dataclass(frozen=True)
class Example:
    """A tokenised row: ``options[i]`` continues ``prompt``; ``label`` is the index of the right option."""

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...]
    label: int


@dataclass(frozen=True)
class SourceRow:
    """A raw row and where it came from."""

    fields: Mapping[str, Any]
    source: str
    line: int


def read_rows(path: str, split: str, task: Task | None = None) -> list[SourceRow]:
    """Read one split of a local file, a local folder or a hub data set.

    Args:
        path: a ``.jsonl`` or ``.txt`` file (the split is then the whole file), a folder with ``<split>.jsonl``, or
            anything that ``datasets.load_dataset`` takes.
        split: name of the split.
        task: supplies the configuration of a hub data set.

    Raises:
        DataError: nothing can be read there, or a line is not JSON.
    """
    local = Path(path)
    if local.is_dir() and (local / f"{split}.jsonl").is_file():
        local = local / f"{split}.jsonl"
    if local.suffix == ".txt" and local.is_file():
        return list(_read_lines(local))
    if local.suffix == ".jsonl" and local.is_file():
        return list(read_jsonl(local, str(local)))
    if local.suffix in (".jsonl", ".txt"):
        raise DataError("no such file", str(local))
    return _read_with_datasets(path, split, task)


def _read_lines(path: Path) -> Iterator[SourceRow]:
    """A row for every line that is not blank, as the "text" reader of ``datasets`` does."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error}", str(path)) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield SourceRow({"text": line}, str(path), number)


def read_jsonl(path: Path, source: str, max_line_bytes: int = sys.maxsize - 1) -> Iterator[SourceRow]:
    """Rows of a file of JSON lines, whatever its name; ``source`` is what messages call it.

    Raises:
        DataError: a line is longer than ``max_line_bytes``.
    """
    with open(path, "rb") as file:  # json decodes each line, so that bytes that are no text are an error of their line
        for number, line in enumerate(iter(partial(file.readline, max_line_bytes + 1), b""), 1):
            if len(line) > max_line_bytes:
                raise DataError(f"the line is longer than {max_line_bytes} bytes", source, number)
            if line.strip():
                yield SourceRow(_parse_line(line), source, number)


def _parse_line(line: bytes) -> Mapping[Any, Any]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        return {_BROKEN: f"not JSON: {error}"}
    if not isinstance(fields, dict):
        return {_BROKEN: f"a JSON object is needed, not {type(fields).__name__}"}
    return fields


_BROKEN = object()  # no key that a row could have


def _read_with_datasets(path: str, split: str, task: Task | None) -> list[SourceRow]:
    import datasets

    arguments = (path, *task.dataset[1:]) if task is not None and path == task.dataset[0] else (path,)
    try:
        rows = datasets.load_dataset(*arguments, split=split)
    except Exception as error:  # datasets raises a different type for every way in which a path can be wrong
        raise DataError(f"cannot load split {split!r}: {error}", path) from error
    return [SourceRow(row, f"{path}[{split}]", number) for number, row in enumerate(rows, 1)]


class Encoder:
    """Turns rows into examples for one tokenizer.

    Args:
        tokenizer: the model's; its special tokens are added to prompts as it does by itself.
        max_length: most tokens of a sequence, prompt and option together.
        task: renders the rows; without one they must have one of the free forms.
        invocation: token ids that every prompt must hold; empty where none are needed.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        task: Task | None = None,
        invocation: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.task = task
        self.invocation = tuple(invocation)

    def encode_rows(self, rows: Sequence[SourceRow], on_bad_row: OnBadRow = "raise") -> list[Example]:
        """Tokenise all rows. A bad one raises DataError, or is logged and left out with ``on_bad_row="skip"``."""
        examples = []
        for row in rows:
            try:
                examples += self.encode(row.fields)
            except (DataError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
                problem = DataError(_reason(error), row.source, row.line)
                if on_bad_row == "raise":
                    raise problem from error
                logger.warning("skipped %s", problem)
        if not examples:
            source = rows[0].source if rows else "data set"
            raise DataError("no usable row", source)
        return examples

    def encode(self, fields: Mapping[str, Any]) -> list[Example]:
        """Tokenise one row; a long text becomes several examples."""
        if _BROKEN in fields:
            raise DataError(fields[_BROKEN])
        if self.task is not None:
            return [self._encode_text(self.task.render(fields))]
        for needed, encode in self._forms:
            if needed <= fields.keys():
                return encode(self, fields)
        forms = ", ".join("{" + ", ".join(sorted(needed)) + "}" for needed, _ in self._forms)
        raise DataError(f"columns {shown(sorted(fields))} have none of the forms {forms}")

    def _encode_options(self, fields: Mapping[str, Any]) -> list[Example]:
        _require_text("prompt", fields["prompt"])
        options = fields["options"]
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise DataError(f"options={shown(options)} must be a list of strings")
        for option in options:
            _require_unicode("options", option)
        return [self._encode_text(TextExample(fields["prompt"], tuple(options), fields["label"]))]

    def _encode_completion(self, fields: Mapping[str, Any]) -> list[Example]:
        _require_text("prompt", fields["prompt"])
        _require_text("completion", fields["completion"])
        return [self._with_end(self._encode_text(TextExample(fields["prompt"], (fields["completion"],), 0)))]

    def _encode_messages(self, fields: Mapping[str, Any]) -> list[Example]:
        messages = fields["messages"]
        if not isinstance(messages, list) or len(messages) < 2 or not _is_answer(messages[-1]):
            raise DataError("messages must be a list of two or more that ends with an assistant message")
        for number, message in enumerate(messages[:-1]):
            _require_message(f"messages[{number}]", message)
        _require_text("messages[-1].content", messages[-1].get("content"))
        if self.tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template, which messages need")
        prompt = self._render_chat(messages[:-1], add_generation_prompt=True)
        full = self._render_chat(messages, add_generation_prompt=False)
        if not full.startswith(prompt):
            raise DataError("the chat template writes the last message differently than its generation prompt announces")
        ids = self.tokenizer(prompt, add_special_tokens=False).input_ids
        answer = self.tokenizer(full[len(prompt) :], add_special_tokens=False).input_ids
        return [self._checked(Example(tuple(ids), (tuple(answer),), 0))]

    def _render_chat(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        except TemplateError as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error

    def _encode_plain_text(self, fields: Mapping[str, Any]) -> list[Example]:
        _require_text("text", fields["text"])
        ids = self.tokenizer(fields["text"]).input_ids
        if len(ids) < 2:
            raise DataError("a text needs two tokens or more, one to start from and one to predict")
        blocks = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [self._checked(Example(tuple(block[:1]), (tuple(block[1:]),), 0)) for block in blocks if len(block) > 1]

    _forms: Sequence[tuple[set[str], Callable[["Encoder", Mapping[str, Any]], list[Example]]]] = (
        ({"prompt", "options", "label"}, _encode_options),
        ({"prompt", "completion"}, _encode_completion),
        ({"messages"}, _encode_messages),
        ({"text"}, _encode_plain_text),
    )

    def _encode_text(self, text: TextExample) -> Example:
        if not text.options or not all(text.options):
            raise DataError(f"options={shown(list(text.options))}: at least one is needed, and none may be empty")
        if not isinstance(text.label, int) or isinstance(text.label, bool) or not 0 <= text.label < len(text.options):
            raise DataError(f"label={shown(text.label)} must be an index of the {len(text.options)} options")
        prompt = self.tokenizer(text.prompt).input_ids
        if not prompt:
            raise DataError("the prompt has no tokens")
        if len(prompt) >= self.max_length:  # before every option is tokenised together with it
            raise DataError(f"a prompt of {len(prompt)} tokens and an option are more than the context of {self.max_length}")
        options = tuple(tuple(self._continuation(text.prompt, prompt, option)) for option in text.options)
        return self._checked(Example(tuple(prompt), options, text.label))

    def _continuation(self, prompt_text: str, prompt: list[int], option: str) -> list[int]:
        """Tokens of ``option`` as they follow ``prompt``, even where the tokenizer would merge across the border."""
        joint = self.tokenizer(prompt_text + option).input_ids
        if joint[: len(prompt)] == prompt and len(joint) > len(prompt):
            return joint[len(prompt) :]
        return self.tokenizer(option, add_special_tokens=False).input_ids

    def _with_end(self, example: Example) -> Example:
        """A completion is learned with its end, as TRL does."""
        end = self.tokenizer.eos_token_id
        if end is None or example.options[0][-1] == end:
            return example
        return self._checked(Example(example.prompt, (example.options[0] + (end,),), 0))

    def _checked(self, example: Example) -> Example:
        if not all(example.options):
            raise DataError(f"option {example.options.index(())} has no tokens")
        longest = len(example.prompt) + max(map(len, example.options))
        if longest > self.max_length:
            raise DataError(f"{longest} tokens are more than the context of {self.max_length}")
        if self.invocation:
            invocation_start(example.prompt, self.invocation)
        return example


def _require_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{name}={shown(value)} must be a non-empty string")
    _require_unicode(name, value)


def _require_unicode(name: str, text: str) -> None:
    """JSON can spell half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} is no Unicode text: {error}") from error


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _require_message(name: str, message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{name}={shown(message)} must be an object with a role and a content")
    content = message.get("content")
    if isinstance(content, str):
        _require_unicode(f"{name}.content", content)
    elif not isinstance(content, list) and not (content is None and message.get("tool_calls")):
        raise DataError(f"{name}.content={shown(content)} must be a string")


def _reason(error: Exception) -> str:
    if isinstance(error, DataError):
        return error.reason
    if isinstance(error, KeyError):
        return f"column {error.args[0]!r} is missing"
    return f"{type(error).__name__}: {error}"


def default_objective(examples: Sequence[Example], rows: Sequence[SourceRow]) -> Objective:
    """Classification where there is something to choose from; else the likelihood of the completion or the text."""
    if any(len(example.options) > 1 for example in examples):
        return "classification"
    return "language_modeling" if rows and "text" in rows[0].fields else "completion"


def get_task(name: str) -> Task:
    """The task of that name; raises DataError for an unknown one."""
    if name not in TASKS:
        raise DataError(f"unknown task {name!r}; known tasks: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def sample_rows(rows: Sequence[SourceRow], count: int | None, seed: int) -> list[SourceRow]:
    """``count`` rows in a seeded random order, or all of them."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[i] for i in order[:count]]
