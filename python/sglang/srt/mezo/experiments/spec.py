"""An experiment: one YAML file, and the cells that it stands for."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from sglang.srt.mezo.core.atomic import atomic_file
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, UsageError
from sglang.srt.mezo.data.named import TEXT, is_text
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.data.tasks import get_task
from sglang.srt.mezo.experiments.first_order import FirstOrderArguments
from sglang.srt.mezo.training.arguments import field_of
from sglang.srt.mezo.training.evaluate import EvaluateArguments
from sglang.srt.mezo.training.finetune import ModelArguments

FILE = "experiment.yaml"
SEED = "seed"
"""In the place of a value of the data: the run's own seed."""
PRESETS = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class Method:
    """A way to come to answers.

    Attributes:
        arguments: class of its settings.
        fixed: those that make it what it is.
        seeded: whether its seed changes anything.
    """

    arguments: type
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = True


def _mezo(tuning: str) -> Method:
    return Method(MezoConfig, {"tuning": tuning})


def _first_order(tuning: str) -> Method:
    return Method(FirstOrderArguments, {"tuning": tuning})


@dataclass(frozen=True)
class ProbeArguments:
    """Linear probing has no settings."""


METHODS: dict[str, Method] = {
    "zero-shot": Method(EvaluateArguments, seeded=False),
    "calibrated": Method(EvaluateArguments, {"calibrated": True}, seeded=False),
    "icl": Method(EvaluateArguments, {"num_demonstrations": 32}, seeded=False),
    "linear-probing": Method(ProbeArguments, seeded=False),
    "head-tuning": _first_order("head"),
    "ft-lora": _first_order("lora"),
    "ft-prefix": _first_order("prefix"),
    "ft-full": _first_order("full"),
    "mezo-alora": _mezo("alora"),
    "mezo-lora": _mezo("lora"),
    "mezo-prefix": _mezo("prefix"),
    "mezo-full": _mezo("full"),
}
"""By the names that experiments have for them."""

_OF_A_METHOD = {"method", "grid", "tasks", "skip", "seeds", "paper", "by_task"}
_KEYS = {"name", "description", "paper", "model", "data", "tasks", "methods", "seeds"}
_OF_DATA = ("task", "dataset", "dataset_config", "max_length", "on_bad_row")
"""Fields of an evaluation that the task has."""
_NOT_SET = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "adapter", "predictions", "seed"}
"""Fields that are the experiment's own business."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        label: of the method's row in tables.
        method: key of ``METHODS``.
        point: of the grid.
        settings: of the method, the point's among them.
    """

    task: str
    label: str
    method: str
    seed: int
    point: dict[str, Any]
    settings: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]

    @property
    def id(self) -> str:
        """A file's name, which changes with any setting."""
        known = [self.task, self.method, self.seed, self.settings, self.model, self.data]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
        point = "".join(f"-{name}={value}" for name, value in self.point.items())
        return f"{task_name(self.task)}-{self.label}{point}-seed{self.seed}-{digest}".replace("/", "_")


