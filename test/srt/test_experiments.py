"""Experiments: what a file stands for, which cells are run and which are not, tables and plots of results."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang.srt.mezo.commands.experiment import ExperimentArguments, do, opened
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, UsageError
from sglang.srt.mezo.experiments.plots import curve_of, write_plots
from sglang.srt.mezo.experiments.runner import Folder
from sglang.srt.mezo.experiments.spec import METHODS, Experiment, arguments_of
from sglang.srt.mezo.experiments.tables import rows_of, write_tables

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "sglang.srt.mezo.commands.main", "experiment"]
FILE = {
    "model": "some/model",
    "tasks": {"sst2": {"num_dev": 10}, "rte": {}},
    "methods": {"zero-shot": {}, "mezo-lora": {"max_steps": 20, "grid": {"learning_rate": ["1e-3", 0.01]}}},
    "seeds": [0, 1],
}


def changed(**fields) -> Experiment:
    return Experiment.of({**FILE, **fields}, "mine")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_stands_for_its_cells():
    cells = changed().cells()
    assert [(cell.task, cell.label, cell.seed, cell.point) for cell in cells[:5]] == [
        ("sst2", "zero-shot", 0, {}),
        ("sst2", "mezo-lora", 0, {"learning_rate": "1e-3"}),
        ("sst2", "mezo-lora", 1, {"learning_rate": "1e-3"}),
        ("sst2", "mezo-lora", 0, {"learning_rate": 0.01}),
        ("sst2", "mezo-lora", 1, {"learning_rate": 0.01}),
    ]
    assert len(cells) == 10 and len({cell.id for cell in cells}) == 10
    model, data, config = arguments_of(cells[2])
    assert (model.model, data.task, data.num_dev) == ("some/model", "sst2", 10)
    assert config == MezoConfig(tuning="lora", max_steps=20, learning_rate=1e-3, seed=1)


def test_an_id_changes_with_any_setting_and_with_nothing_else():
    ids = [cell.id for cell in changed().cells()]
    assert ids == [cell.id for cell in changed(description="other").cells()]
    longer = {**FILE["methods"], "mezo-lora": {**FILE["methods"]["mezo-lora"], "max_steps": 21}}
    others = [cell.id for cell in changed(methods=longer).cells()]
    assert [one == other for one, other in zip(ids, others)] == [
        cell.label == "zero-shot" for cell in changed().cells()
    ]
    assert not {*ids} & {cell.id for cell in changed(model="another").cells()}


def test_methods_may_be_of_some_tasks_and_differ_by_task():
    methods = {"mezo-full": {"grid": {"learning_rate": [1]}, "by_task": {"rte": {"grid": {"learning_rate": [2, 3]}}}}}
    points = [(cell.task, cell.point["learning_rate"]) for cell in changed(methods=methods, seeds=[0]).cells()]
    assert points == [("sst2", 1), ("rte", 2), ("rte", 3)]
    for tasks in (["rte"], "rte"):  # one is a list of one
        assert [cell.task for cell in changed(methods={"icl": {"tasks": tasks}}).cells()] == ["rte"]


def test_what_is_left_out_is_told_with_its_reason(tmp_path):
    experiment = changed(methods={"zero-shot": {}, "icl": {"skip": {"rte": "too slow here"}}})
    assert [(cell.task, cell.label) for cell in experiment.cells()] == [
        ("sst2", "zero-shot"),
        ("sst2", "icl"),
        ("rte", "zero-shot"),
    ]
    assert "| icl | not run | too slow here |" in write_tables(Folder(tmp_path, experiment))


def test_the_rows_may_go_with_the_seed():
    cells = changed(data={"train_set_seed": "seed", "k": 16}, tasks=["sst2"]).cells()
    assert {(cell.seed, arguments_of(cell)[1].train_set_seed) for cell in cells} == {(0, 0), (1, 1)}


def test_the_file_of_the_docs_is_one():
    import yaml

    page = (ROOT / "docs" / "reproducing.md").read_text(encoding="utf-8")
    content, *_ = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    cells = Experiment.of(yaml.safe_load(content), "docs").cells()
    assert len(cells) == 2 + 2 + 12 + 12 + 1 + 6 and {cell.method for cell in cells} < METHODS.keys()


def test_one_seed_is_a_list_of_one():
    assert {cell.seed for cell in changed(seeds=7, methods={"mezo-lora": {}}).cells()} == {7}
    assert {cell.seed for cell in changed(methods={"mezo-lora": {"seeds": 5}}).cells()} == {5}


def test_rows_may_be_files(tmp_path):
    for task, split in (("sst2", "validation"), ("trec", "validation"), ("rte", "train")):
        (tmp_path / task).mkdir()
        (tmp_path / task / f"{split}.jsonl").write_text("")
    found = changed(tasks=["SST-2", "trec", "rte"]).with_data(str(tmp_path)).tasks
    assert found == {
        "SST-2": {"dataset": str(tmp_path / "sst2")},
        "trec": {"dataset": str(tmp_path / "trec"), "test_split": "validation"},  # its own is called test
        "rte": {"dataset": str(tmp_path / "rte")},
    }


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"model": None}, ConfigError, "model=None is not allowed: a hub name or a folder"),
        ({"tasks": None}, ConfigError, "tasks=None is not allowed: one at least"),
        ({"methods": {}}, ConfigError, "methods=None is not allowed: one at least"),
        ({"mehtods": {}}, ConfigError, "mehtods={} is not allowed: no field of experiment"),
        ({"methods": {"mezo": {}}}, ConfigError, "method='mezo' is not allowed: one of zero-shot, calibrated, icl, "),
        ({"methods": {"mezo-lora": {"lerning_rate": 1}}}, UsageError, "mezo-lora has an unknown field lerning_rate"),
        ({"methods": {"mezo-lora": {"learning_rate": -1}}}, ConfigError, "learning_rate=-1 is not allowed"),
        ({"methods": {"mezo-lora": {"learning_rate": "x"}}}, ConfigError, "learning_rate='x' is not allowed: a number"),
        ({"methods": {"mezo-lora": {"seed": 1}}}, ConfigError, "seed=1 is not allowed: nothing in an experiment"),
        ({"methods": {"mezo-lora": {"tasks": ["SST2"]}}}, ConfigError, "mezo-lora.tasks='SST2' is not allowed: of the"),
        ({"methods": {"icl": {"by_task": {"cb": {}}}}}, ConfigError, "icl.by_task='cb' is not allowed: of the"),
        ({"methods": {"icl": {"tasks": 5}}}, ConfigError, "icl.tasks=.*5.* is not allowed: of the experiment's tasks"),
        ({"methods": {"icl": {"tasks": [["rte"]]}}}, ConfigError, "icl.tasks=.*rte.* is not allowed: of the"),
        ({"methods": {"icl": {"by_task": "rte"}}}, ConfigError, "icl.by_task=.*rte.* is not allowed: fields, one a"),
        ({"methods": {"icl": {"skip": 5}}}, ConfigError, "icl.skip=.*5.* is not allowed: fields, one a line"),
        ({"methods": {"icl": {"skip": {"cb": "slow"}}}}, ConfigError, "icl.skip='cb' is not allowed: of the"),
        ({"methods": {"icl": {"skip": {"rte": None}}}}, ConfigError, "icl.skip.rte=None is not allowed: the reason"),
        ({"methods": {"icl": {"skip": ["rte"]}}}, ConfigError, "icl.skip=.* is not allowed: fields, one a line"),
        ({"methods": {"zero-shot": {"engine": "transformers"}}}, UsageError, "zero-shot has an unknown field engine"),
        ({"methods": {"mezo-lora": {"grid": [1]}}}, ConfigError, "grid=.* is not allowed: fields, one a line"),
        ({"methods": {"mezo-lora": {"grid": {"r": []}}}}, ConfigError, "mezo-lora.grid.r=.* is not allowed: one value"),
        ({"methods": {"mezo-lora": {"grid": {"r": [4, 4]}}}}, ConfigError, "mezo-lora.grid.r=.* and none twice"),
        (
            {"methods": {"mezo-lora": {"grid": {"seed": [5]}}}},
            ConfigError,
            "mezo-lora.seed=.* is not allowed: nothing in",
        ),
        ({"methods": {"mezo-lora": {"output": "x"}}}, ConfigError, "mezo-lora.output='x' is not allowed: nothing in"),
        (
            {"methods": {"mezo-lora": {"tuning": "full"}}},
            ConfigError,
            "mezo-lora.tuning='full' is not allowed: nothing",
        ),
        ({"methods": {"calibrated": {"calibrated": False}}}, ConfigError, "calibrated.calibrated=False is not allowed"),
        (
            {"methods": {"mezo-lora": {"lr": 1, "learning_rate": 2}}},
            ConfigError,
            "mezo-lora.learning_rate=2 is not allowed: nothing w",
        ),
        ({"methods": {"mezo-lora": {"by_task": {"rte": [1]}}}}, ConfigError, "mezo-lora.by_task.rte=.* is not allowed"),
        ({"methods": {"mezo-lora": {"method": ["icl"]}}}, ConfigError, "method=.*icl.* is not allowed: one of"),
        (
            {"methods": {"mezo-lora": {"tasks": []}}},
            ConfigError,
            "mezo-lora.tasks=.* is not allowed: one value at least",
        ),
        (
            {"methods": {"mezo-lora": {"seeds": []}}},
            ConfigError,
            "mezo-lora.seeds=.* is not allowed: one value at least",
        ),
        ({"methods": {"zero-shot": {"seeds": [1]}}}, ConfigError, "zero-shot.seeds=.* is not allowed: nothing where"),
        ({"methods": {"icl": {"skip": {"rte": ""}}}}, ConfigError, "icl.skip.rte='' is not allowed: the reason"),
        ({"seeds": []}, ConfigError, "seeds=.* is not allowed: one value at least"),
        ({"seeds": [0, 0]}, ConfigError, "seeds=.* is not allowed: one value at least, and none twice"),
        ({"seeds": ["a"]}, ConfigError, "seed='a' is not allowed: a whole number"),
        ({"tasks": ["sst2", "SST-2"]}, ConfigError, "tasks=.* is not allowed: one value at least, and none twice"),
        ({"data": {"num_tset": 5}}, UsageError, "data has an unknown field num_tset: did you mean num_test"),
        ({"methods": {"icl": {"max_length": 9}}}, ConfigError, "max_length=9 is not allowed: nothing of a method"),
        ({"paper": "77"}, ConfigError, "paper='77' is not allowed: a table of the MeZO paper: 1, 2, "),
        (
            {"paper": "1", "methods": {"icl": {"paper": "Icl"}}},
            ConfigError,
            "icl.paper='Icl' is not allowed: .*, ICL, ",
        ),
        ({"methods": {"icl": {"paper": "ICL"}}}, ConfigError, "icl.paper='ICL' is not allowed: nothing where"),
        (
            {"model": {"model": "a", "model_name": "b"}},
            ConfigError,
            "model.model_name='b' is not allowed: nothing where model stands",
        ),
        ({"tasks": ["sst9"]}, ValueError, "unknown task 'sst9'"),
        ({"tasks": {"sst2": {"num_dev": "many"}}}, ConfigError, "num_dev='many' is not allowed"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(fields, error, message):
    with pytest.raises(error, match=message):
        changed(**fields)


def test_a_file_that_cannot_be_read(tmp_path):
    for name, content in (("none", None), ("list", "- a"), ("broken", "a: [")):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(UsageError, match=str(path)):
            Experiment.read(path)


@pytest.mark.parametrize("text", ["seeds: 1\nseeds: 2\n", "methods: {icl: {}, icl: {num_demonstrations: 4}}\n"])
def test_what_stands_twice_in_a_file_is_an_error(tmp_path, text):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="experiment.yaml cannot be read: (seeds|icl) stands twice in"):
        Experiment.read(path)


def test_what_is_left_empty_is_as_if_it_were_not_there():
    experiment = changed(name=None, description=None, paper=None)
    assert (experiment.description, experiment.paper) == ("", "") and experiment.name


def test_a_mistake_on_the_command_line_leaves_no_experiment_behind(tmp_path):
    with pytest.raises(ConfigError, match="model.dtype='flot32' is not allowed"):
        opened("quick", ExperimentArguments(output_dir=str(tmp_path / "quick"), dtype="flot32"), make=True)
    assert not (tmp_path / "quick").exists()


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("run quick --cell 0", ConfigError, "cell='0' is not allowed: nothing with experiment run"),
        ("status quick --dry_run true", ConfigError, "dry_run=True is not allowed: nothing with experiment status"),
        ("cell quick --cell 0 --ray true", ConfigError, "ray=True is not allowed: nothing with experiment cell"),
        ("tables quick --slurm a", ConfigError, "slurm='a' is not allowed: nothing with experiment tables"),
        ("run quick --partition gpu", ConfigError, "partition='gpu' is not allowed: nothing without slurm"),
        ("run quick --gpus 2", ConfigError, "gpus=2 is not allowed: nothing without ray or slurm"),
        ("run quick --slurm a --dry_run true", ConfigError, "slurm='a' is not allowed: nothing beside dry_run"),
        ("cell quick", ConfigError, "cell=None is not allowed: a cell's number or id"),
        ("list quick", UsageError, "experiment list takes nothing, and not quick"),
    ],
)
def test_a_flag_that_would_change_nothing_is_refused(tmp_path, monkeypatch, line, error, message):
    monkeypatch.chdir(tmp_path)
    verb, *rest = line.split()
    with pytest.raises(error, match=message):
        do(verb, rest)


def test_a_dry_run_of_a_cell_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    do("cell", ["quick", "--cell", "5", "--dry_run", "true"])
    assert capsys.readouterr().out.startswith("   5 sst2-mezo-alora-seed1-") and not list(tmp_path.iterdir())


def test_a_model_may_have_the_name_that_others_have_for_it():
    assert changed(model={"model_name": "m"}).cells()[0].model == changed(model={"model": "m"}).cells()[0].model


def test_a_folder_keeps_to_its_experiment(tmp_path):
    wanted = ExperimentArguments(output_dir=str(tmp_path / "quick"))
    folder = opened("quick", wanted, make=True)
    again = opened(str(tmp_path / "quick"), ExperimentArguments(), make=False)
    assert [cell.id for cell in again.experiment.cells()] == [cell.id for cell in folder.experiment.cells()]
    with pytest.raises(ConfigError, match="output_dir=.* says something else"):
        opened("quick", ExperimentArguments(output_dir=str(tmp_path / "quick"), model="another"), make=True)
    with pytest.raises(
        ConfigError, match="experiment='slow' is not allowed: a folder with an experiment.yaml, or one of"
    ):
        opened("slow", ExperimentArguments(), make=False)


# --- tables and plots -------------------------------------------------------------------------------------------------


def result(cell, accuracy: float, dev: float | None = None, **info) -> dict:
    """As ``run_cell`` writes one."""
    steps = {"steps": 20, "train_seconds": 10.0, "forward_passes": 40, **info} if dev is not None else {}
    evaluations = [{"step": step, "eval_loss": 1.0 - step / 40, "eval_accuracy": dev} for step in (0, 10, 20)]
    return {
        "run_info": {"point": cell.point, "total_time": 12.5, "seed": cell.seed},
        "test": {"loss": 0.5, "accuracy": accuracy},
        "zero_shot": {"accuracy": 0.5},
        "dev": {} if dev is None else {"loss": 0.5, "accuracy": dev},
        "train_info": {"peak_rss_bytes": 2**30, "train_seconds": 0.0, **steps},
        "evaluations": evaluations if dev is not None else [],
    }


@pytest.fixture
def folder(tmp_path) -> Folder:
    """Results of a grid of two rates, of three seeds the first two."""
    methods = {**FILE["methods"], "mezo-lora": {**FILE["methods"]["mezo-lora"], "paper": "MeZO (LoRA)"}}
    experiment = changed(methods=methods, paper=1, seeds=[0, 1, 2])
    (tmp_path / "results").mkdir()
    accuracy = {("1e-3", 0): (0.80, 0.7), (0.01, 0): (0.90, 0.6), ("1e-3", 1): (0.70, 0.5), (0.01, 1): (0.84, 0.8)}
    folder = Folder(tmp_path, experiment)
    for cell in experiment.cells():
        if cell.task == "sst2":
            if cell.label == "zero-shot":
                found = result(cell, 0.5)
            elif (point := (cell.point["learning_rate"], cell.seed)) in accuracy:
                found = result(cell, *accuracy[point])
            else:
                continue
            (tmp_path / "results" / f"{cell.id}.json").write_text(json.dumps(found))
    return folder


def test_a_grid_is_chosen_by_development_rows_and_told_by_test_rows(folder):
    [row] = [row for row in rows_of(folder) if (row.task, row.label) == ("sst2", "mezo-lora")]
    assert row.values == pytest.approx([80.0, 84.0])
    assert [one["run_info"]["point"]["learning_rate"] for one in row.chosen] == ["1e-3", 0.01]
    assert row.paper == (89.6, None) and row.mean_of("train_info", "forward_passes") == 40


def test_tables_say_what_was_measured_and_what_was_not(folder):
    text = write_tables(folder)
    assert "| method | SST-2 | RTE |" in text
    assert "| zero-shot | 50.0 | not run |" in text
    assert "| mezo-lora | 82.0 ± 2.0 (2) [89.6, -7.6] (2 not run) | not run |" in text
    [cell] = [
        cell
        for cell in folder.open_cells()
        if (cell.task, cell.seed, cell.point) == ("sst2", 2, {"learning_rate": 0.01})
    ]
    failure = folder.files(cell).failure
    failure.parent.mkdir()
    failure.write_text("error")
    assert "(1 not run, 1 failed) | not run |" in write_tables(folder)
    failure.unlink()
    text = write_tables(folder)
    assert "| sst2 | mezo-lora | learning_rate 0.01; learning_rate 1e-3 | 12 s | 10 s | 40 |" in text
    assert "| sst2 | mezo-lora | +32.0 | +30.0 to +34.0 |\n" in text, "nothing there to be a share of"
    assert (folder.path / "tables.md").read_text() == text
    lines = (folder.path / "tables.csv").read_text().splitlines()
    assert lines[2].startswith("sst2,mezo-lora,accuracy,2,82.0") and len(lines) == 3
    assert dict(zip(lines[0].split(","), lines[2].split(",")))["zero_shot"] == "50.0", "percent, as all the others"


def test_a_run_without_test_rows_has_a_place_in_tables(tmp_path):
    folder = Folder(tmp_path, changed(methods={"zero-shot": {}, "mezo-lora": {}}, seeds=0))
    (tmp_path / "results").mkdir()
    for cell in folder.experiment.cells():
        found = {**result(cell, 0.5, 0.6), **({"test": {}} if cell.label == "mezo-lora" else {})}
        (tmp_path / "results" / f"{cell.id}.json").write_text(json.dumps(found))
    assert "| mezo-lora | no test rows | no test rows |" in write_tables(folder)
    assert len((tmp_path / "tables.csv").read_text().splitlines()) == 3 and "sst2.png" in write_plots(folder)


def test_what_is_gained_is_a_share_of_what_gradients_gain(tmp_path):
    folder = Folder(tmp_path, changed(methods={"zero-shot": {}, "ft-lora": {}, "mezo-alora": {}}, seeds=[0, 1]))
    (tmp_path / "results").mkdir()
    scores = {"zero-shot": [0.5], "ft-lora": [0.9, 0.7], "mezo-alora": [0.65, 0.75]}
    for cell in folder.experiment.cells():
        if cell.task == "sst2":
            found = result(cell, scores[cell.label][cell.seed], None if cell.label == "zero-shot" else 0.6)
            (tmp_path / "results" / f"{cell.id}.json").write_text(json.dumps(found))
    assert "| sst2 | mezo-alora | +20.0 | +15.0 to +25.0 | 67% of +30.0 |\n" in write_tables(folder)


def test_curves_go_over_steps_passes_and_time(folder):
    [row] = [row for row in rows_of(folder) if row.label == "mezo-lora" and row.chosen]
    assert curve_of(row.chosen[0], "forward_passes", "eval_loss") == [(0, 1.0), (20, 0.75), (40, 0.5)]
    assert curve_of(row.chosen[0], "seconds", "eval_loss") == [(0, 1.0), (5.0, 0.75), (10.0, 0.5)]
    assert curve_of(rows_of(folder)[0].chosen[0], "step", "eval_loss") == []
    written = write_plots(folder).splitlines()
    assert [Path(path).name for path in written] == ["sst2.png", "memory.png", "memory_by_size.png"]
    assert all(Path(path).stat().st_size > 5000 for path in written)


def test_a_folder_without_results(tmp_path):
    folder = Folder(tmp_path, changed())
    assert "not run" in write_tables(folder) and write_plots(folder) == "there is no result to plot"


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_an_array_of_slurm_has_a_task_for_each_open_cell(folder):
    script = folder.sbatch(folder.open_cells(), "gpu", 2, "12:00:00")
    options = dict(
        line.removeprefix("#SBATCH --").split("=", 1) for line in script.splitlines() if line.startswith("#SBATCH")
    )
    assert (options["partition"], options["gpus-per-task"], options["time"]) == ("gpu", "2", "12:00:00")
    open_cells = [folder.experiment.cells()[int(place)] for place in options["array"].split(",")]
    assert open_cells == folder.open_cells() and len(open_cells) == 14 - 5
    [command] = [line for line in script.splitlines() if " experiment cell " in line]
    assert command.endswith(f'experiment cell {folder.path} --cell "$SLURM_ARRAY_TASK_ID"')
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    assert (
        folder.cell(options["array"].split(",")[0]) == open_cells[0] and folder.cell(open_cells[1].id) == open_cells[1]
    )
    with pytest.raises(ConfigError, match="cell='99' is not allowed: a number from 0 to 13"):
        folder.cell("99")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_ray_is_asked_for_where_it_is_not(folder):
    with pytest.raises(ConfigError, match="ray=True is not allowed: false without Ray"):
        folder.run_by_ray(folder.open_cells(), 0)
