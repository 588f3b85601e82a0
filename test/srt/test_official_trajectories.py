"""Six steps of the official implementation of MeZO, on a tiny OPT, repeated with its own directions.

The directions are PyTorch's, drawn as the official code draws them. Two things differ by design. Its weights drift: it
adds eps z, takes away 2 eps z and adds eps z in place, where ours are restored bit for bit; in float32 that is far
below what is asserted. And its losses are float32 numbers, where ours are added up in float64: a loss of 11 is a
multiple of 9.5e-7, so its projected gradient may be off by that over 2 eps (``resolution``), and theta with it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.prefix_adapter import KVShape, PrefixSpec
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example

SHARED = Path(__file__).resolve().parents[3] / "shared"
GOLDEN = SHARED / "golden"
pytestmark = pytest.mark.skipif(not (GOLDEN / "traj").is_dir(), reason="the official trajectories are not here")

RUNS = [("SST2", "ft"), ("CB", "ft"), ("Copa", "ft"), ("SST2", "lora"), ("SQuAD", "lora"), ("SST2", "prefix")]
LORA = {"r": 8, "lora_alpha": 16}
TUNINGS = {
    "ft": {"tuning": "full"},
    "lora": {"tuning": "lora", **LORA},
    "prefix": {"tuning": "prefix", "prefix_positions": "unshifted"},
}


# --- run in the engine's process --------------------------------------------------------------------------------------


def steps(engine, spec, objective: str, settings: dict, start: dict, batches, seeds):
    """(losses at both signs, norm of theta) of every step, and theta at the end by the official names.

    Args:
        start: what is trained, by the official names in the official order.
    """
    from sglang.srt.mezo.training.trainer import MezoTrainer

    config = MezoConfig(num_perturbations=1, estimator="two_sided", scale_by_loss_std=False, **settings)
    train = [example for batch in batches for example in batch]
    trainer = MezoTrainer(engine.handle, config, spec, train, objective=objective)
    views = {name: view_of(trainer.trainable, name) for name in start}
    for name, values in start.items():
        views[name].copy_(values)
    results, first = [], 0
    try:
        for batch, seed in zip(batches, seeds):
            plans = trainer.source.plans[first : first + len(batch)]
            first += len(batch)
            z = torch.full_like(trainer.trainable.theta, torch.nan)
            for name, values in official_direction(seed, {name: one.shape for name, one in start.items()}).items():
                view = views[name]
                z.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(values)
            directions = KeptDirections([z])
            (plus,), (minus,) = drain(trainer.probe.loss_passes(plans, directions, config.zo_eps))
            (grad,) = trainer.probe.estimate([plus], [minus], config.zo_eps)
            trainer.optimizer.step(directions, [grad], config.learning_rate)
            results.append((plus, minus, trainer.trainable.theta.double().norm().item()))
        return results, {name: view.clone() for name, view in views.items()}
    finally:
        trainer.close()


def view_of(trainable, name: str) -> torch.Tensor:
    """Of theta, by an official name."""
    if name.endswith((".lora_A", ".lora_B")):
        return trainable.state_dict()[f"base_model.model.{name}.weight"]
    if name.endswith((".prefix_keys", ".prefix_values")):
        layer = int(name.split(".")[3])
        return trainable.theta.view(trainable.by_layer)[:, layer, int(name.endswith("values"))].flatten(1)
    return trainable.state_dict()[name]


def official_direction(seed: int, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: torch.normal(mean=0.0, std=1.0, size=shape) for name, shape in shapes.items()}


# --- the official rows ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encode():
    from tokenizers import ByteLevelBPETokenizer

    folder = GOLDEN / "tokenizer"
    tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return lambda text: tuple(tokenizer.encode(text).ids)


def texts(task: str, row: dict) -> tuple[str, list[str], int]:
    """Prompt, options and the right one; of what is taught by the right one alone, that."""
    if task == "SST2":
        return row["sentence"].strip() + " It was", [" terrible", " great"], row["label"]
    if task == "CB":
        asked = f'Suppose {row["premise"]} Can we infer that "{row["hypothesis"]}"? Yes, No, or Maybe?\n'
        return asked, ["Yes", "No", "Maybe"], row["label"]
    if task == "Copa":
        choice = row[f"choice{row['label'] + 1}"]
        word, _, rest = choice.partition(" ")
        lowered = choice if word == "I" else f"{word.lower()} {rest}"
        joined = {"cause": " because", "effect": " so"}[row["question"]]
        return row["premise"].rstrip().removesuffix(".") + joined, [f" {lowered}"], 0
    asked = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return asked, [f" {row['answers']['text'][0]}\n"], 0


def example(encode, task: str, row: dict) -> Example:
    prompt, options, label = texts(task, row)
    ids = encode(prompt.strip(" "))
    whole = [encode((prompt + option).strip(" ")) for option in options]
    assert all(one[: len(ids)] == ids for one in whole)
    return Example((0, *ids), tuple(one[len(ids) :] for one in whole), label)


# --- the runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("official") / "model"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "traj" / "model.safetensors", folder / "model.safetensors")
    config = json.loads((GOLDEN / "traj" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OPTForCausalLM"]}))
    return str(folder)


@pytest.fixture(scope="module")
def engines(model):
    """By what is trained; an engine with LoRA has other layers."""
    arguments = dict(model_path=model, dtype="float32", skip_tokenizer_init=True, max_total_tokens=20000)
    made = {
        "others": EngineProcess(**arguments),
        "lora": EngineProcess(**arguments, r=LORA["r"], target_modules=("q_proj", "v_proj"), num_slots=3),
    }
    yield made
    for engine in made.values():
        engine.close()


def spec_of(model: str, mode: str):
    if mode == "ft":
        return WeightsSpec(model)
    if mode == "prefix":
        return PrefixSpec(model, 5, KVShape.of(AutoConfig.from_pretrained(model)), "unshifted")
    return AdapterSpec(model, **LORA, target_modules=("q_proj", "v_proj"))


def official_steps(run: dict, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The end of the official run by its own arithmetic, from the projected gradients that it wrote down."""
    theta = {name: value.clone() for name, value in start.items()}
    for step in run["steps"]:
        z = official_direction(step["seed"], {name: value.shape for name, value in theta.items()})
        for name, value in theta.items():
            for scale in (1, -2, 1):
                value.add_(scale * z[name] * run["zo_eps"])
            value.sub_(run["learning_rate"] * (step["projected_grad"] * z[name]))
    return theta


