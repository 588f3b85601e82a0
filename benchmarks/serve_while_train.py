"""Latency and throughput of serving, with training off and on in turns on the same server.

    python benchmarks/serve_while_train.py --model models/smollm2-135m --json benchmarks/results/serve_while_train.json
    python benchmarks/serve_while_train.py --model models/smollm2-135m --curve --json
    benchmarks/results/serve_while_train_curve.json

First the server's saturation throughput is measured, in a closed loop. Busy is 70 % of it, light 20 %: Poisson arrivals
of streamed greedy completions from a process of its own. Phases come in pairs, without training and with it, with the
same times, prompts and lengths; every other pair begins with training, so that what the machine does by itself falls on
both. A phase begins with an empty cache; one with training begins after an epoch of the job, as the later ones are all
alike. Time to first token counts from the arrival, time per output token from the first token of a request to its last.

Training is one aLoRA job under the server's default policy. With --curve there is the busy load only, at one rate, on a
server for each of several values of --mezo-share.
"""

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from load import Load, Outcome, Request, run
from server import ROOT, Server, machine, running_server, samples

LOADS = {"light": 0.2, "busy": 0.7}  # of the saturation throughput
SHARES = (0.0, 0.05, 0.1, 0.2, 0.4)
TARGETS = {"ttft_p99_ratio": (0.0, 1.5), "tpot_p99_ratio": (0.0, 1.3), "throughput_ratio": (0.95, float("inf"))}

