"""Peak memory of LoRA training against the same engine only serving, OPT-125m shape, SST-2 lengths, float32.

    python benchmarks/memory.py --json benchmarks/results/memory.json

Serving: an ``sgl.Engine`` answers the training prompts under a LoRA adapter, one token each; its scheduler process,
which holds weights, KV and adapters, is measured. Training: the trainer's only process, with the same engine settings,
steps over the same prompts. Both see every prompt ``--epochs`` times. Figures are the kernel's high-water marks of
resident memory.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

from step_time import ALPHA, BATCH_SIZE, TARGETS, R, machine
from workloads import WORKLOADS

NUM_EXAMPLES = 160
TUNING = "lora"
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
        peaks = {kind.__name__: in_new_process(kind, model, arguments.epochs) for kind in (serve, train)}
    report = {
        "rows": [
            {
                "tuning": TUNING,
                "serving_bytes": peaks["serve"],
                "training_bytes": peaks["train"],
                "ratio": peaks["train"] / peaks["serve"],
            }
        ],
        "settings": {
            "epochs": arguments.epochs,
            "num_examples": NUM_EXAMPLES,
            "batch_size": BATCH_SIZE,
            "engine": ENGINE,
        },
        "machine": machine(os.cpu_count()),
    }
    print(
        f"serving {peaks['serve'] / 2**20:.0f} MiB, training {peaks['train'] / 2**20:.0f} MiB, ratio "
        f"{report['rows'][0]['ratio']:.3f}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


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


def serve(model: str, epochs: int) -> int:
    """Peak resident bytes of the scheduler of an engine that serves an adapter."""
    import psutil
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import sglang

    adapter = f"{model}-adapter"
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(
        base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(TARGETS[TUNING]), task_type="CAUSAL_LM")
    ).save_pretrained(adapter)
    engine = sglang.Engine(
        model_path=model, enable_lora=True, lora_paths={"adapter": adapter}, max_loras_per_batch=4, **ENGINE
    )
    prompts = [list(example.prompt) for example in WORKLOADS["sst2"].examples(NUM_EXAMPLES, vocab_size=50_000)]
    for _ in range(epochs):
        for start in range(0, NUM_EXAMPLES, BATCH_SIZE):
            batch = prompts[start : start + BATCH_SIZE]
            engine.generate(input_ids=batch, sampling_params={"max_new_tokens": 1}, lora_path=["adapter"] * len(batch))
    peak = max(high_water_mark(child.pid) for child in psutil.Process().children(recursive=True))
    engine.shutdown()
    return peak


def train(model: str, epochs: int) -> int:
    """Peak resident bytes of the trainer's process."""
    from sglang.srt.mezo.adapters.adapter import AdapterSpec
    from sglang.srt.mezo.core.config import MezoConfig
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.engine.handle import MezoEngine
    from sglang.srt.mezo.training.trainer import MezoTrainer

    config = MezoConfig(
        tuning=TUNING,
        r=R,
        lora_alpha=ALPHA,
        target_modules=list(TARGETS[TUNING]),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=epochs,
    )
    engine = MezoEngine(model, r=R, target_modules=TARGETS[TUNING], num_slots=config.num_slots, **ENGINE)
    examples = WORKLOADS["sst2"].examples(NUM_EXAMPLES, vocab_size=50_000)
    trainer = MezoTrainer(engine.handle, config, AdapterSpec.of(config, model), examples)
    for step in range(trainer.max_steps):
        drain(trainer.step_passes(trainer.batch(step)))
    return high_water_mark(os.getpid())


def high_water_mark(pid: int) -> int:
    """Largest resident memory of a process so far, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    main()
