"""Is it right on this device? The first failure ends a check with its traceback.

    python benchmarks/gpu/check.py packages --json packages.json
    python benchmarks/gpu/check.py engine --dtype bfloat16 --json engine.json
    python benchmarks/gpu/check.py engine --tuning lora --engine '{"lora_backend": "csgmv"}' --json engine.json
    python benchmarks/gpu/check.py engine --awq --json engine.json
    python benchmarks/gpu/check.py server --json server.json

``engine``: losses of LoRA and activated LoRA equal Transformers' and PEFT's on the same device, in float32 projected
gradients equal autograd's in float64, prompts are reused, and no place of the KV pool is lost. ``server``: it starts
with default flags, answers, trains an OpenAI job, and serves what it trained. ``--tiny`` is a small model.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import awq

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "test" / "srt"), str(ROOT / "benchmarks"), str(ROOT / "examples")]

Found = dict[str, Any]
SIZES = {"hidden_size": 768, "word_embed_proj_dim": 768, "num_attention_heads": 12, "ffn_dim": 3072}
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
INVOCATION = (7, 8)
DIRECTIONS, ZO_EPS = 3, 1e-3
LOSS = {"bfloat16": 0.03, "float32": 1e-4}  # how far a loss may be from PEFT's in float32, on the engine's weights
NOISE = 2  # or by so many times what Transformers is off by itself in the engine's precision
LARGEST_FP8 = 448.0
SLOPE = 0.02  # of projected_grad, relative; float32 only
REVIEWS = {"good": "the acting is superb. It was", "bad": "the plot is thin and the cast is awful. It was"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=["packages", "engine", "server"])
    parser.add_argument("--dtype", choices=LOSS, default="bfloat16")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="fields of SGLang's ServerArgs beside the defaults"
    )
    parser.add_argument("--tuning", nargs="+", choices=["alora", "lora"], default=["alora", "lora"])
    parser.add_argument("--awq", action="store_true", help="the base model's layers are in four bits")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = {"packages": packages, "engine": engine, "server": server}[arguments.check](arguments)
    arguments.json.write_text(json.dumps(found))
    print(", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    os._exit(0)  # the engine's threads are of no further use


def packages(arguments: argparse.Namespace) -> Found:
    """What is imported on the way to a server, and which of SGLang's kernels are there; without a GPU it fails."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler  # noqa: F401
    from sglang.srt.mezo.core import noise
    from sglang.srt.mezo.engine import accelerator
    from sglang.srt.mezo.plugin import platform

    found: Found = {
        "torch": torch.__version__,
        "cpu_platform": platform.is_active(),
        "noise_in_c": noise.LIBRARY is not None,
    }
    require(arguments.tiny or torch.cuda.is_available(), "PyTorch finds no GPU")
    require(arguments.tiny or not found["cpu_platform"], "the platform of the CPU is active beside a GPU")
    if torch.cuda.is_available():
        import sgl_kernel

        x = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16)
        normed = sgl_kernel.rmsnorm(x, torch.ones_like(x[0]), 1e-6).float()
        off = (normed - torch.nn.functional.rms_norm(x.float(), (256,), eps=1e-6)).abs().max().item()
        require(off < 0.05, f"rmsnorm of sgl_kernel is off by {off}")
        from sglang.kernels.ops.kvcache.kvcache import can_use_store_cache

        found |= {"gpu": torch.cuda.get_device_name(), "rmsnorm_off": off, "kv_kernel": bool(can_use_store_cache(1536))}
        found |= noise_on_device(noise)
        found["flash_attention"] = accelerator.has_flash_attention()
    return found


