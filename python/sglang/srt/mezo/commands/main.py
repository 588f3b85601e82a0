"""``sglang-mezo``: a command, and what the command takes."""

import sys
from importlib import import_module

COMMANDS = {
    "train": "fit an adapter to rows, with forward passes only",
    "evaluate": "loss and accuracy of an adapter, or of the base model",
    "preview": "what the model sees of a data set's rows",
    "experiment": "many runs from one file: tasks, methods, seeds; tables and plots",
    "replay": "an adapter from a run's seed log, without a model",
    "serve": "SGLang's server, with fine-tuning on",
    "check": "whether an SGLang has everything that is hooked and called",
    "env": "versions, for a report of a fault",
}


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "Usage: sglang-mezo COMMAND [--flag value ...]",
            "",
            *lines,
            "",
            "`sglang-mezo COMMAND --help` lists its flags.",
        ]
    )


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        raise SystemExit(f"sglang-mezo: {name!r} is not a command\n\n{usage()}")
    import_module(f"sglang.srt.mezo.commands.{name}").main(arguments)


if __name__ == "__main__":
    main()
