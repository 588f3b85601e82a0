"""Every family that can be trained: losses, saved files and served answers against Transformers + PEFT, LoRA and
aLoRA, in float32."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import oracle
import tiny_models
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.adapters.families import FAMILIES
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example

NEW_TOKENS = 4
ENCODERS = [family for architecture, family in FAMILIES.items() if architecture.endswith("ForMaskedLM")]
BATCHES = {
    "single-token options": ("classification", oracle.with_shared_beginnings(oracle.examples(3, [(11,), (12,)]))),
    "completions": ("completion", oracle.examples(3, [(20, 21, 22, 23)])),
}
PROMPTS = [example.prompt for example in oracle.with_shared_beginnings(oracle.examples(3))]


# --- run in the engine's process --------------------------------------------------------------------------------------


def sites(engine, targets):
    from sglang.srt.mezo.engine.layers import adapted_sites

    return adapted_sites(engine.handle, targets)


def losses(engine, spec: AdapterSpec, batches, theta: torch.Tensor) -> list[float]:
    """Of each batch at ``theta``."""
    from sglang.srt.mezo.training.trainer import MezoTrainer

    found = []
    for objective, examples in batches:
        tuning = "alora" if spec.invocation else "lora"
        config = MezoConfig(
            tuning=tuning,
            r=spec.r,
            lora_alpha=spec.lora_alpha,
            num_perturbations=1,
            estimator="two_sided",
            scale_by_loss_std=False,
        )
        trainer = MezoTrainer(engine.handle, config, spec, examples, objective=objective)
        try:
            trainer.trainable.theta.copy_(theta)
            (plus,), (minus,) = drain(
                trainer.probe.loss_passes(trainer.source.plans, KeptDirections([torch.zeros_like(theta)]), 0.0)
            )
        finally:
            trainer.close()
        assert plus == pytest.approx(minus, abs=1e-6)
        found.append(plus)
    return found


def serve(engine, path: Path) -> dict:
    """Answers under the adapter and, in the same batch, of the base model."""
    import in_scheduler

    lora_id = in_scheduler.load_adapter(engine, path.name, str(path))
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    return in_scheduler.answers(engine, prompts, [lora_id, None] * len(PROMPTS), NEW_TOKENS)


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request, tmp_path_factory):
    """(family, path, engine) of a small random model."""
    path = tiny_models.save_model(request.param, tmp_path_factory.mktemp("family") / request.param)
    family = FAMILIES[request.param]
    engine = EngineProcess(
        model_path=path,
        r=4,
        target_modules=family.modules,
        num_slots=5,
        dtype="float32",
        skip_tokenizer_init=True,
        max_total_tokens=4000,
        disable_overlap_schedule=True,
        log_level="error",
    )
    yield family, path, engine
    engine.close()


@pytest.fixture(scope="module", params=["lora", "alora"])
def trained(request, model, tmp_path_factory):
    """(engine, adapter in the middle of training, its saved folder, its base model with PEFT on that folder)."""
    family, path, engine = model
    if family in ENCODERS and request.param == "alora":
        pytest.skip("refused")
    # PEFT cannot run aLoRA on OPT's fc1 and fc2, which Transformers calls with flattened batches.
    targets = family.attention if request.param == "alora" and family.name == "OPT" else family.modules
    invocation = oracle.INVOCATION if request.param == "alora" else ()
    spec = AdapterSpec(path, 4, 8, targets, invocation, None if family in ENCODERS else "CAUSAL_LM")
    adapter = Adapter.initial(spec, engine.call(sites, targets), seed=3)
    adapter.theta.add_(direction(99, 0, adapter.numel), alpha=0.1)
    folder = tmp_path_factory.mktemp("adapter") / request.param
    reference = oracle.Reference(path, adapter, folder)
    return engine, adapter, folder, reference


@pytest.fixture
def record(request, trained, record_property):
    """Holds a difference to its bound, and keeps it for ``benchmarks/families.py``."""
    architecture, tuning = request.node.callspec.params["model"], request.node.callspec.params["trained"]

    def check(kind: str, difference: float, bound: float) -> None:
        record_property(kind, (architecture, tuning, difference))
        assert difference <= bound

    return check


def log_probs(reference: oracle.Reference, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of all tokens but the first."""
    with torch.no_grad():
        logits = reference.model(input_ids=torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(tokens)[1:, None])[:, 0]


# --- the properties ---------------------------------------------------------------------------------------------------


def test_saved_files_are_what_peft_would_save(trained):
    _, adapter, folder, reference = trained
    base = oracle.load(adapter.spec.base_model)
    state = load_file(folder / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(base, folder)
    own = {name.replace(".default", ""): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert own.keys() == state.keys(), "PEFT takes every matrix and misses none"
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert set(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == set(
        adapter.spec.target_modules
    )


def test_losses_equal_peft(model, trained, record):
    engine, adapter, _, reference = trained
    masked = model[0] in ENCODERS
    batches = [(objective, oracle.masked(examples) if masked else examples) for objective, examples in BATCHES.values()]
    found = engine.call(losses, adapter.spec, batches, adapter.theta)
    for (objective, examples), loss in zip(batches, found, strict=True):
        with torch.no_grad():
            expected = reference_loss(reference, objective, examples)
            with reference.model.disable_adapter():
                base = reference_loss(reference, objective, examples)
        assert abs(expected - base) > 1e-3, "the adapter must matter"
        record("losses", abs(loss - expected), 1e-5)


def reference_loss(reference: oracle.Reference, objective: str, batch: list[Example]) -> float:
    return (
        reference.option_losses(batch).mean() if objective == "classification" else reference.token_loss(batch)
    ).item()


def test_served_log_probabilities_equal_peft(model, trained, record):
    if model[0] in ENCODERS:
        pytest.skip("not served")
    engine, _, folder, reference = trained
    served = engine.call(serve, folder)
    for prompt, adapted, base in zip(PROMPTS, served[::2], served[1::2], strict=True):
        for answer, model in ((adapted, nullcontext()), (base, reference.model.disable_adapter())):
            with model:
                expected = log_probs(reference, [*prompt, *answer.tokens])
            record(
                "served", (torch.tensor(answer.prompt_log_probs + answer.log_probs) - expected).abs().max().item(), 1e-4
            )