def noise_on_device(noise: Any) -> Found:
    """Directions have the CPU's bits; and how long the GPU takes for 16 million numbers."""
    numel, found = 1 << 24, {"noise_kernel": noise.has_kernel("cuda")}
    out = torch.zeros(numel, device="cuda")
    for distribution in ("gaussian", "rademacher"):

        def draw() -> None:
            noise.add_direction(7, 3, 1.0, torch.zeros_like(out), out, distribution, first=5)
            torch.cuda.synchronize()

        draw()  # which compiles
        started = time.perf_counter()
        draw()
        found[f"{distribution}_ms"] = round(1000 * (time.perf_counter() - started), 3)
        same = torch.equal(out[:100_000].cpu(), noise.direction(7, 3, 100_000, distribution, first=5))
        require(same, f"{distribution} directions are not those of the CPU")
    return found


def engine(arguments: argparse.Namespace) -> Found:
    import oracle
    from sglang.srt.mezo.engine.handle import MezoEngine

    folder = Path(tempfile.mkdtemp())
    path = oracle.save_model("opt-125m", folder / "model", **({} if arguments.tiny else SIZES))
    served = awq.save(Path(path), folder / "awq") if arguments.awq else path
    made = MezoEngine(
        served,
        r=8,
        target_modules=TARGETS,
        num_slots=2 * DIRECTIONS + 1,
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        max_total_tokens=16_384,
        mem_fraction_static=0.5,
        **arguments.engine,
    )
    runner = made.handle.model_runner
    found: Found = {
        "device": str(made.handle.device),
        "attention": type(runner.attn_backend).__name__,
        "lora": type(made.handle.lora_manager.lora_backend).__name__,
    }
    for tuning in arguments.tuning:
        found |= {f"{tuning}_{name}": value for name, value in adapter(made, path, folder, tuning, arguments).items()}
    return found


def adapter(made: Any, path: str, folder: Path, tuning: str, arguments: argparse.Namespace) -> Found:
    """Of one tuning: how far losses and projected gradients are off."""
    import oracle
    from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
    from sglang.srt.mezo.core.config import MezoConfig
    from sglang.srt.mezo.core.directions import KeptDirections
    from sglang.srt.mezo.core.noise import direction
    from sglang.srt.mezo.core.passes import drain
    from sglang.srt.mezo.engine.layers import adapted_sites
    from sglang.srt.mezo.training.trainer import MezoTrainer

    examples = oracle.with_shared_beginnings(oracle.examples(6, [(11,), (12,)]))
    spec = AdapterSpec(path, 8, 16, TARGETS, INVOCATION if tuning == "alora" else ())
    start = Adapter.initial(spec, adapted_sites(made.handle, TARGETS), seed=3)
    start.theta.add_(direction(99, 0, start.numel), alpha=0.02)
    config = MezoConfig(
        output_dir=str(folder / "run"),
        tuning=tuning,
        target_modules=list(TARGETS),
        num_perturbations=DIRECTIONS,
        estimator="two_sided",
        scale_by_loss_std=False,
        zo_eps=ZO_EPS,
    )
    free = made.handle.free_kv_tokens
    trainer = MezoTrainer(made.handle, config, spec, examples)
    found: Found = {}
    try:
        trainer.trainable.theta.copy_(start.theta)

        def losses(z: list[torch.Tensor], eps: float) -> tuple[list[float], list[float]]:
            return drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections(z), eps))

        dtype = getattr(torch, arguments.dtype)
        reference = oracle.Reference(path, start, folder / tuning, torch.float32, made.handle.device)
        with torch.no_grad():
            for parameter in reference.model.parameters():
                parameter.copy_(parameter.to(dtype))
            expected = reference.option_losses(examples).mean().item()
            with reference.model.disable_adapter():
                base = reference.option_losses(examples).mean().item()
        plus, minus = losses([torch.zeros(start.numel)] * DIRECTIONS, 0.0)
        found["loss_off"] = max(abs(value - expected) for value in plus + minus)
        same = oracle.Reference(path, start, folder / f"{tuning}-same", dtype, made.handle.device)
        if arguments.engine.get("quantization") == "fp8":
            round_to_fp8(same.model)
        with torch.no_grad():
            found["noise"] = abs(same.option_losses(examples).mean().item() - expected)
        limit = max(LOSS[arguments.dtype], NOISE * found["noise"])
        require(found["loss_off"] <= limit, f"losses {plus} {minus} are not PEFT's {expected}")
        require(abs(expected - base) > 1e-4, f"the adapter does nothing: {expected} with it, {base} without")
        if arguments.dtype == "float32":
            found["slope_off"] = slope_off(oracle.Reference, path, start, folder, made, examples, losses)
        stats = trainer.scorer.prefix_stats
        require(stats.reused > 0, "no prompt was reused")
        found["reused"] = f"{stats.reused} of {stats.total}"
    finally:
        trainer.close()
    made.scheduler.flush_cache()
    require(made.handle.free_kv_tokens >= free, f"{free - made.handle.free_kv_tokens} places of the KV pool are lost")
    return found