SEED = 7
RESAMPLES = 1000
IN_FLIGHT = 32  # requests of the closed loop
PROMPT_SENTENCES, OUTPUT_TOKENS = (1, 4), (8, 32)
DATA = {"reviews": (ROOT / "examples/assets/reviews", "test"), "sst2": (ROOT.parent / "shared/data/sst2", "validation")}
NUM_TRAIN, NUM_DEV, BATCH_SIZE = 160, 32, 16
JOB = {
    "max_steps": 1_000_000,
    "learning_rate": 1e-4,
    "num_perturbations": 1,
    "estimator": "two_sided",
    "scale_by_loss_std": False,
    "zo_eps": 3e-3,
    "batch_size": BATCH_SIZE,
    "invocation": " It was",
}
EPOCH_STEPS = NUM_TRAIN // BATCH_SIZE
EPOCH_SECONDS = 900  # at most, without other load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/assets/opt-reviews")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--load-seconds", type=float, default=30, help="length of a phase")
    parser.add_argument("--pairs", type=int, default=8, help="of phases, without training and with it")
    parser.add_argument("--curve", action="store_true", help="several values of --mezo-share, under the busy load")
    parser.add_argument("--server-flags", type=str.split, default=[], help="further flags of the server, in one string")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    rows, phases, capacity = [], [], None
    for flags in [("--mezo-share", str(share)) for share in SHARES] if arguments.curve else [()]:
        with benchmark(arguments, flags) as bench:
            capacity = capacity or bench.capacity()
            for load in ["busy"] if arguments.curve else LOADS:
                done = bench.phases(load, LOADS[load] * capacity["requests_per_s"])
                rows.append(summary(done))
                show(rows[-1])
                phases += [{name: value for name, value in phase.items() if name != "outcomes"} for phase in done]
    if arguments.json:
        report = {
            "rows": rows,
            "phases": phases,
            "capacity": capacity,
            "settings": settings(arguments),
            "machine": machine(),
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        if arguments.curve:
            plot(rows, arguments.json.with_suffix(".png"))


@contextmanager
def benchmark(arguments: argparse.Namespace, flags: Sequence[str]) -> Iterator["Benchmark"]:
    with tempfile.TemporaryDirectory() as folder:
        with running_server(
            arguments.model,
            Path(folder),
            *("--dtype", arguments.dtype, "--enable-metrics", *flags, *arguments.server_flags),
        ) as server:
            yield Benchmark(server, arguments)


class Benchmark:
    """One server with a job that trains in phases with training, and is paused otherwise."""

    def __init__(self, server: Server, arguments: argparse.Namespace):
        self._server = server
        self._arguments = arguments
        folder, held_out = DATA[data_name(arguments.model)]
        train = read_sentences(folder / "train.jsonl")[: NUM_TRAIN + NUM_DEV]
        self._sentences = [row["sentence"] for row in read_sentences(folder / f"{held_out}.jsonl")]
        self._share = server.http.get("/mezo/status").json()["settings"]["share"]
        self._job = server.create_job(
            server.upload(as_rows(train[:NUM_TRAIN])), server.upload(as_rows(train[NUM_TRAIN:])), SEED, **JOB
        )
        server.wait_for_job(self._job, "running")
        self._pause()

    def capacity(self) -> dict[str, float]:
        """Saturation throughput: what is completed with many requests always in flight, after a fifth of the time."""
        seconds = self._arguments.load_seconds
        requests = self._requests("capacity", rate=1.0, count=1000)
        send = partial(run, self._server.url, self._server.model, requests, in_flight=IN_FLIGHT)
        send(seconds=min(10.0, seconds))  # warms up
        self._server.flush_cache()
        done = [outcome for outcome in send(seconds=seconds).completed if 0.2 * seconds < outcome.done <= seconds]
        capacity = {
            "requests_per_s": len(done) / (0.8 * seconds),
            "output_tokens_per_s": sum(len(outcome.tokens) for outcome in done) / (0.8 * seconds),
        }
        print(
            f"saturation: {capacity['requests_per_s']:.2f} requests/s, {capacity['output_tokens_per_s']:.0f} output "
            "tokens/s",
            flush=True,
        )
        return capacity

    def phases(self, load: str, rate: float) -> list[dict[str, Any]]:
        """Phases without training and with it, in turns; both of a pair have the same requests."""
        count = max(1, round(rate * self._arguments.load_seconds))
        phases: list[dict[str, Any]] = []
        for pair in range(self._arguments.pairs):
            requests = self._requests(f"{load} {pair}", rate, count)
            for training in (False, True) if pair % 2 == 0 else (True, False):
                outcomes = self._run(requests, training)
                phases.append(
                    {"load": load, "share": self._share, "pair": pair, "training": training, **measured(outcomes)}
                )
                show_phase(phases[-1])
            phases[-1]["answers_differ"] = differing(phases[-2]["outcomes"], phases[-1]["outcomes"])
        return phases

    def _run(self, requests: Sequence[Request], training: bool) -> Load:
        self._server.flush_cache()
        if training:
            self._resume()
        load = run(self._server.url, self._server.model, requests)
        if training:
            self._pause()
        return load

    def _resume(self) -> None:
        """Returns after an epoch, whose prefixes are all computed anew."""
        before = self._steps()
        self._server.openai.fine_tuning.jobs.resume(self._job)
        self._server.wait_until(lambda: self._steps() >= before + EPOCH_STEPS, EPOCH_SECONDS, "an epoch of training")

    def _pause(self) -> None:
        self._server.openai.fine_tuning.jobs.pause(self._job)
        self._server.wait_for_job(self._job, "paused")

    def _steps(self) -> float:
        return self._server.metrics().get("sglang:mezo_steps_total", 0.0)

    def _requests(self, load: str, rate: float, count: int) -> list[Request]:
        """Every prompt begins with another sentence, as far as there are enough."""
        draw = random.Random(f"{SEED} {load}")
        first = draw.sample(self._sentences, len(self._sentences))
        requests, at = [], 0.0
        for i in range(count):
            at += draw.expovariate(rate)
            more = draw.choices(self._sentences, k=draw.randint(*PROMPT_SENTENCES) - 1)
            requests.append(Request(at, " ".join([first[i % len(first)], *more]), draw.randint(*OUTPUT_TOKENS)))
        return requests


def data_name(model: Path) -> str:
    """The embedded model knows the words of the embedded reviews only."""
    return "sst2" if model.name != "opt-reviews" and DATA["sst2"][0].is_dir() else "reviews"


def read_sentences(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def as_rows(sentences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{row['sentence']} It was", "options": [" terrible", " great"], "label": row["label"]}
        for row in sentences
    ]


# --- figures ----------------------------------------------------------------------------------------------------------


def measured(load: Load) -> dict[str, Any]:
    """Of one phase. Latencies are those of requests that got all their tokens."""
    if not load.completed:
        raise RuntimeError(f"no request was answered: {load.outcomes[0].error}")
    before, after = samples(load.before), samples(load.after)
    change = {name: after[name] - before.get(name, 0.0) for name in after if name.startswith("sglang:mezo_")}
    pieces = change["sglang:mezo_piece_seconds_count"]
    return {
        "requests": len(load.outcomes),
        "failed": len(load.outcomes) - len(load.completed),
        "errors": sorted({outcome.error for outcome in load.outcomes if outcome.error}),
        **latencies(load.completed),
        **throughput(load.completed),
        "send_lag_p99": float(np.percentile([outcome.sent - outcome.at for outcome in load.outcomes], 99)),
        "seconds": load.seconds,
        "steps": change.get("sglang:mezo_steps_total", 0.0),
        "prompt_tokens_trained": sum(
            change.get(f"sglang:mezo_prefix_tokens_{kind}_total", 0.0) for kind in ("computed", "reused")
        ),
        "pieces": pieces,
        "pieces_seconds": change["sglang:mezo_piece_seconds_sum"],
        "piece_p99_at_most": bucket_bound(change, pieces, 0.99),
        "backoffs": change.get("sglang:mezo_backoffs_total", 0.0),
        "outcomes": load.outcomes,
    }


def latencies(outcomes: Sequence[Outcome]) -> dict[str, float]:
    values = {"ttft": [outcome.ttft for outcome in outcomes], "tpot": [outcome.tpot for outcome in outcomes]}
    return {f"{name}_p{p}": float(np.percentile(values[name], p)) for name in values for p in (50, 90, 99)}


def throughput(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """From the start of the load to the last token."""
    seconds = max(outcome.done for outcome in outcomes)
    return {
        "requests_per_s": len(outcomes) / seconds,
        "output_tokens_per_s": sum(len(outcome.tokens) for outcome in outcomes) / seconds,
    }


def bucket_bound(change: dict[str, float], count: float, quantile: float) -> float | None:
    """The smallest bound of the histogram that so many of the pieces were within; None where there were none."""
    prefix = 'sglang:mezo_piece_seconds_bucket{le="'
    bounds = sorted((float(name[len(prefix) : -2]), value) for name, value in change.items() if name.startswith(prefix))
    return next((bound for bound, within in bounds if count and within >= quantile * count), None)


def differing(reference: Sequence[Outcome], outcomes: Sequence[Outcome]) -> int:
    """Requests with other tokens, of those that were answered both times."""
    pairs = zip(reference, outcomes, strict=True)
    return sum(one.tokens != other.tokens for one, other in pairs if not (one.error or other.error))


def summary(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Off against on: ratios of percentiles over all requests of either, with 90 % intervals from resampled pairs."""
    off, on = ([phase for phase in phases if phase["training"] == training] for training in (False, True))
    draws = np.random.default_rng(SEED).integers(len(off), size=(RESAMPLES, len(off)))
    resampled = [ratios([off[i] for i in drawn], [on[i] for i in drawn]) for drawn in draws]
    row: dict[str, Any] = {name: phases[0][name] for name in ("load", "share")} | {"off": pooled(off), "on": pooled(on)}
    row |= ratios(off, on)
    row["intervals"] = {name: np.percentile([one[name] for one in resampled], (5, 95)).tolist() for name in TARGETS}
    row["answers_differ"] = sum(phase.get("answers_differ", 0) for phase in phases)
    row["targets_met"] = {name: low <= row[name] <= high for name, (low, high) in TARGETS.items()}
    return row


def ratios(off: Sequence[dict[str, Any]], on: Sequence[dict[str, Any]]) -> dict[str, float]:
    """With training over without it."""
    p99s = [latencies(completed(phases)) for phases in (off, on)]
    rates = [sum(phase["output_tokens_per_s"] for phase in phases) for phases in (off, on)]
    return {
        "ttft_p99_ratio": p99s[1]["ttft_p99"] / p99s[0]["ttft_p99"],
        "tpot_p99_ratio": p99s[1]["tpot_p99"] / p99s[0]["tpot_p99"],
        "throughput_ratio": rates[1] / rates[0],
    }


def completed(phases: Sequence[dict[str, Any]]) -> list[Outcome]:
    return [outcome for phase in phases for outcome in phase["outcomes"] if not outcome.error]


def pooled(phases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def total(name: str) -> float:
        return sum(phase[name] for phase in phases)

    return {
        "phases": len(phases),
        "requests": total("requests"),
        "failed": total("failed"),
        **latencies(completed(phases)),
        "requests_per_s": total("requests_per_s") / len(phases),
        "output_tokens_per_s": total("output_tokens_per_s") / len(phases),
        "steps_per_s": total("steps") / total("seconds"),
        "prompt_tokens_trained_per_s": total("prompt_tokens_trained") / total("seconds"),
        "training_time_share": total("pieces_seconds") / total("seconds"),
        "piece_seconds_mean": total("pieces_seconds") / total("pieces") if total("pieces") else None,
        "backoffs": total("backoffs"),
    }


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": arguments.model.name,
        "dtype": arguments.dtype,
        "data": data_name(arguments.model),
        "load_seconds": arguments.load_seconds,
        "pairs": arguments.pairs,
        "loads": LOADS,
        "in_flight": IN_FLIGHT,
        "seed": SEED,
        "prompt_sentences": PROMPT_SENTENCES,
        "output_tokens": OUTPUT_TOKENS,
        "num_train": NUM_TRAIN,
        "num_dev": NUM_DEV,
        "job": JOB,
    }


# --- for people -------------------------------------------------------------------------------------------------------


def show_phase(phase: dict[str, Any]) -> None:
    ttft, tpot = ("/".join(f"{1000 * phase[f'{name}_p{p}']:.1f}" for p in (50, 90, 99)) for name in ("ttft", "tpot"))
    print(
        f"{phase['load']:<6} share {phase['share']:<5} {'on ' if phase['training'] else 'off'} "
        f"{phase['requests']} requests, {phase['failed']} failed, ttft {ttft} ms, tpot {tpot} ms (p50/90/99), "
        f"{phase['output_tokens_per_s']:.1f} tokens/s, {phase['steps'] / phase['seconds']:.2f} steps/s, "
        f"sent late by {1000 * phase['send_lag_p99']:.1f} ms (p99)",
        flush=True,
    )


def show(row: dict[str, Any]) -> None:
    for name, (low, high) in TARGETS.items():
        verdict = "pass" if row["targets_met"][name] else "FAIL"
        bound = f"at least {low}" if low else f"at most {high}"
        interval = " to ".join(f"{end:.2f}" for end in row["intervals"][name])
        print(
            f"{verdict}  {row['load']}, share {row['share']}: {name} {row[name]:.3f} ({bound}; 90 % interval "
            f"{interval})"
        )
    training = f"{row['on']['steps_per_s']:.2f} steps/s, {row['on']['training_time_share']:.1%} of the time"
    print(f"      {training}; {row['answers_differ']} of {row['on']['requests']:.0f} answers differ", flush=True)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    latency, steps = figure.subplots(1, 2)
    shares = [row["share"] for row in rows]
    labels = {
        "ttft_p99_ratio": "p99 time to first token",
        "tpot_p99_ratio": "p99 time per output token",
        "throughput_ratio": "throughput",
    }
    for name, label in labels.items():
        latency.plot(shares, [row[name] for row in rows], marker="o", label=label)
    latency.axhline(1, color="grey", linewidth=0.5)
    latency.set(xlabel="--mezo-share", ylabel="with training / without", ylim=(0, None))
    latency.legend()
    steps.plot(shares, [row["on"]["steps_per_s"] for row in rows], marker="o", color="black")
    steps.set(xlabel="--mezo-share", ylabel="training steps/s", ylim=(0, None))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