def resolution(step: dict, zo_eps: float) -> float:
    """Of a projected gradient whose losses are float32 numbers."""
    return float(np.spacing(np.float32(step["loss_plus"]))) / (2 * zo_eps)


@pytest.mark.parametrize(("task", "mode"), RUNS)
def test_losses_and_weights_are_the_official_ones(model, engines, encode, task, mode):
    runs = map(json.loads, (GOLDEN / "traj" / "traj.jsonl").read_text().splitlines())
    run = next(run for run in runs if (run["task"], run["mode"]) == (task, mode))
    rows = [json.loads(line) for line in (SHARED / "data" / task.lower() / "train.jsonl").read_text().splitlines()]
    batches = [[example(encode, task, rows[i]) for i in step["rows"]] for step in run["steps"]]
    loaded = load_file(GOLDEN / "traj" / ("model.safetensors" if mode == "ft" else f"{mode}-init.safetensors"))
    start = {name: loaded[name] for name, _ in run["trainable"]}
    settings = {"learning_rate": run["learning_rate"], "zo_eps": run["zo_eps"], **TUNINGS[mode]}
    objective = "classification" if run["train_as_classification"] else "completion"
    seeds = [step["seed"] for step in run["steps"]]
    engine = engines["lora" if mode == "lora" else "others"]
    results, theta = engine.call(steps, spec_of(model, mode), objective, settings, start, batches, seeds)
    for (plus, minus, norm), step in zip(results, run["steps"], strict=True):
        assert plus == pytest.approx(step["loss_plus"], abs=1e-5)
        assert minus == pytest.approx(step["loss_minus"], abs=1e-5)
        assert norm == pytest.approx(step["norm_of_trainable_after"], rel=1e-6)
    moved = sum(run["learning_rate"] * resolution(step, run["zo_eps"]) for step in run["steps"])
    for name, expected in official_steps(run, start).items():
        torch.testing.assert_close(theta[name], expected, rtol=0, atol=max(1e-6, 3 * moved))
