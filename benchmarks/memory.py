"""Peak memory of training against the same engine only serving, OPT-125m shape, SST-2 lengths, float32.

    python benchmarks/memory.py --json benchmarks/results/memory.json

Serving: an ``sgl.Engine`` answers the training prompts, one token each, under a LoRA adapter or, beside full tuning, as
it is; its scheduler process, which holds weights, KV and adapters, is measured. Training: the trainer's only process,
with the same engine settings, steps over the same prompts. All see every prompt ``--epochs`` times. Figures are the
kernel's high-water marks of resident memory. Full tuning needs its master copy besides: ``over_weights_and_master`` is
what training has beyond serving and that copy, as a share of weights and copy.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

from step_time import ALPHA, TARGETS, machine, spec_of
from workloads import WORKLOADS

NUM_EXAMPLES, BATCH_SIZE, R = 160, 16, 8
TUNINGS = ("lora", "full")
ENGINE = {
    "max_total_tokens": 8192,
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "log_level": "error",
    "page_size": 1,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    with tempfile.TemporaryDirectory() as folder:
        model = save_model(folder)
        weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
        rows = [row(model, weights, tuning, arguments.epochs) for tuning in TUNINGS]
    report = {
        "rows": rows,
        "settings": {
            "epochs": arguments.epochs,
            "num_examples": NUM_EXAMPLES,
            "batch_size": BATCH_SIZE,
            "engine": ENGINE,
        },
        "machine": machine(os.cpu_count()),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


def row(model: str, weights: int, tuning: str, epochs: int) -> dict[str, Any]:
    serving, training = (in_new_process(kind, model, tuning, epochs) for kind in (serve, train))
    print(f"{tuning}: serving {serving / 2**20:.0f} MiB, training {training / 2**20:.0f} MiB", end=", ")
    print(f"ratio {training / serving:.3f}")
    found = {"tuning": tuning, "serving_bytes": serving, "training_bytes": training, "ratio": training / serving}
    if tuning == "full":
        found["weights_bytes"] = weights
        found["over_weights_and_master"] = (training - serving - weights) / (2 * weights)
        print(f"beyond serving and the master copy: {found['over_weights_and_master']:.1%} of weights and copy")
    return found


def save_model(folder: str) -> str:
    from transformers import OPTConfig, OPTForCausalLM

    path = f"{folder}/model"
    OPTForCausalLM(OPTConfig(dtype="float32")).save_pretrained(path)
    return path


def in_new_process(function, *arguments) -> int:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe()
    process = context.Process(target=_report, args=(sender, function, arguments))
    process.start()
    try:
        return receiver.recv()
    finally:
        process.join(30)
        process.kill()


def _report(sender, function, arguments) -> None:
    sender.send(function(*arguments))
    os._exit(0)  # the engine's threads are of no further use


def serve(model: str, tuning: str, epochs: int) -> int:
    """Peak resident bytes of the scheduler of an engine that serves an adapter, or the model as it is."""
    import psutil

    import sglang

    adapter = {} if tuning == "full" else {"adapter": save_adapter(model, tuning)}
    lora = {"enable_lora": True, "lora_paths": adapter, "max_loras_per_batch": 4} if adapter else {}
    engine = sglang.Engine(model_path=model, **lora, **ENGINE)
    prompts = [list(example.prompt) for example in WORKLOADS["sst2"].examples(NUM_EXAMPLES, vocab_size=50_000)]
    for _ in range(epochs):
        for start in range(0, NUM_EXAMPLES, BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            names = ["adapter"] * len(batch) if adapter else None
            engine.generate(input_ids=batch, sampling_params={"max_new_tokens": 1}, lora_path=names)
    peak = max(high_water_mark(child.pid) for child in psutil.Process().children(recursive=True))
    engine.shutdown()
    return peak


def save_adapter(model: str, tuning: str) -> str:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS[tuning]), task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(f"{model}-adapter")
    return f"{model}-adapter"


def train(model: str, tuning: str, epochs: int) -> int:
    """Peak resident bytes of the trainer's process."""
    from sglang.srt.mezo.core.config import MezoConfig
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.engine.handle import MezoEngine
    from sglang.srt.mezo.training.trainer import MezoTrainer

    settings = {} if tuning == "full" else {"r": R, "lora_alpha": ALPHA, "target_modules": list(TARGETS[tuning])}
    config = MezoConfig(
        tuning=tuning, per_device_train_batch_size=BATCH_SIZE, num_train_epochs=epochs, learning_rate=1e-6, **settings
    )
    engine = MezoEngine(model, r=R, target_modules=TARGETS[tuning], num_slots=config.num_slots, **ENGINE)
    examples = WORKLOADS["sst2"].examples(NUM_EXAMPLES, vocab_size=50_000)
    trainer = MezoTrainer(engine.handle, config, spec_of(config, model), examples)
    for step in range(trainer.max_steps):
        drain(trainer.step_passes(trainer.batch(step)))
    return high_water_mark(os.getpid())


def high_water_mark(pid: int) -> int:
    """Largest resident memory of a process so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
