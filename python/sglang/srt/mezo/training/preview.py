"""What the model sees of a data set's rows: texts, tokens, where an adapter starts to act, what is read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Optional

from sglang.srt.mezo.adapters.families import require_tuning
from sglang.srt.mezo.core.config import Tuning
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.settings import setting
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.named import Named, is_text, named_data
from sglang.srt.mezo.data.rows import SourceRow, has_splits
from sglang.srt.mezo.data.selection import TRAIN, RowArguments, drawn_rows, with_demonstrations
from sglang.srt.mezo.data.splits import generation_prompt
from sglang.srt.mezo.data.tasks import Task, final
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import (
    ModelArguments,
    chat_settings,
    chosen_invocation,
    encoder_kind,
    max_length_of,
)


@dataclass(frozen=True)
class PreviewArguments(RowArguments):
    """Which rows are shown, and as which adapter would be trained on them; ConfigError names the field at fault."""

    split: str = setting("train", "Split of the data set; a file has none. Of drawn rows train, dev or test.")
    drawn: bool = setting(False, "Rows as a run draws them, in the place of those of a split from the first.")
    rows: Optional[int] = setting(3, "Rows to show, or none for all.", at_least=1)
    num_demonstrations: int = setting(
        0, "Of a task: training rows that are shown with their answers before each row.", at_least=0
    )
    tuning: Tuning = setting("alora", "alora: the adapter acts from the invocation on; lora: on every token.")
    invocation: Optional[str] = setting(
        None, "Text that activates an aLoRA adapter, or auto; the task's own by default, without a task auto."
    )
    json: bool = setting(False, "A JSON object a line, in the place of a page to read.")

    def __post_init__(self):
        super().__post_init__()
        for one in fields(self):
            if one.name in _OF_DRAWN and not self.drawn and (value := getattr(self, one.name)) != one.default:
                raise ConfigError(one.name, value, "nothing without drawn: it says which rows a run draws")
        if self.drawn and self.split not in _PARTS:
            raise ConfigError("split", self.split, f"of drawn rows one of {', '.join(_PARTS)}")
        if self.num_demonstrations and (self.task is None or is_text(self.task)):
            raise ConfigError("num_demonstrations", self.num_demonstrations, "nothing without a task that renders rows")


_PARTS = (TRAIN, "dev", "test")
_OF_DRAWN = ("num_train", "num_dev", "num_test", "k", "train_set_seed", "dev_split", "test_split")


def preview(model: ModelArguments, arguments: PreviewArguments) -> Iterator[dict[str, Any]]:
    """The examples of rows. Needs no engine.

    Yields:
        ``source`` (file and line), ``prompt``, ``options``, ``gold`` (index of the right option that is learned),
        ``right`` (of all right ones), ``answers`` (where the model writes its own), ``prompt_ids``, ``option_ids``,
        ``mask`` (its place, of a masked language model), ``acts_from`` (the first of ``prompt_ids`` that the adapter
        acts on), ``tokens_run`` (at each point; what sequences begin with in common is run once) and ``rows``, the
        sequences: ``prefix_tokens`` (on the base model, shared), ``ids`` (after it), ``reads`` ([position, token]: the
        log-probability of ``token`` after ``ids[position]``, or in the place of a mask there).

    Raises:
        ConfigError, DataError: a setting is wrong, or a row cannot be used.
    """
    model_config, tokenizer = read_checkpoint(model.model)
    require_tuning(model_config, arguments.tuning)
    named = named_data(arguments.task, arguments.dataset, arguments.dataset_config)
    rows = _rows(named, arguments)
    chat = ChatRenderer(tokenizer, chat_settings(model))
    invocation = chosen_invocation(tokenizer, arguments.task, arguments.tuning, arguments.invocation)
    kind = encoder_kind(model_config, None, arguments.task)
    longest = max_length_of(model_config, arguments.max_length)
    encoder = kind(tokenizer, longest, named.task, invocation or (), chat)
    encoded = encoder.encode_from(rows, arguments.on_bad_row)
    if invocation is None:
        invocation = generation_prompt(encoder, rows, [example for _, example in encoded])
    planner = Planner(arguments.tuning, invocation)
    for row, example in encoded:
        yield _shown(row, example, planner, named.task, tokenizer)


def _rows(named: Named, arguments: PreviewArguments) -> list[SourceRow]:
    if arguments.drawn:
        rows = drawn_rows(named, arguments)[_PARTS.index(arguments.split)]
    else:
        if arguments.split != TRAIN and not has_splits(named.path):
            raise ConfigError("split", arguments.split, f"none for {named.path}, which has no splits; drawn rows have")
        rows = named.rows(arguments.split)
    return with_demonstrations(named, rows[: arguments.rows], arguments.num_demonstrations, arguments.on_bad_row)


def _shown(row: SourceRow, example: Example, planner: Planner, task: Task | None, tokenizer: Any) -> dict[str, Any]:
    plan = planner.plan(example)
    prompt, options = _texts(row, example, task, tokenizer)
    return {
        "source": f"{row.source}:{row.line}",
        "prompt": prompt,
        "options": options,
        "gold": example.label,
        "right": list(example.right or (example.label,)),
        "answers": [] if task is None or example.mask is not None else list(task.render(row.fields).answers),
        "prompt_ids": list(example.prompt),
        "option_ids": [list(option) for option in example.options],
        "mask": example.mask,
        "acts_from": len(plan.rows[0].prefix),
        "tokens_run": plan.slot_tokens,
        "rows": [
            {"prefix_tokens": len(one.prefix), "ids": list(one.suffix), "reads": [list(read) for read in one.reads]}
            for one in plan.rows
        ],
    }


def _texts(row: SourceRow, example: Example, task: Task | None, tokenizer: Any) -> tuple[str, list[str]]:
    """Prompt and options as they were before they were tokenised, or else as the tokens read."""
    if task is not None and example.mask is None:
        text = final(task.render(row.fields), row.demonstrations)
        return text.prompt, list(text.options)
    if task is None and {"prompt", "options", "label"} <= row.fields.keys():
        return row.fields["prompt"], list(row.fields["options"])
    if task is None and {"prompt", "completion"} <= row.fields.keys():
        return row.fields["prompt"], [row.fields["completion"]]
    return tokenizer.decode(example.prompt), [tokenizer.decode(option) for option in example.options]


def page(shown: dict[str, Any]) -> str:
    """An example of ``preview`` for people."""
    ids, start = shown["prompt_ids"], shown["acts_from"]
    lines = [f"--- {shown['source']}", shown["prompt"]]
    for index, (option, tokens) in enumerate(zip(shown["options"], shown["option_ids"])):
        lines.append(f"  {'*' if index == shown['gold'] else ' '} {json.dumps(option, ensure_ascii=False)} {tokens}")
    lines.append(f"  {len(ids)} prompt tokens; the adapter acts from token {start} on: {ids[start:]}")
    reads = sum(len(row["reads"]) for row in shown["rows"])
    lines.append(f"  {shown['tokens_run']} tokens run for each direction, {reads} are read")
    return "\n".join(lines)