def round_to_fp8(model: torch.nn.Module) -> None:
    """Have the base model's linear layers compute on what eight bits hold of their weights and their inputs."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / LARGEST_FP8
        return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lora_" not in name and not name.endswith("lm_head"):
            layer.weight.data = rounded(layer.weight.data)
            layer.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))


def slope_off(kind: Any, path: str, start: Any, folder: Path, made: Any, examples: Any, losses: Any) -> float:
    """The largest relative error of a projected gradient, along directions that are not nearly orthogonal to the
    gradient: there terms of third order count."""
    from sglang.srt.mezo.core.noise import direction

    exact = kind(path, start, folder / "exact", torch.float64, made.handle.device)
    gradient = exact.gradient(exact.option_losses(examples).mean())
    drawn = (direction(5, k, start.numel) for k in itertools.count())
    sloped = (z for z in drawn if torch.dot(gradient, z.double()).abs() > 0.1 * gradient.norm())
    z = list(itertools.islice(sloped, DIRECTIONS))
    slopes = [torch.dot(gradient, one.double()).item() for one in z]
    got = [(plus - minus) / (2 * ZO_EPS) for plus, minus in zip(*losses(z, ZO_EPS))]
    off = max(abs(ours - slope) / abs(slope) for ours, slope in zip(got, slopes))
    require(off <= SLOPE, f"projected gradients {got} are not autograd's {slopes}")
    return off


def server(arguments: argparse.Namespace) -> Found:
    """With no flag that helps: what is right on a GPU is the defaults' to know."""
    from finetune_in_server import embedded_file
    from server import running_server

    folder = Path(tempfile.mkdtemp())
    steps = 20 if arguments.tiny else 150
    with running_server(ROOT / "examples" / "assets" / "opt-reviews", folder) as running:
        client = running.openai

        def answer(model: str, text: str) -> str:
            return client.completions.create(model=model, prompt=text, max_tokens=1, temperature=0).choices[0].text

        before = {name: answer(running.model, text) for name, text in REVIEWS.items()}
        file = client.files.create(file=embedded_file("train"), purpose="fine-tune").id
        settings = {"invocation": " It was", "max_steps": steps}
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": settings}}
        job = client.fine_tuning.jobs.create(
            model=running.model, training_file=file, suffix="check", seed=1, method=method
        )
        running.wait_for_job(job.id, "succeeded", 120)
        done = client.fine_tuning.jobs.retrieve(job.id)
        after = {name: answer(str(done.fine_tuned_model), text) for name, text in REVIEWS.items()}
        require(arguments.tiny or after["good"] != after["bad"], f"reviews are answered alike: {after}")
        require(before == {name: answer(running.model, text) for name, text in REVIEWS.items()}, "the base model moved")
    return {"model": done.fine_tuned_model, "tokens": done.trained_tokens, "before": before, "after": after}


def require(condition: Any, message: str) -> None:
    if not condition:
        raise AssertionError(message)


if __name__ == "__main__":
    main()
