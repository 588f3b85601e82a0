"""From rows to tokenised examples.

Rows come as a task's columns, or in one of the free forms ``{"prompt", "completion"}``, ``{"messages"}``,
``{"prompt", "options", "label"}`` and ``{"text"}``. A bad row is reported with its file, line and reason.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from sglang.srt.mezo.core.errors import DataError, shown
from sglang.srt.mezo.core.objective import Generation, Objective
from sglang.srt.mezo.data.chat import Renderer
from sglang.srt.mezo.data.checks import (
    OnBadRow,
    problem,
    require_choice,
    require_distinct,
    require_text,
    require_unicode,
    usable,
)
from sglang.srt.mezo.data.conversation import turns
from sglang.srt.mezo.data.invocation import invocation_start
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.tasks import Task, TextExample, final
from sglang.srt.mezo.data.texts import Encoding, Result, Texts, encode_together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROWS_TOGETHER = 256


@dataclass(frozen=True)
class Example:
    """A tokenised row: ``options[i]`` continues ``prompt``, or is a word in the place of its ``mask``; ``label`` is the
    index of the right option, which is learned.

    Attributes:
        right: indices of all right options; empty where ``label`` is the only one.
        columns: where there are no options, as the model itself goes on: what its completion is graded by, the row's
            own columns and "prompt" and "answers" among them.
    """

    prompt: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] = ()
    label: int = 0
    mask: int | None = None
    columns: Mapping[str, Any] | None = None
    right: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt) + (max(map(len, self.options), default=0) if self.mask is None else 0)


class Encoder:
    """Turns rows into examples for one tokenizer.

    Args:
        tokenizer: the model's; its special tokens are added to prompts as it does by itself.
        max_length: most tokens of a sequence, prompt and option together.
        task: renders the rows; without one they must have one of the free forms.
        invocation: token ids that every prompt must hold; empty where none are needed.
        chat: renders messages, which are refused without one.
        generation: of completions that the model writes itself; None where rows have them.
        right_only: whether nothing is needed of a task's options but the right one.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        task: Task | None = None,
        invocation: Sequence[int] = (),
        chat: Renderer | None = None,
        generation: Generation | None = None,
        right_only: bool = False,
    ):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.generation = generation
        self.task = task
        self.invocation = tuple(invocation)
        self.right_only = right_only
        self._chat = chat
        self._cut = 0

    @property
    def _renderer(self) -> Renderer:
        if self._chat is None:
            raise DataError(
                "messages need a renderer, such as chat=ChatRenderer(tokenizer, ChatSettings(model)) of "
                "sglang.srt.mezo.engine.chat"
            )
        return self._chat

    def generation_prompt(self, rows: Iterable[SourceRow], prompts: Iterable[Sequence[int]]) -> tuple[int, ...]:
        """What the chat template appends to the rows' messages for the answer to follow, if all ``prompts`` end with
        it.

        Raises:
            DataError: it appends nothing or not always the same, or there are no messages.
        """
        tokens = next(self._generation_prompts(rows), None)
        if tokens is None:
            raise DataError("there are no messages, whose chat template has a generation prompt")
        if not tokens:
            raise DataError("the chat template appends no generation prompt to the messages")
        if any(tuple(prompt[-len(tokens) :]) != tokens for prompt in prompts):
            raise DataError(f"not every prompt ends with the generation prompt {self.tokenizer.decode(list(tokens))!r}")
        return tokens

    def _generation_prompts(self, rows: Iterable[SourceRow]) -> Iterator[tuple[int, ...]]:
        for row in rows:
            if self.task is None and "messages" in row.fields:
                try:
                    yield self._renderer.generation_prompt(turns(row.fields)[0])
                except DataError:  # a bad row, which is left out
                    continue

    def encode_rows(self, rows: Sequence[SourceRow], on_bad_row: OnBadRow = "raise") -> list[Example]:
        """Tokenise all rows. A bad one raises DataError, or is logged and left out with ``on_bad_row="skip"``."""
        return [example for _, example in self.encode_from(rows, on_bad_row)]

    def encode_from(self, rows: Sequence[SourceRow], on_bad_row: OnBadRow) -> list[tuple[SourceRow, Example]]:
        """As ``encode_rows``, each example with the row that it is of."""
        examples = []
        for start in range(0, len(rows), _ROWS_TOGETHER):
            part = rows[start : start + _ROWS_TOGETHER]
            for row, outcome in zip(part, self.encode_each(part)):
                examples += [(row, example) for of_row in usable([outcome], on_bad_row) for example in of_row]
        if not examples:
            source = rows[0].source if rows else "data set"
            raise DataError("no usable row", source)
        if self._cut:
            logger.warning("%d rows of %s are longer than there is room for, and cut", self._cut, rows[0].source)
            self._cut = 0
        return examples

    def encode_each(self, rows: Sequence[SourceRow]) -> list[list[Example] | DataError]:
        """The examples of each row, or why it cannot be used; the rows are tokenised together."""
        return self._outcomes(rows, self._encoding_of)

    def documents(self, rows: Sequence[SourceRow]) -> list[list[int] | DataError]:
        """The tokens of each row's text and the EOS token after it, or why it cannot be used."""
        return self._outcomes(rows, self._document)

    def _outcomes(
        self, rows: Sequence[SourceRow], encoding_of: Callable[[SourceRow], Encoding[Result]]
    ) -> list[Result | DataError]:
        outcomes = encode_together(self.tokenizer, [encoding_of(row) for row in rows])
        return [
            problem(outcome, row) if isinstance(outcome, Exception) else outcome for outcome, row in zip(outcomes, rows)
        ]

    def encode(self, fields: Mapping[str, Any]) -> list[Example]:
        """Tokenise one row; a long text becomes several examples."""
        [outcome] = encode_together(self.tokenizer, [self._encoding(fields)])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _encoding_of(self, row: SourceRow) -> Encoding[list[Example]]:
        return (yield from self._encoding(row.whole_fields(), row.demonstrations))

    def _encoding(self, fields: Mapping[str, Any], demonstrations: Sequence[str] = ()) -> Encoding[list[Example]]:
        if self.generation is not None:
            return (yield from self._encode_prompts(fields, self.generation, demonstrations))
        if self.task is not None:
            return [(yield from self._encode_row(self.task, fields, demonstrations))]
        for needed, encode in self._forms:
            if needed <= fields.keys():
                return (yield from encode(self, fields))
        forms = ", ".join("{" + ", ".join(sorted(needed)) + "}" for needed, _ in self._forms)
        raise DataError(f"columns {shown(sorted(fields))} have none of the forms {forms}{self._forms_of}")

    def _encode_row(
        self, task: Task, fields: Mapping[str, Any], demonstrations: Sequence[str] = ()
    ) -> Encoding[Example]:
        text = final(task.render(fields), demonstrations)
        if self.right_only:
            text = replace(text, options=(text.options[text.label],), label=0, right=())
        return (yield from self._encode_text(text, self.max_length - (task.max_new_tokens or 0)))

    def _encode_prompts(
        self, fields: Mapping[str, Any], generation: Generation, demonstrations: Sequence[str] = ()
    ) -> Encoding[list[Example]]:
        """Of what the model writes after."""
        examples = []
        if self.task is None and "messages" in fields:
            for turn in turns(fields):
                prompt, _ = yield from self._renderer.answer(turn)
                columns = {**fields, "prompt": turn.asked["messages"], "answers": [turn.answer.get("content") or ""]}
                examples.append(Example(prompt, columns=columns))
        else:
            text, answers = self._asked(fields, demonstrations)
            [prompt] = yield Texts([text])
            if self.task is not None:
                prompt = self._end_of(prompt, self.max_length - generation.max_new_tokens)
            examples.append(Example(tuple(prompt), columns={**fields, "prompt": text, "answers": answers}))
        for example in examples:
            if generation.objective != "reward" and not example.columns["answers"]:
                raise DataError(f"a row needs answers, or a completion, to tell its {generation.objective} by")
        return [self._checked(example) for example in examples]

    def _asked(self, fields: Mapping[str, Any], demonstrations: Sequence[str]) -> tuple[str, list[str]]:
        """The prompt of a row, and what it has for right answers."""
        if self.task is not None:
            text = final(self.task.render(fields), demonstrations)
            right = text.right or (text.label,)
            return text.prompt, list(text.answers) or [text.options[place].strip() for place in right]
        if "prompt" not in fields:
            raise DataError(f"columns {shown(sorted(fields))} have none of prompt and messages, to write after")
        require_text("prompt", fields["prompt"])
        answers = fields.get("answers", [fields["completion"]] if "completion" in fields else [])
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"answers={shown(answers)} must be a list of strings")
        return fields["prompt"], answers

    def _encode_options(self, fields: Mapping[str, Any]) -> Encoding[list[Example]]:
        require_text("prompt", fields["prompt"])
        options = fields["options"]
        if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
            raise DataError(f"options={shown(options)} must be a list of strings")
        for option in options:
            require_unicode("options", option)
        return [(yield from self._encode_text(TextExample(fields["prompt"], tuple(options), fields["label"])))]

    def _encode_completion(self, fields: Mapping[str, Any]) -> Encoding[list[Example]]:
        if fields["prompt"] == "":
            raise DataError(
                "prompt='' must be a non-empty string: {\"text\"} instead of prompt and completion trains a text from "
                "its start"
            )
        require_text("prompt", fields["prompt"])
        require_text("completion", fields["completion"])
        return [
            self._with_end((yield from self._encode_text(TextExample(fields["prompt"], (fields["completion"],), 0))))
        ]

    def _encode_messages(self, fields: Mapping[str, Any]) -> Encoding[list[Example]]:
        examples = []
        for turn in turns(fields):
            prompt, answer = yield from self._renderer.answer(turn)
            examples.append(self._checked(Example(prompt, (answer,), 0)))
        return examples

    def _encode_plain_text(self, fields: Mapping[str, Any]) -> Encoding[list[Example]]:
        require_text("text", fields["text"])
        [ids] = yield Texts([fields["text"]])
        if len(ids) < 2:
            raise DataError("a text needs two tokens or more, one to start from and one to predict")
        blocks = [ids[start : start + self.max_length] for start in range(0, len(ids), self.max_length)]
        return [self._checked(example_of(block)) for block in blocks if len(block) > 1]

    def _document(self, row: SourceRow) -> Encoding[list[int]]:
        text = row.whole_fields()["text"]
        end: Any = self.tokenizer.eos_token_id
        require_text("text", text)
        [ids] = yield Texts([text])
        return ids if ids and ids[-1] == end else [*ids, end]

    _forms: Sequence[tuple[set[str], Callable[[Self, Mapping[str, Any]], Encoding[list[Example]]]]] = (
        ({"prompt", "options", "label"}, _encode_options),
        ({"prompt", "completion"}, _encode_completion),
        ({"messages"}, _encode_messages),
        ({"text"}, _encode_plain_text),
    )
    _forms_of = ""

    def _encode_text(self, text: TextExample, cut_to: int | None = None) -> Encoding[Example]:
        """
        Args:
            cut_to: most tokens of the prompt and an option, beyond which the prompt's first are left out; of None a row
                that is longer than ``max_length`` is a bad row.
        """
        require_choice(text.options, text.label)
        [prompt] = yield Texts([text.prompt])
        if not prompt:
            raise DataError("the prompt has no tokens")
        if cut_to is None and len(prompt) >= self.max_length:  # before every option is tokenised together with it
            raise DataError(
                f"a prompt of {len(prompt)} tokens and an option are more than the context of {self.max_length}"
            )
        options = yield from self._continuations(text, prompt)
        require_distinct(text.options, options)
        if cut_to is not None:
            prompt = self._end_of(prompt, cut_to - max(map(len, options)))
        return self._checked(Example(tuple(prompt), options, text.label, right=text.right))

    def _end_of(self, prompt: list[int], room: int) -> list[int]:
        """The last tokens of a prompt, as many as there is room for, behind the BOS token where it begins with one."""
        if len(prompt) <= room:
            return prompt
        begin = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id else []
        if room <= len(begin):
            raise DataError(f"an option and what is written leave no room for the prompt in {self.max_length} tokens")
        self._cut += 1
        return begin + prompt[len(prompt) - room + len(begin) :]

    def _continuations(self, text: TextExample, prompt: list[int]) -> Encoding[tuple[tuple[int, ...], ...]]:
        """Tokens of each option as they follow ``prompt``, even where the tokenizer would merge across the border."""
        joint = yield Texts([text.prompt + option for option in text.options])
        options = [tuple(ids[len(prompt) :]) if ids[: len(prompt)] == prompt else () for ids in joint]
        merged = [place for place, option in enumerate(options) if not option]
        if merged:
            alone = yield Texts([text.options[place] for place in merged], special_tokens=False)
            for place, ids in zip(merged, alone):
                options[place] = tuple(ids)
        return tuple(options)

    def _with_end(self, example: Example) -> Example:
        """A completion is learned with its end, as TRL does."""
        end: Any = self.tokenizer.eos_token_id
        if end is None or example.options[0][-1] == end:
            return example
        return self._checked(Example(example.prompt, ((*example.options[0], end),), 0))

    def _checked(self, example: Example) -> Example:
        if not example.prompt:
            raise DataError("the prompt has no tokens")
        if not all(example.options):
            raise DataError(f"option {example.options.index(())} has no tokens")
        new = 0 if self.generation is None else self.generation.max_new_tokens
        if example.longest + new > self.max_length:
            told = f"{example.longest} tokens" + (f" and max_new_tokens={new} more" if new else "")
            raise DataError(f"{told} are more than the context of {self.max_length}")
        if self.invocation:
            invocation_start(example.prompt, self.invocation)
        return example


def example_of(block: Sequence[int]) -> Example:
    """Tokens of a text, of which all but the first are learned."""
    return Example(tuple(block[:1]), (tuple(block[1:]),), 0)


def count_shared(examples: Iterable[Example], others: Iterable[Example]) -> int:
    """How many of the examples have the prompt and the options of one of the others, whatever its label."""
    known = {(other.prompt, other.options) for other in others}
    return sum((example.prompt, example.options) in known for example in examples)


def default_objective(examples: Sequence[Example]) -> Objective:
    """Classification where there is something to choose from; else the likelihood of the completion or the text."""
    return "classification" if any(len(example.options) > 1 for example in examples) else "completion"
