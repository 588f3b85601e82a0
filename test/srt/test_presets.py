"""The named experiments: well formed, with the official settings, and what they would take."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from sglang.srt.mezo.commands.check import CheckArguments
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.data.named import is_text
from sglang.srt.mezo.data.splits import DataArguments
from sglang.srt.mezo.data.tasks import get_task
from sglang.srt.mezo.experiments.cost import command_of, cost_of, dry_run
from sglang.srt.mezo.experiments.first_order import FirstOrderArguments
from sglang.srt.mezo.experiments.paper import figure
from sglang.srt.mezo.experiments.readiness import memory_of, needs_of
from sglang.srt.mezo.experiments.spec import METHODS, PRESETS, Experiment, arguments_of, task_name
from sglang.srt.mezo.training.arguments import build, read
from sglang.srt.mezo.training.finetune import ModelArguments
from sglang.srt.mezo.training.usable import require_metric

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_well_formed(path):
    experiment = Experiment.read(path)
    assert experiment.name == path.stem and experiment.description.endswith(".")
    assert experiment.cells()
    for label, method in experiment.methods.items():
        if (row := method.get("paper")) is not None:
            cells = [cell for cell in experiment.cells() if cell.label == label]
            assert any(figure(experiment.paper, row, task_name(cell.task)) for cell in cells), label


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cell_is_chosen_by_what_its_task_has(path):
    for cell in Experiment.read(path).cells():
        _, data, arguments = arguments_of(cell)
        if isinstance(arguments, MezoConfig | FirstOrderArguments) and not is_text(data.task):
            require_metric(arguments.metric_for_best_model, get_task(cell.task).objective)


STEP = {
    "max_steps": 20000,
    "eval_steps": 4000,
    "per_device_train_batch_size": 16,
    "num_perturbations": 1,
    "estimator": "two_sided",
    "perturbation": "gaussian",
    "scale_by_loss_std": False,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "optim": "sgd",
    "warmup_steps": 0,
    "seed": 42,
}
ROBERTA = {**STEP, "max_steps": 100000, "eval_steps": 10000, "per_device_train_batch_size": 64}
"""Of the official scripts: 20,000 steps of 16 rows for OPT, 100,000 of 64 for RoBERTa."""
GENERATION = ("squad", "drop")


def grid_of(experiment: Experiment, label: str, task: str, field: str = "learning_rate") -> list[float]:
    found = {
        getattr(arguments_of(cell)[2], field)
        for cell in experiment.cells()
        if (cell.label, cell.task.lower()) == (label, task)
    }
    return sorted(found)


def settings_of(experiment: Experiment, label: str) -> list[dict]:
    return [vars(arguments_of(cell)[2]) for cell in experiment.cells() if cell.label == label]


def test_table_1_has_the_official_settings():
    experiment = Experiment.read(PRESETS / "table1.yaml")
    assert experiment.model == {"model": "facebook/opt-13b", "dtype": "float16"} and len(experiment.tasks) == 11
    for label, eps, rates, generation in (
        ("mezo-full", 1e-3, [1e-7, 1e-6], [1e-7, 5e-7, 1e-6]),
        ("mezo-lora", 1e-2, [5e-5, 1e-4], [1e-5, 5e-5, 1e-4]),
        ("mezo-prefix", 1e-1, [1e-3, 1e-2], [5e-3, 1e-2, 5e-2]),
    ):
        for settings in settings_of(experiment, label):
            assert STEP.items() <= settings.items() and settings["zo_eps"] == eps
        for task in map(str.lower, experiment.tasks):
            assert grid_of(experiment, label, task) == (generation if task in GENERATION else rates)
    assert all(
        (one["r"], one["lora_alpha"], one["target_modules"]) == (8, 16, ["q_proj", "v_proj"])
        for one in settings_of(experiment, "mezo-lora")
    )
    assert all(
        (one["num_virtual_tokens"], one["prefix_positions"]) == (5, "unshifted")
        for one in settings_of(experiment, "mezo-prefix")
    )
    assert all(one["num_demonstrations"] == 32 for one in settings_of(experiment, "icl"))
    for settings in settings_of(experiment, "ft-full"):
        assert (settings["per_device_train_batch_size"], settings["num_train_epochs"]) == (8, 5)
        assert (settings["lr_scheduler_type"], settings["weight_decay"]) == ("linear", 0.0)
    assert grid_of(experiment, "ft-full", "sst2") == [1e-5, 5e-5, 8e-5]
    assert grid_of(experiment, "head-tuning", "squad") == [1e-4, 5e-4]
    data = [arguments_of(cell)[1] for cell in experiment.cells()]
    assert {(one.num_train, one.num_dev, one.num_test, one.train_set_seed) for one in data} == {(1000, None, 1000, 0)}


@pytest.mark.parametrize("k", [16, 512])
def test_table_18_has_the_official_settings(k):
    experiment = Experiment.read(PRESETS / f"table18-k{k}.yaml")
    assert experiment.model["model"] == "FacebookAI/roberta-large" and experiment.seeds == (13, 21, 42, 87, 100)
    for label, eps, decay, rates in (
        ("mezo-full", 1e-3, 0.0, [1e-7, 1e-6, 1e-5]),
        ("mezo-lora", 1e-3, 0.1, [1e-5, 5e-5, 1e-4]),
        ("mezo-prefix", 1e-1, 0.0, [1e-3, 5e-3, 1e-2]),
        ("mezo-adam", 1e-3, 0.0, [1e-6, 1e-5, 1e-4, 5e-4, 1e-3]),
    ):
        for settings in settings_of(experiment, label):
            expected = {**ROBERTA, "seed": settings["seed"], "weight_decay": decay, "zo_eps": eps}
            expected |= {"optim": "adamw"} if label == "mezo-adam" else {}
            expected |= {"metric_for_best_model": "accuracy"}
            assert expected.items() <= settings.items()
        assert grid_of(experiment, label, "rte") == rates
    batches = [2, 4, 8] if k == 16 else [8, 16, 32]
    assert grid_of(experiment, "ft-full", "rte") == [1e-5, 3e-5, 5e-5]
    assert grid_of(experiment, "ft-full", "rte", "per_device_train_batch_size") == batches
    assert grid_of(experiment, "ft-lora", "rte") == [1e-4, 3e-4, 5e-4]
    first = {"max_steps": 1000, "eval_steps": 100, "metric_for_best_model": "accuracy"}
    assert all(first.items() <= one.items() for one in settings_of(experiment, "ft-full"))
    for cell in experiment.cells():
        data = arguments_of(cell)[1]
        assert data.k == k and data.train_set_seed == cell.seed
    for label in experiment.methods:
        seeds = {cell.seed for cell in experiment.cells() if cell.label == label}
        assert seeds == ({42} if label == "zero-shot" else {13, 21, 42, 87, 100}), label


def test_a_dry_run_says_what_it_would_take():
    experiment = Experiment.read(PRESETS / "table1.yaml")
    lines = dry_run(experiment)
    assert len(lines) == len(experiment.cells()) + 1 and all("\n     sglang-mezo " in line for line in lines[:-1])
    [cell] = [cell for cell in experiment.cells() if cell.label == "mezo-lora" and cell.task == "RTE"][:1]
    assert cost_of(cell).forward_passes == 40000 and 0.1 < cost_of(cell).hours < 20
    assert command_of(cell).startswith(
        "sglang-mezo train --model facebook/opt-13b --dtype float16 --task RTE --tuning lora"
    )
    assert "--learning_rate 1e-4" in command_of(cell)
    [zero] = [cell for cell in experiment.cells() if cell.label == "zero-shot" and cell.task == "RTE"]
    assert cost_of(zero).forward_passes == 0 and command_of(zero).startswith("sglang-mezo evaluate --model facebook/")


def test_the_commands_of_a_dry_run_are_understood():
    from sglang.srt.mezo.commands.evaluate import KINDS as EVALUATE
    from sglang.srt.mezo.commands.train import KINDS as TRAIN
    from sglang.srt.mezo.training.arguments import build, read

    for cell in Experiment.read(PRESETS / "table1.yaml").cells():
        words = command_of(cell).split()
        if words[1] in ("train", "evaluate"):
            kinds = TRAIN if words[1] == "train" else EVALUATE
            *_, built = build(kinds, read(words[2:], kinds))
            if words[1] == "train":
                assert built == arguments_of(cell)[2]
        else:
            assert isinstance(arguments_of(cell)[2], FirstOrderArguments) or cell.method == "linear-probing"


def test_what_a_machine_lacks_is_told_before_a_run(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    needs = needs_of(Experiment.read(PRESETS / "quick.yaml"))
    assert [need.what for need in needs if not need.enough] == []
    assert [need.found for need in needs if need.what.startswith(("model", "data"))] == ["here", "here"]
    missing = {need.what: need.found for need in needs_of(Experiment.read(PRESETS / "table1.yaml")) if not need.enough}
    assert missing["model facebook/opt-13b"].startswith("neither here nor on a hub that answers")
    assert missing["data of CB: aps/super_glue"].startswith("neither here nor on a hub that answers")


def test_memory_by_the_cost_model():
    assert memory_of("mezo-lora", 10e9, "float16") == pytest.approx(22e9)
    assert memory_of("mezo-full", 10e9, "float16") == pytest.approx(66e9)
    assert memory_of("ft-full", 1e9, "float32") == pytest.approx(22e9)
    assert memory_of("mezo-lora", 10e9, "float16", tp_size=4) == pytest.approx(5.5e9)
    assert memory_of("mezo-full", 10e9, "float16", tp_size=4) == pytest.approx(49.5e9), "each card has the float32 copy"


def test_what_transformers_runs_has_one_device():
    experiment = Experiment.read(PRESETS / "table1.yaml").with_model(tp_size=2)
    sizes = {cell.method: arguments_of(cell)[0].tp_size for cell in experiment.cells()}
    assert sizes == {method: 1 if METHODS[method].on_one_device else 2 for method in sizes}
    assert {method for method, size in sizes.items() if size == 1} == {"linear-probing", "head-tuning", "ft-full"}


def test_small_tasks_have_fewer_steps_of_gradients():
    cells = Experiment.read(PRESETS / "table1.yaml").cells()
    steps = {task_name(cell.task): cost_of(cell).backward_passes for cell in cells if cell.method == "ft-full"}
    assert (steps["cb"], steps["copa"], steps["wsc"], steps["sst2"]) == (95, 190, 35, 625)


def test_qwen_on_fineweb_is_the_run_of_the_examples():
    [cell] = Experiment.read(PRESETS / "qwen3-32b-fineweb.yaml").cells()
    kinds = (ModelArguments, DataArguments, MezoConfig)
    model, data, config = build(kinds, read(["--config", str(ROOT / "examples" / "qwen3_32b_fineweb.yaml")], kinds))
    assert arguments_of(cell) == (model, data, replace(config, estimator="two_sided"))
    assert config.estimator == "two_sided"


def test_a_dry_run_needs_no_checkpoint(monkeypatch):
    assert dry_run(Experiment.read(PRESETS / "smollm2.yaml"))[-1].startswith("70 cells, ")
    unknown = Experiment.of({"model": "no/model", "tasks": ["sst2"], "methods": {"mezo-lora": {}}}, "mine")
    *_, cell, total = dry_run(unknown)
    assert "passes, hours unknown\n" in cell and total.endswith("cells, hours unknown")


def test_two_questions_are_one_too_many():
    with pytest.raises(ConfigError, match="against='0.5.22' is not allowed: nothing beside reproduction"):
        CheckArguments(against="0.5.22", reproduction="table1")


def test_the_page_of_what_is_reproduced_is_what_results_say():
    made = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "reproducing_page.py"))
    text = made["PAGE"].read_text(encoding="utf-8")
    assert text == made["page"](text), "python scripts/reproducing_page.py"
    assert "500 steps of one direction. | 1 | 1,000 | 0.04 | 216.5 GB (mezo-full) | no |" in text
