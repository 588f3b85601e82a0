"""Writes docs/settings.md from the classes of settings: ``python scripts/settings_page.py``."""

from pathlib import Path

from sglang.srt.mezo.commands.check import CheckArguments
from sglang.srt.mezo.commands.evaluate import EngineArguments
from sglang.srt.mezo.commands.experiment import ExperimentArguments
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.settings import names, rows
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.experiments.first_order import FirstOrderArguments
from sglang.srt.mezo.service.wire.settings import ServiceSettings, flag, served, variable
from sglang.srt.mezo.training.evaluate import EvaluateArguments
from sglang.srt.mezo.training.finetune import ModelArguments
from sglang.srt.mezo.training.preview import PreviewArguments
from sglang.srt.mezo.training.replay import ReplayArguments

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
COMMANDS = {
    "`sglang-mezo train`: the model": ModelArguments,
    "`sglang-mezo train`: the data": DataArguments,
    "`sglang-mezo train`: the run (`MezoConfig`)": MezoConfig,
    "`sglang-mezo evaluate`, beside the model": EvaluateArguments,
    "`sglang-mezo evaluate`: by what": EngineArguments,
    "`sglang-mezo preview`, beside the model": PreviewArguments,
    "`sglang-mezo experiment`": ExperimentArguments,
    "Methods `ft-lora`, `ft-prefix`, `ft-full`, `head-tuning` of an experiment": FirstOrderArguments,
    "`sglang-mezo replay`": ReplayArguments,
    "`sglang-mezo check`": CheckArguments,
}
INTRODUCTION = """# Settings

Made by `python scripts/settings_page.py` from the classes themselves. Every field is a flag, `--learning_rate` or
`--learning-rate`, and a line of a `--config` file. What has no default and is not needed follows from other settings.
"""


def page() -> str:
    parts = [INTRODUCTION]
    for title, kind in COMMANDS.items():
        parts.append(f"\n## {title}\n\n{table(kind)}")
        if kind is MezoConfig:
            jobs, free = (
                ", ".join(f"`{name}`" for name in found) for found in (names(kind, job=True), names(kind, resume="any"))
            )
            parts.append(
                f"\nA job of a server may set {jobs}, beside OpenAI's `n_epochs`, `batch_size` and "
                f"`learning_rate_multiplier`.\n\nA run that goes on (`--resume_from_checkpoint`) may change {free}; "
                "the "
                "others must be as they were.\n"
            )
    parts.append(f"\n## `sglang-mezo serve`, beside SGLang's own\n\n{service()}")
    return "".join(parts)


def table(kind: type) -> str:
    head = "| field | type | default | allowed | what it does |\n|---|---|---|---|---|\n"
    return head + "".join(
        f"| {' | '.join(_cell(text) for text in (f'`{row[0]}`', *row[1:]))} |\n" for row in rows(kind)
    )


def service() -> str:
    head = "| flag | in the environment | default | allowed | what it does |\n|---|---|---|---|---|\n"
    lines = {name: (default, bounds, help) for name, _, default, bounds, help in rows(ServiceSettings)}
    return head + "".join(
        f"| `{flag(name)}` | `{variable(name)}` | {' | '.join(_cell(text) for text in lines[name])} |\n"
        for name in served()
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
