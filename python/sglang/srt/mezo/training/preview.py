"""What the model sees of a data set's rows: texts, tokens, where an adapter starts to act, what is read."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

from sglang.srt.mezo.adapters.architectures import longest_text
from sglang.srt.mezo.adapters.families import require_tuning
from sglang.srt.mezo.core.config import Tuning
from sglang.srt.mezo.core.settings import require_settings, setting
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.data.named import named_data
from sglang.srt.mezo.data.rows import SourceRow
from sglang.srt.mezo.data.splits import generation_prompt
from sglang.srt.mezo.data.tasks import Task
from sglang.srt.mezo.engine.chat import ChatRenderer
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.finetune import ModelArguments, chat_settings, chosen_invocation, encoder_kind


@dataclass(frozen=True)
class PreviewArguments:
    """Which rows are shown, and as which adapter would be trained on them; ConfigError names the field at fault."""

    task: Optional[str] = setting(
        None, "Task that renders the rows; text: they are whole texts, in a column text; none for files of prompts."
    )
    dataset: Optional[str] = setting(None, "Hub name, folder or file; the task's own by default.")
    dataset_config: Optional[str] = setting(None, "Configuration of a hub data set; the task's own by default.")
    split: str = setting("train", "Split of the data set; a file has none.")
    rows: int = setting(3, "Rows to show, from the first.", at_least=1)
    tuning: Tuning = setting("alora", "alora: the adapter acts from the invocation on; lora: on every token.")
    invocation: Optional[str] = setting(
        None, "Text that activates an aLoRA adapter, or auto; the task's own by default, without a task auto."
    )
    json: bool = setting(False, "A JSON object a line, in the place of a page to read.")

    def __post_init__(self):
        require_settings(self)


def preview(model: ModelArguments, arguments: PreviewArguments) -> Iterator[dict[str, Any]]:
    """The examples of the first rows. Needs no engine.

    Yields:
        ``source`` (file and line), ``prompt``, ``options``, ``gold`` (index of the right option), ``prompt_ids``,
        ``option_ids``, ``acts_from`` (the first of ``prompt_ids`` that the adapter acts on) and ``rows``, the sequences
        that run: ``prefix_tokens`` (on the base model, shared), ``ids`` (after it), ``reads`` ([position, token]: the
        log-probability of ``token`` after ``ids[position]``, or in the place of a mask there).

    Raises:
        ConfigError, DataError: a setting is wrong, or a row cannot be used.
    """
    model_config, tokenizer = read_checkpoint(model.model)
    require_tuning(model_config, arguments.tuning)
    named = named_data(arguments.task, arguments.dataset, arguments.dataset_config)
    rows = named.rows(arguments.split)[: arguments.rows]
    chat = ChatRenderer(tokenizer, chat_settings(model))
    invocation = chosen_invocation(tokenizer, arguments.task, arguments.tuning, arguments.invocation)
    kind = encoder_kind(model_config, None, arguments.task)
    encoder = kind(tokenizer, longest_text(model_config), named.task, invocation or (), chat)
    examples = [(row, example) for row in rows for example in encoder.encode_rows([row])]
    if invocation is None:
        invocation = generation_prompt(encoder, rows, [example for _, example in examples])
    planner = Planner(arguments.tuning, invocation)
    for row, example in examples:
        yield _shown(row, example, planner, named.task, tokenizer)


def _shown(row: SourceRow, example: Example, planner: Planner, task: Task | None, tokenizer: Any) -> dict[str, Any]:
    plan = planner.plan(example)
    prompt, options = _texts(row, example, task, tokenizer)
    return {
        "source": f"{row.source}:{row.line}",
        "prompt": prompt,
        "options": options,
        "gold": example.label,
        "prompt_ids": list(example.prompt),
        "option_ids": [list(option) for option in example.options],
        "acts_from": len(plan.rows[0].prefix),
        "rows": [
            {"prefix_tokens": len(one.prefix), "ids": list(one.suffix), "reads": [list(read) for read in one.reads]}
            for one in plan.rows
        ],
    }


def _texts(row: SourceRow, example: Example, task: Task | None, tokenizer: Any) -> tuple[str, list[str]]:
    """Prompt and options as they were before they were tokenised, or else as the tokens read."""
    if task is not None and example.mask is None:
        text = task.render(row.fields)
        return text.prompt, list(text.options)
    if task is None and "prompt" in row.fields:
        options = row.fields["options"] if "options" in row.fields else [row.fields["completion"]]
        return row.fields["prompt"], list(options)
    return tokenizer.decode(example.prompt), [tokenizer.decode(option) for option in example.options]


def page(shown: dict[str, Any]) -> str:
    """An example of ``preview`` for people."""
    ids, start = shown["prompt_ids"], shown["acts_from"]
    lines = [f"--- {shown['source']}", shown["prompt"]]
    for index, (option, tokens) in enumerate(zip(shown["options"], shown["option_ids"])):
        lines.append(f"  {'*' if index == shown['gold'] else ' '} {json.dumps(option, ensure_ascii=False)} {tokens}")
    lines.append(f"  {len(ids)} prompt tokens; the adapter acts from token {start} on: {ids[start:]}")
    run = sum(len(row["ids"]) for row in shown["rows"])
    lines.append(f"  {run} tokens run for each direction, {sum(len(row['reads']) for row in shown['rows'])} are read")
    return "\n".join(lines)
