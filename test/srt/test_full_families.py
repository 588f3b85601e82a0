"""Full tuning on every family: its engine's weights are found by Transformers' names, or refused."""

import pytest
import torch

import oracle
import tiny_models
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.families import FAMILIES
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.passes import drain
from test_full_oracle import BATCHES, ZO_EPS, losses, make_trainer, reference_loss, weights_of

REFUSED = {
    "GemmaForCausalLM": "is not what SGLang is given",  # norms that SGLang has with 1 added
    "MixtralForCausalLM": "experts",
    "Qwen3MoeForCausalLM": "experts",
}


@pytest.fixture(params=list(FAMILIES))
def model(request, tmp_path):
    """(architecture, path, engine) of a small random model."""
    path = tiny_models.save_model(request.param, tmp_path / request.param)
    engine = EngineProcess(
        model_path=path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=4000, log_level="error"
    )
    yield request.param, path, engine
    engine.close()


def test_losses_equal_transformers(model):
    architecture, path, engine = model
    objective, examples = BATCHES["longer options"]
    if architecture.endswith("ForMaskedLM"):
        examples = oracle.masked(examples)
    reference = oracle.ModelReference(path)
    theta = reference.theta
    z = [direction(6, 0, theta.numel())]
    if architecture in REFUSED:
        before = engine.call(weights_of)
        with pytest.raises(ConfigError, match=REFUSED[architecture]):
            engine.call(losses, path, examples, objective, z, ZO_EPS, {})
        after = engine.call(weights_of)
        assert all(torch.equal(before[name], after[name]) for name in before)
        return
    plus, minus, perturbed, restored, leaked = engine.call(losses, path, examples, objective, z, ZO_EPS, {})
    for sign, (loss,) in ((1, plus), (-1, minus)):
        reference.set(theta + sign * ZO_EPS * z[0])
        assert loss == pytest.approx(reference_loss(reference, objective, examples), abs=1e-5)
    assert perturbed and restored and leaked == 0


def test_what_layers_make_of_their_weights_follows_them(tmp_path):
    path = tiny_models.save_model("Gemma2ForCausalLM", tmp_path / "model")
    engine = EngineProcess(model_path=path, dtype="float32", skip_tokenizer_init=True, log_level="error")
    try:
        assert engine.call(norms_that_follow, path) == 9
    finally:
        engine.close()


def norms_that_follow(engine, path) -> int:
    """How many layers have made anew what they keep of their weights, at a perturbed point and afterwards."""
    norms = [one for one in engine.handle.model_runner.model.modules() if hasattr(one, "gemma_weight")]
    before = [norm.weight.clone() for norm in norms]
    trainer = make_trainer(engine, path, BATCHES["longer options"][1], "classification", num_perturbations=1)
    assert all(torch.equal(norm.gemma_weight, weight + 1) for norm, weight in zip(norms, before))
    drain(trainer.points.rounds(1)[0].fill(trainer.probe.directions(1), 0.5))
    followed = [
        norm
        for norm, weight in zip(norms, before)
        if torch.equal(norm.gemma_weight, norm.weight + 1) and not torch.equal(norm.weight, weight)
    ]
    trainer.close()
    assert all(torch.equal(norm.gemma_weight, weight + 1) for norm, weight in zip(norms, before))
    return len(followed)
