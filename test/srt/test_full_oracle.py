"""Full tuning against Transformers, in float32: the engine's weights at every point, and what a run leaves."""

import pytest
import torch

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.optimizer import Optimizer
from sglang.srt.mezo.core.passes import drain

ZO_EPS = 1e-3
KINDS = {
    **{kind: (kind, {}) for kind in oracle.ENCODERS},
    "opt-125m": ("opt-125m", {}),
    "opt-350m": ("opt-350m", {}),
    "galactica": ("galactica", {}),
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
}
BATCHES = {
    "single-token options": ("classification", oracle.examples(5, [(11,), (12,)])),
    "longer options": ("classification", oracle.examples(4)),
    "completions": ("completion", oracle.examples(3, [(20, 21, 22, 23)])),
    "shared beginnings": ("classification", oracle.with_shared_beginnings(oracle.examples(6))),
}
PATTERNS = ("", r"layers?\.1\.", "bias|[nN]orm", r"embed_tokens|word_embeddings|lm_head\.decoder")


# --- run in the engine's process --------------------------------------------------------------------------------------


def make_trainer(engine, path: str, batch, objective: str, **settings):
    from sglang.srt.mezo.training.trainer import MezoTrainer

    config = MezoConfig(tuning="full", **{"zo_eps": ZO_EPS, "estimator": "two_sided", **settings})
    return MezoTrainer(engine.handle, config, WeightsSpec(path, config.parameters), batch, objective=objective)


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in engine.handle.model_runner.model.named_parameters()}


def losses(engine, path, batch, objective, z, zo_eps, settings):
    """(loss_plus, loss_minus, whether every bit of the engine's weights came back, free KV tokens lost)."""
    free, before = engine.handle.free_kv_tokens, weights_of(engine)
    trainer = make_trainer(engine, path, batch, objective, num_perturbations=len(z), **settings)
    try:
        plus, minus = drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections(z), zo_eps))
        perturbed = any(not torch.equal(one, before[name]) for name, one in weights_of(engine).items())
    finally:
        trainer.close()
    restored = all(torch.equal(one, before[name]) for name, one in weights_of(engine).items())
    return plus, minus, perturbed, restored, free - engine.handle.free_kv_tokens


def steps(engine, path, batch, count, folder, settings):
    """Losses of some steps, theta after each, and the model that they leave in ``folder``; the engine is as before."""
    trainer = make_trainer(engine, path, batch, "classification", **settings)
    start = trainer.trainable.theta.clone()
    results, thetas = [], []
    try:
        for _ in range(count):
            results.append(drain(trainer.step_passes(trainer.source.plans)))
            thetas.append(trainer.trainable.theta.cpu().clone())
        loss = drain(trainer.evaluation_passes(trainer.source.plans))["eval_loss"]
        trainer.trainable.save_pretrained(folder)
        trainer.trainable.theta.zero_()
        trainer.trainable.load_weights(folder)
        assert torch.equal(trainer.trainable.theta.cpu(), thetas[-1])
        trainer.trainable.load_initial(folder)
        assert torch.equal(trainer.trainable.theta, start)
    finally:
        trainer.trainable.theta.copy_(start)
        trainer.close()
    return results, thetas, loss


# --- the properties ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(KINDS))
def model(request, tmp_path_factory):
    """(kind, path, engine) of a small random model; one engine without LoRA for all tests of a kind."""
    kind, changes = KINDS[request.param]
    path = oracle.save_model(kind, tmp_path_factory.mktemp("full") / "model", **changes)
    engine = EngineProcess(model_path=path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=6000)
    yield kind, path, engine
    engine.close()


def batch_of(kind: str, name: str):
    """(objective, examples)."""
    objective, examples = BATCHES[name]
    return objective, oracle.masked(examples) if kind in oracle.ENCODERS else examples


