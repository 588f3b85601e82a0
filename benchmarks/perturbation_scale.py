"""What it does to normalise a direction: three runs on the embedded model that differ in that alone.

    python benchmarks/perturbation_scale.py --json benchmarks/results/perturbation_scale.json

A direction z of d numbers has length sqrt(d). Divided by it, its perturbation is sqrt(d) times smaller at the same
zo_eps, and a step d times smaller at the same learning rate, as z is in the projected gradient and in the update. With
zo_eps sqrt(d) times and the learning rate d times as large, every step is the same again. All runs have the same
batches and the same seeds: activated LoRA, one direction, two-sided, without scaling by the losses.
"""

import argparse
import json
import math
import multiprocessing
import os
from pathlib import Path
from typing import Any, NamedTuple

from step_time import machine

ASSETS = Path(__file__).resolve().parents[1] / "examples" / "assets"
ZO_EPS, LEARNING_RATE, STEPS, SMOOTHED = 1e-2, 2e-3, 300, 20


class Variant(NamedTuple):
    """eps_power, rate_power: of sqrt(d), by which zo_eps and the learning rate are multiplied."""

    name: str
    normalised: bool
    eps_power: int = 0
    rate_power: int = 0


VARIANTS = (
    Variant("z", False),
    Variant("z / |z|", True),
    Variant("z / |z|, zo_eps x sqrt(d)", True, 1),
    Variant("z / |z|, zo_eps x sqrt(d), learning rate x d", True, 1, 2),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_report, args=(sender, arguments.steps))
    process.start()
    rows = receiver.recv()
    process.join(30)
    process.kill()
    for row in rows:
        print(
            f"{row['variant']:<46} d {row['numel']}, moved {row['moved']:.3g}, loss {row['losses'][0]:.4f} to "
            f"{row['losses'][-1]:.4f}"
        )
    if arguments.json:
        report = {"rows": rows, "settings": {"steps": arguments.steps}, "machine": machine(os.cpu_count())}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        plot(rows, arguments.json.with_suffix(".png"))


def _report(sender, steps: int) -> None:
    sender.send(measure(steps))
    os._exit(0)  # the engine's threads are of no further use


def measure(steps: int) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    from sglang.srt.mezo.adapters.adapter import AdapterSpec
    from sglang.srt.mezo.core.config import MezoConfig
    from sglang.srt.mezo.data.examples import Encoder
    from sglang.srt.mezo.data.rows import read_rows
    from sglang.srt.mezo.data.tasks import SST2
    from sglang.srt.mezo.engine.handle import MezoEngine
    from sglang.srt.mezo.training.trainer import MezoTrainer

    model, task = str(ASSETS / "opt-reviews"), SST2()
    tokenizer = AutoTokenizer.from_pretrained(model)
    invocation = tuple(tokenizer(task.invocation, add_special_tokens=False).input_ids)
    examples = Encoder(tokenizer, 512, task=task, invocation=invocation).encode_rows(
        read_rows(str(ASSETS / "reviews"), "train")
    )
    config = MezoConfig(
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        num_perturbations=1,
        perturbation="gaussian",
        zo_eps=ZO_EPS,
        seed=1,
    )
    engine = MezoEngine(
        model,
        r=config.r,
        target_modules=config.target_modules or (),
        num_slots=config.num_slots,
        dtype="float32",
        log_level="error",
        max_total_tokens=40_000,
    )
    rows = []
    for variant in VARIANTS:
        trainer = MezoTrainer(engine.handle, config, AdapterSpec.of(config, model, invocation), examples)
        rows.append(run(trainer, variant, steps))
        trainer.close()
    return rows


def run(trainer: Any, variant: Variant, steps: int) -> dict[str, Any]:
    """Losses of the steps, each a mean over some, and how far theta has moved."""
    import torch

    from sglang.srt.mezo.core.directions import KeptDirections
    from sglang.srt.mezo.core.noise import direction, step_seed
    from sglang.srt.mezo.core.passes import drain

    theta = trainer.trainable.theta
    start, root = theta.clone(), math.sqrt(theta.numel())
    zo_eps, learning_rate = ZO_EPS * root**variant.eps_power, LEARNING_RATE * root**variant.rate_power
    losses = []
    for step in range(steps):
        z = direction(step_seed(1, step), 0, theta.numel())
        directions = KeptDirections([z / z.norm() if variant.normalised else z])
        (plus,), (minus,) = drain(trainer.probe.loss_passes(trainer.batch(step), directions, zo_eps))
        trainer.optimizer.step(directions, [(plus - minus) / (2 * zo_eps)], learning_rate)
        losses.append((plus + minus) / 2)
    smoothed = [sum(losses[i : i + SMOOTHED]) / SMOOTHED for i in range(0, steps - SMOOTHED + 1, SMOOTHED)]
    return {
        **variant._asdict(),
        "variant": variant.name,
        "numel": theta.numel(),
        "moved": torch.dist(theta, start).item(),
        "losses": smoothed,
    }


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for row, style in zip(rows, ("-", ":", "-.", "--")):
        steps = [SMOOTHED * (i + 1) for i in range(len(row["losses"]))]
        axis.plot(steps, row["losses"], style, label=row["variant"], linewidth=2)
    axis.set_xlabel("step")
    axis.set_ylabel(f"loss, mean of {SMOOTHED} steps")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
