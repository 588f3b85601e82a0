"""What is run on a GPU, the most valuable first."""

from dataclasses import dataclass
from pathlib import Path

HERE = "benchmarks/gpu"
REVIEWS = "examples/assets/reviews"
SMOLLM2 = "smollm2-135m"  # a folder beside the file that it is made from

Command = tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """Commands, one after the other.

    Attributes:
        minutes: after which it is ended.
        commands: ``{json}`` stands for the file of its result, ``{folder}`` for an empty folder.
        tiny: the same on a small model, for a machine without a GPU.
    """

    name: str
    minutes: float
    commands: tuple[Command, ...]
    tiny: tuple[Command, ...]


def _python(script: str, *arguments: str) -> Command:
    return ("{python}", script, *arguments, "--json", "{json}")


def _check(name: str, minutes: float, *arguments: str) -> Line:
    command = _python(f"{HERE}/check.py", *arguments)
    small = ["engine", "--dtype", "float32"] if arguments[0] == "engine" else list(arguments)
    return Line(name, minutes, (command,), (_python(f"{HERE}/check.py", *small, "--tiny"),))


def _steps(shape: str, minutes: float, *arguments: str) -> Line:
    small = ("--dtype", "float32", "--workload", "sst2", "--directions", "3", "1", "--repeats", "2")
    tuning = arguments[:2] if arguments[:1] == ("--tuning",) else ()
    tiny = "tiny-llama" if shape.startswith("llama") else "tiny"
    name = "-".join(["steps", shape, *tuning[1:]])
    script = f"{HERE}/steps.py"
    return Line(
        name,
        minutes,
        (_python(script, "--shape", shape, *arguments),),
        (_python(script, "--shape", tiny, *small, *tuning),),
    )


def _profile() -> Line:
    script = f"{HERE}/profile_step.py"
    small = _python(script, "--shape", "tiny", "--dtype", "float32", "--directions", "3")
    return Line("profile-opt-13b", 3, (_python(script, "--shape", "opt-13b"),), (small,))


def _serving() -> Line:
    def commands(shape: str, seconds: str, pairs: str, *flags: str) -> tuple[Command, ...]:
        server = ["--load-format dummy", *flags]
        load = ("--load-seconds", seconds, "--pairs", pairs, "--server-flags", " ".join(server))
        serving = _python("benchmarks/serve_while_train.py", "--model", "{folder}", *load)
        return (("{python}", f"{HERE}/shapes.py", shape, "{folder}"), (*serving, "--dtype", "bfloat16"))

    tiny = commands("tiny-llama", "2", "1", "--max-total-tokens 20000")
    return Line("serving-llama-3.1-8b", 6, commands("llama-3.1-8b", "10", "3"), tiny)


def _accuracy(task: str, model: Path | None, data: Path | None) -> Line:
    prepared: tuple[Command, ...] = ()
    if model is not None and model.suffix == ".gguf":
        prepared = (("{python}", "benchmarks/smollm2.py", str(model.parent / SMOLLM2), "--gguf", str(model)),)
        model = model.parent / SMOLLM2
    named = ("--model", str(model) if model else "HuggingFaceTB/SmolLM2-135M", "--task", task)
    rows = ("--dataset", str(data / task)) if data else ()
    script, folder = "benchmarks/accuracy.py", ("--output_dir", "{folder}")
    many = _sizes(700, 200, 500, 500, "0", "1", "2")
    real = _python(script, *named, *rows, "--dtype", "bfloat16", *many, *folder)
    embedded = ("--model", "examples/assets/opt-reviews", "--task", "sst2", "--dataset", REVIEWS)
    small = _python(script, *embedded, *_sizes(32, 10, 10, 3, "0"), *folder)
    return Line(f"smollm2-{task}", 6, (*prepared, real), (small,))


def _sizes(train: int, dev: int, test: int, steps: int, *seeds: str) -> Command:
    rows = ("--num_train", str(train), "--num_dev", str(dev), "--num_test", str(test))
    return (*rows, "--max_steps", str(steps), "--seeds", *seeds)


def _oracles(file: str, minutes: float, few: str) -> Line:
    command = ("{python}", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"test/srt/{file}")
    return Line(file.removesuffix(".py"), minutes, (command,), ((*command, "-k", few),))


def lines(model: Path | None, data: Path | None) -> list[Line]:
    """All of them, in their order.

    Args:
        model: folder of SmolLM2-135M, or its GGUF file; that of the hub without.
        data: folder with a folder of files for each task; the hub's rows without.
    """
    return [
        _check("packages", 2, "packages"),
        _check("engine-bfloat16", 3, "engine"),
        _check("engine-float32", 3, "engine", "--dtype", "float32"),
        _check("server", 8, "server"),  # of which its start may take five
        _steps("opt-13b", 6),
        _profile(),
        _steps("opt-125m", 4),
        _steps("llama-3.1-8b", 6),
        _serving(),
        _accuracy("sst2", model, data),
        _accuracy("trec", model, data),
        _steps("opt-1.3b", 4),
        _steps("opt-125m", 3, "--tuning", "full"),
        _steps("opt-1.3b", 4, "--tuning", "full"),
        _oracles("test_trainer_oracle.py", 8, "llama-alora and losses_equal_peft"),
        _oracles("test_full_oracle.py", 6, "llama and losses_equal and single and not tied"),
        _check("engine-csgmv", 3, "engine", "--tuning", "lora", "--engine", '{"lora_backend": "csgmv"}'),
        _check("engine-awq", 3, "engine", "--awq"),
        _check("engine-fp8", 3, "engine", "--engine", '{"quantization": "fp8"}'),
        _check("engine-fa3", 3, "engine", "--engine", '{"attention_backend": "fa3"}'),
    ]