def reference_loss(reference: oracle.Scores, objective: str, batch) -> float:
    with torch.no_grad():
        loss = reference.option_losses(batch).mean() if objective == "classification" else reference.token_loss(batch)
        return loss.item()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_losses_equal_transformers_and_every_bit_comes_back(model, batch, pattern):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    reference = oracle.ModelReference(path, pattern=pattern)
    theta = reference.theta
    z = [direction(6, k, theta.numel()) for k in range(2)]
    settings = {"parameters": pattern} if pattern else {}
    plus, minus, perturbed, restored, leaked = engine.call(losses, path, examples, objective, z, ZO_EPS, settings)
    for sign, ours in ((1, plus), (-1, minus)):
        for z_k, loss in zip(z, ours, strict=True):
            reference.set(theta + sign * ZO_EPS * z_k)
            assert loss == pytest.approx(reference_loss(reference, objective, examples), abs=1e-5)
    assert plus[0] != minus[0] and plus[0] != plus[1]
    assert perturbed and restored and leaked == 0


@pytest.mark.parametrize("batch", BATCHES)
def test_projected_grad_equals_the_central_difference_of_transformers(model, batch):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    reference = oracle.ModelReference(path, torch.float64)
    theta = reference.theta
    z = [direction(5, k, theta.numel()) for k in range(3)]
    plus, minus, *_ = engine.call(losses, path, examples, objective, z, ZO_EPS, {})
    for z_k, plus_k, minus_k in zip(z, plus, minus, strict=True):
        exact = []
        for sign in (1, -1):
            reference.set(theta + sign * ZO_EPS * z_k.double())
            exact.append(reference_loss(reference, objective, examples))
        assert (plus_k - minus_k) == pytest.approx(exact[0] - exact[1], rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_perturbations": 2},
        {"estimator": "one_sided", "perturbation": "gaussian", "parameters": "proj|fc|dense"},
        {"num_perturbations": 4, "estimator": "leave_one_out", "momentum": 0.9, "weight_decay": 0.1},
        {"num_perturbations": 1, "perturbation_rank": 2, "optim": "adamw"},
    ],
    ids=str,
)
def test_a_run_is_that_of_transformers_with_the_same_directions(model, settings, tmp_path):
    """Steps by the log alone, on Transformers' model: its losses are ours, and so is the model that is left."""
    kind, path, engine = model
    _, examples = batch_of(kind, "longer options")
    settings = {"learning_rate": 1e-3, "scale_by_loss_std": False, "lr_scheduler_type": "constant", **settings}
    results, thetas, loss = engine.call(steps, path, examples, 5, tmp_path / "model", settings)
    reference = oracle.ModelReference(path, pattern=settings.get("parameters", ""))
    theta = reference.theta
    config = MezoConfig(tuning="full", **settings)
    moved = theta.clone()
    optimizer = Optimizer(moved, shapes_of(reference), config.update_rule)
    for result, after in zip(results, thetas):
        directions = optimizer.directions(result.zo_random_seed, config.num_perturbations)
        for k, plus in enumerate(result.loss_plus):
            reference.set(directions.add(k, config.zo_eps, moved, torch.empty_like(moved)))
            assert plus == pytest.approx(reference_loss(reference, "classification", examples), abs=1e-5)
        optimizer.step(directions, result.projected_grad, result.learning_rate)
        assert torch.equal(moved, after)
    assert not torch.equal(moved, theta)
    saved = oracle.ModelReference(str(tmp_path / "model"))
    assert loss == pytest.approx(reference_loss(saved, "classification", examples), abs=1e-5)


def shapes_of(reference: oracle.ModelReference):
    return [tuple(p.shape) for p in reference._trained]


def test_a_learning_rate_of_nothing_changes_nothing(model, tmp_path):
    kind, path, engine = model
    settings = {"num_perturbations": 2, "warmup_steps": 3, "scale_by_loss_std": False}
    _, thetas, _ = engine.call(steps, path, batch_of(kind, "longer options")[1], 1, tmp_path / "model", settings)
    assert torch.equal(thetas[0], oracle.ModelReference(path).theta)
    saved = oracle.ModelReference(str(tmp_path / "model"))
    assert torch.equal(saved.theta, thetas[0])