@dataclass(frozen=True)
class Experiment:
    """What an experiment's file says, checked.

    Attributes:
        paper: table of the MeZO paper that it repeats, whose rows methods name; empty where it repeats none.
        tasks: each with its fields of ``DataArguments``.
        methods: by label.
    """

    name: str
    description: str
    paper: str
    model: dict[str, Any]
    data: dict[str, Any]
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> "Experiment":
        """Raises UsageError where the file cannot be read, ConfigError where a field is wrong."""
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UsageError(f"{path} holds no experiment: a name, a model, tasks and methods")
        return cls.of(content, path.parent.name)

    @classmethod
    def of(cls, content: Mapping[str, Any], name: str) -> "Experiment":
        """Raises ConfigError."""
        _require_known("experiment", content, _KEYS)
        model = content.get("model")
        experiment = cls(
            str(content.get("name", name)),
            str(content.get("description", "")),
            str(content.get("paper", "")),
            {"model": model} if isinstance(model, str) else _mapping("model", model),
            _mapping("data", content.get("data")),
            _named("tasks", content.get("tasks")),
            _named("methods", content.get("methods")),
            tuple(_list(content.get("seeds", 0))),
        )
        if "model" not in experiment.model:
            raise ConfigError("model", None, "a hub name or a folder")
        for required in ("tasks", "methods"):
            if not getattr(experiment, required):
                raise ConfigError(required, None, "one at least")
        for task in experiment.tasks:
            task_name(task)
        for label, of_method in experiment.methods.items():
            experiment._require_tasks(f"{label}.tasks", _list(of_method.get("tasks", [])))
            for name in ("skip", "by_task"):
                experiment._require_tasks(f"{label}.{name}", _mapping(f"{label}.{name}", of_method.get(name)))
        for cell in experiment.cells():
            arguments_of(cell)
        return experiment

    def cells(self) -> list[Cell]:
        """In the order of the file: task by task, method by method, point by point, seed by seed."""
        return [
            cell
            for task, of_task in self.tasks.items()
            for label, of_method in self.methods.items()
            if task in _list(of_method.get("tasks", list(self.tasks))) and not self.skipped(task, label)
            for cell in self._cells(task, of_task, label, of_method)
        ]

    def skipped(self, task: str, label: str) -> str:
        """Why the file leaves a method out on a task, as tables tell it; empty where it does not."""
        reasons = _mapping(f"{label}.skip", self.methods[label].get("skip"))
        if task in reasons and not isinstance(reasons[task], str):
            raise ConfigError(f"{label}.skip.{task}", reasons[task], "the reason, in words")
        return reasons.get(task, "")

    def _cells(self, task: str, of_task: dict[str, Any], label: str, of_method: dict[str, Any]) -> Iterator[Cell]:
        of_method = {**of_method, **_mapping("by_task", of_method.get("by_task")).get(task, {})}
        method = of_method.get("method", label)
        if method not in METHODS:
            raise ConfigError("method", method, f"one of {', '.join(METHODS)}")
        settings = {name: value for name, value in of_method.items() if name not in _OF_A_METHOD}
        for name in settings:
            if name in _NOT_SET:
                raise ConfigError(name, settings[name], "nothing in an experiment, which sets it")
            if name in (*_OF_DATA, "split", "rows"):
                raise ConfigError(name, settings[name], "nothing of a method: data and tasks have the rows")
        grid = _mapping("grid", of_method.get("grid"))
        seeds = _list(of_method.get("seeds", list(self.seeds))) if METHODS[method].seeded else (0,)
        data = {"task": task, **self.data, **of_task}
        for values in itertools.product(*map(_list, grid.values())):
            point = dict(zip(grid, values))
            for seed in seeds:
                of_seed = {name: seed if value == SEED else value for name, value in data.items()}
                yield Cell(task, label, method, seed, point, {**settings, **point}, self.model, of_seed)

    def _require_tasks(self, name: str, tasks: Iterable[str]) -> None:
        for task in tasks:
            if not isinstance(task, str) or task not in self.tasks:
                raise ConfigError(name, task, f"of the experiment's tasks, as it calls them: {', '.join(self.tasks)}")

    def with_model(self, **given: Any) -> "Experiment":
        """The same of another model, or of one that runs otherwise."""
        return replace(self, model={**self.model, **given})

    def with_data(self, folder: str) -> "Experiment":
        """The same of files: a folder of each task's name in ``folder``. Where that has not the task's own test split,
        but one called validation, tests are of that."""
        return replace(self, tasks={task: {**own, **_of_files(task, folder)} for task, own in self.tasks.items()})

    def to_dict(self) -> dict[str, Any]:
        """As the file has it."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"seeds": list(self.seeds)}

    def write(self, path: Path) -> None:
        """The file that ``read`` reads."""
        import yaml

        with atomic_file(path) as partial:
            partial.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


def arguments_of(cell: Cell) -> tuple[ModelArguments, DataArguments, Any]:
    """The settings of a cell; ConfigError names the one at fault, UsageError one that there is not."""
    method = METHODS[cell.method]
    data = _built(DataArguments, cell.data, f"tasks.{cell.task}")
    settings = {**method.fixed, **cell.settings}
    if method.arguments is EvaluateArguments:
        settings |= {name: getattr(data, name) for name in _OF_DATA}
    elif method.seeded:
        settings["seed"] = cell.seed
    return _built(ModelArguments, cell.model, "model"), data, _built(method.arguments, settings, cell.label)


def _built(kind: type, given: Mapping[str, Any], where: str) -> Any:
    types = get_type_hints(kind)
    return kind(**dict(field_of(name, value, types, where) for name, value in given.items()))


def _require_known(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(str(name), given[name], f"no field of {what}, which has {', '.join(sorted(known))}")


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ConfigError(name, value, "fields, one a line")
    return dict(value or {})


def _of_files(task: str, folder: str) -> dict[str, Any]:
    """Where a task's rows are in a folder of folders."""
    files = Path(folder) / task_name(task)
    found = {"dataset": str(files)}
    if not is_text(task) and not any(files.glob(f"{get_task(task).eval_split}.*")) and any(files.glob("validation.*")):
        found["test_split"] = "validation"
    return found


def _named(name: str, value: Any) -> dict[str, dict[str, Any]]:
    """A list of names, or names with fields."""
    if isinstance(value, list):
        value = dict.fromkeys(map(str, value))
    return {str(one): _mapping(f"{name}.{one}", own) for one, own in _mapping(name, value).items()}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def task_name(task: str) -> str:
    """As files and tables have it."""
    return TEXT if is_text(task) else get_task(task).name.rpartition(":")[2]
