"""An experiment: one YAML file, and the cells that it stands for."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from sglang.srt.mezo.core.atomic import atomic_file
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, UsageError
from sglang.srt.mezo.data.named import TEXT, is_text
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.data.tasks import get_task
from sglang.srt.mezo.experiments import paper
from sglang.srt.mezo.experiments.first_order import FirstOrderArguments
from sglang.srt.mezo.training.arguments import SAME, field_of
from sglang.srt.mezo.training.evaluate import EvaluateArguments
from sglang.srt.mezo.training.finetune import ModelArguments
from sglang.srt.mezo.training.yaml_file import read_yaml

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
        seeded: whether its seed changes anything beside the rows.
        defaults: others that it has where nobody says them.
    """

    arguments: type
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def on_one_device(self) -> bool:
        """Whether Transformers has the whole model on one device, in the place of an engine."""
        return self.arguments in (FirstOrderArguments, ProbeArguments)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """With those that nobody has to say."""
        return {**self.fixed, **self.defaults, **given}


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
    "icl": Method(EvaluateArguments, seeded=False, defaults={"num_demonstrations": 32}),
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
        content = read_yaml(path, str(path))
        if not isinstance(content, dict):
            raise UsageError(f"{path} holds no experiment: a name, a model, tasks and methods")
        return cls.of(content, path.parent.name)

    @classmethod
    def of(cls, content: Mapping[str, Any], name: str) -> "Experiment":
        """Raises ConfigError."""
        _require_known("experiment", content, _KEYS)
        model = content.get("model")
        experiment = cls(
            str(content.get("name") or name),
            str(content.get("description") or ""),
            str(content.get("paper") or ""),
            {"model": model}
            if isinstance(model, str)
            else _require_fields("model", ModelArguments, _mapping("model", model)),
            _mapping("data", content.get("data")),
            _named("tasks", content.get("tasks")),
            _named("methods", content.get("methods")),
            tuple(_distinct("seeds", content.get("seeds", 0))),
        )
        experiment.require_valid()
        return experiment

    def require_valid(self) -> None:
        """Raise ConfigError, or UsageError for a setting that there is not."""
        if "model" not in self.model:
            raise ConfigError("model", None, "a hub name or a folder")
        for required in ("tasks", "methods"):
            if not getattr(self, required):
                raise ConfigError(required, None, "one at least")
        _distinct("tasks", list(map(task_name, self.tasks)))
        _require_fields("model", ModelArguments, self.model)
        _require_fields("data", DataArguments, {name: value for name, value in self.data.items() if value != SEED})
        if self.paper and self.paper not in paper.TABLES:
            raise ConfigError("paper", self.paper, f"a table of the MeZO paper: {', '.join(paper.TABLES)}")
        for label, of_method in self.methods.items():
            if (row := of_method.get("paper")) is not None and row not in paper.TABLES.get(self.paper, {}):
                known = ", ".join(paper.TABLES.get(self.paper, {})) or "nothing where the experiment has no paper"
                raise ConfigError(f"{label}.paper", row, known)
            if "tasks" in of_method:
                self._require_tasks(f"{label}.tasks", _distinct(f"{label}.tasks", of_method["tasks"]))
            for name in ("skip", "by_task"):
                self._require_tasks(f"{label}.{name}", _mapping(f"{label}.{name}", of_method.get(name)))
        for cell in self.cells():
            arguments_of(cell)

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
        if task in reasons and not (isinstance(reasons[task], str) and reasons[task]):
            raise ConfigError(f"{label}.skip.{task}", reasons[task], "the reason, in words")
        return reasons.get(task, "")

    def _cells(self, task: str, of_task: dict[str, Any], label: str, of_method: dict[str, Any]) -> Iterator[Cell]:
        by_task = _mapping(f"{label}.by_task", of_method.get("by_task"))
        of_method = {**of_method, **_mapping(f"{label}.by_task.{task}", by_task.get(task))}
        method = of_method.get("method", label)
        if not isinstance(method, str) or method not in METHODS:
            raise ConfigError("method", method, f"one of {', '.join(METHODS)}")
        settings = {name: value for name, value in of_method.items() if name not in _OF_A_METHOD}
        grid = _mapping(f"{label}.grid", of_method.get("grid"))
        _require_settings(label, METHODS[method], {**settings, **grid})
        data = {"task": task, **self.data, **of_task}
        points = [_distinct(f"{label}.grid.{name}", values) for name, values in grid.items()]
        for values in itertools.product(*points):
            point = dict(zip(grid, values))
            for seed in self._seeds(label, of_method, METHODS[method].seeded or SEED in data.values()):
                of_seed = {name: seed if value == SEED else value for name, value in data.items()}
                yield Cell(task, label, method, seed, point, {**settings, **point}, self.model, of_seed)

    def _seeds(self, label: str, of_method: dict[str, Any], drawn: bool) -> Sequence[int]:
        """Of a method's cells: one where a seed changes nothing."""
        if drawn:
            return _distinct(f"{label}.seeds", of_method.get("seeds", list(self.seeds)))
        if "seeds" in of_method:
            raise ConfigError(f"{label}.seeds", of_method["seeds"], "nothing where nothing is drawn by a seed")
        return (0,)

    def _require_tasks(self, name: str, tasks: Iterable[str]) -> None:
        for task in tasks:
            if not isinstance(task, str) or task not in self.tasks:
                raise ConfigError(name, task, f"of the experiment's tasks, as it calls them: {', '.join(self.tasks)}")

    def with_model(self, **given: Any) -> "Experiment":
        """The same of another model, or of one that runs otherwise."""
        changed = replace(self, model={**self.model, **given})
        changed.require_valid()
        return changed

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
    settings = method.settings(cell.settings)
    if method.arguments is EvaluateArguments:
        settings |= {name: getattr(data, name) for name in _OF_DATA}
    elif method.seeded:
        settings["seed"] = cell.seed
    model = {**cell.model, "tp_size": 1} if method.on_one_device else cell.model
    return _built(ModelArguments, model, "model"), data, _built(method.arguments, settings, cell.label)


def _built(kind: type, given: Mapping[str, Any], where: str) -> Any:
    with _within(where):
        return kind(**_require_fields(where, kind, given))


def _require_fields(where: str, kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass, each once and with a value of its type."""
    types, found = get_type_hints(kind), {}
    for given_name, value in given.items():
        with _within(where):
            name, read = field_of(given_name, value, types, where)
        if name in found:
            raise ConfigError(f"{where}.{given_name}", value, f"nothing where {name} stands, which is the same")
        found[name] = read
    return found


@contextmanager
def _within(where: str) -> Iterator[None]:
    """A field that is not allowed is named with what it is a field of."""
    try:
        yield
    except ConfigError as error:
        if error.field.startswith(f"{where}."):
            raise
        raise ConfigError(f"{where}.{error.field}", error.value, error.allowed) from error


def _require_settings(label: str, method: Method, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that a method has not to say, or not otherwise."""
    for name, value in given.items():
        known = SAME.get(name, name)
        if known in _NOT_SET:
            raise ConfigError(f"{label}.{name}", value, "nothing in an experiment, which sets it")
        if known in (*_OF_DATA, "split", "rows"):
            raise ConfigError(f"{label}.{name}", value, "nothing of a method: data and tasks have the rows")
        if known in method.fixed:
            raise ConfigError(f"{label}.{name}", value, f"nothing beside the method, which has {method.fixed[known]}")


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


def _distinct(name: str, value: Any) -> list[Any]:
    """The values of a list, or the one that stands for it."""
    values = _list(value)
    told = list(map(repr, values))
    if not values or len(set(told)) < len(told):
        raise ConfigError(name, value, "one value at least, and none twice")
    return values


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def task_name(task: str) -> str:
    """As files and tables have it."""
    return TEXT if is_text(task) else get_task(task).name.rpartition(":")[2]
