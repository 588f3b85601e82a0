"""Losses and projected gradients of the trainer against Transformers + PEFT and autograd, in float32."""

import itertools
from collections.abc import Sequence

import pytest
import torch

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example

NUM_PERTURBATIONS = 3
ZO_EPS = 1e-3
TWO_SIDED = {"estimator": "two_sided", "scale_by_loss_std": False}
SINGLE = [(11,), (12,)]

BATCHES = {
    "single-token options": ("classification", oracle.examples(5, SINGLE)),
    "longer options": ("classification", oracle.examples(4)),
    "completions": ("completion", oracle.examples(3, [(20, 21, 22, 23)])),
    "shared beginnings": ("classification", oracle.with_shared_beginnings(oracle.examples(6))),
}


def batches(*quick: str) -> list:
    """All of them; beside the losses of each, which are compared always, the others take minutes."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in BATCHES]


# --- run in the engine's process --------------------------------------------------------------------------------------


def make_trainer(
    engine, tuning: str, spec: AdapterSpec, batch: Sequence[Example], objective: str, num_perturbations: int, **settings
):
    from sglang.srt.mezo.training.trainer import MezoTrainer

    own = {"tuning": tuning, "r": spec.r, "lora_alpha": spec.lora_alpha}
    config = MezoConfig(**own, zo_eps=ZO_EPS, num_perturbations=num_perturbations, **{**TWO_SIDED, **settings})
    return MezoTrainer(engine.handle, config, spec, batch, objective=objective)


def sites(engine, spec: AdapterSpec):
    from sglang.srt.mezo.engine.layers import adapted_sites

    return adapted_sites(engine.handle, spec.target_modules)


def losses(engine, tuning, spec, batch, objective, theta, z, zo_eps, settings):
    """(loss_plus, loss_minus, free KV tokens lost); nothing is in the cache before."""
    engine.scheduler.flush_cache()
    free = engine.handle.free_kv_tokens
    trainer = make_trainer(engine, tuning, spec, batch, objective, len(z), **settings)
    try:
        trainer.trainable.theta.copy_(theta)
        plus, minus = drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections(z), zo_eps))
    finally:
        trainer.close()
    return plus, minus, free - engine.handle.free_kv_tokens


def losses_without_sharing_in_slots(engine, *arguments):
    """As on an attention backend that reads the KV of a batch before it has written it."""
    from sglang.srt.mezo.engine import handle as module

    known, module._WRITE_KV_FIRST = module._WRITE_KV_FIRST, set()
    try:
        return losses(engine, *arguments)
    finally:
        module._WRITE_KV_FIRST = known


def prefix_stats(engine, tuning, spec, batch, objective):
    trainer = make_trainer(engine, tuning, spec, batch, objective, NUM_PERTURBATIONS)
    try:
        drain(
            trainer.probe.loss_passes(
                trainer.source.plans, KeptDirections([trainer.trainable.theta] * NUM_PERTURBATIONS), ZO_EPS
            )
        )
        return trainer.scorer.prefix_stats
    finally:
        trainer.close()


def losses_around_a_flush(engine, spec, batch, objective, theta):
    """Losses before and after the tree is emptied and filled with other texts, where kept prefixes lay."""
    engine.scheduler.flush_cache()
    trainer = make_trainer(engine, "alora", spec, batch, objective, 1)
    try:
        trainer.trainable.theta.copy_(theta)
        first = drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections([theta]), ZO_EPS))
        assert trainer.scorer.base_prefixes.kept_tokens > 0
        engine.scheduler.flush_cache()
        drain(trainer.scorer.base_prefixes.prepare([tuple(range(100))]))
        return first, drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections([theta]), ZO_EPS))
    finally:
        trainer.close()


def losses_on_prefix_of_plus(engine, spec, batch, theta, z):
    """For each direction the loss at theta - eps z, on KV of the prompts that was computed at theta + eps z."""
    trainer = make_trainer(engine, "lora", spec, batch, "classification", len(z))
    try:
        trainer.trainable.theta.copy_(theta)
        drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections(z), ZO_EPS))
        return [
            loss_on_prefix_of(engine, trainer, batch, plus, minus)
            for plus, minus in map(trainer.points.of_direction, range(len(z)))
        ]
    finally:
        trainer.close()


def loss_on_prefix_of(engine, trainer, batch, plus, minus):
    from sglang.srt.mezo.engine.forward import Sequenced, extend
    from sglang.srt.mezo.engine.head import Head
    from sglang.srt.mezo.scoring.readout import batch_loss

    values = []
    for example in batch:
        prefix, last = example.prompt[:-1], example.prompt[-1:]
        _, kv = extend(
            engine.handle, [Sequenced(torch.empty(0, dtype=torch.int64), prefix, ((plus.adapter, len(prefix)),))]
        )
        hidden, end = extend(engine.handle, [Sequenced(kv, last, ((minus.adapter, 1),))])
        engine.handle.kv_allocator.free(torch.cat((kv, end)))
        tokens = torch.tensor([option[0] for option in example.options], device=hidden.device)
        values.append(Head(engine.handle).log_probs(hidden, torch.zeros_like(tokens), tokens).cpu())
    return batch_loss(trainer.source.plans, torch.cat(values)[None], "classification").mean.item()


# --- fixtures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(oracle.CONFIGS))
def model(request, tmp_path_factory):
    """(kind, path, engine) of a small random model; one engine for all tests of a kind."""
    path = oracle.save_model(request.param, tmp_path_factory.mktemp(request.param) / "model")
    engine = EngineProcess(
        model_path=path,
        r=4,
        target_modules=oracle.TARGETS[request.param],
        num_slots=2 * NUM_PERTURBATIONS + 1,
        dtype="float32",
        skip_tokenizer_init=True,
        max_total_tokens=6000,
    )
    yield request.param, path, engine
    engine.close()


@pytest.fixture(params=["alora", "lora"])
def tuning(request, model) -> str:
    if request.param == "alora" and model[0] in oracle.ENCODERS:
        pytest.skip("refused")
    return request.param


def batch_of(kind: str, name: str):
    """(objective, examples)."""
    objective, examples = BATCHES[name]
    return objective, oracle.masked(examples) if kind in oracle.ENCODERS else examples


def random_adapter(
    engine: EngineProcess, kind: str, path: str, tuning: str, targets: Sequence[str] | None = None
) -> Adapter:
    """An adapter in the middle of training: neither matrix is zero."""
    invocation = oracle.INVOCATION if tuning == "alora" else ()
    # PEFT cannot run aLoRA on OPT's fc1 and fc2, which Transformers calls with flattened batches.
    targets = targets or [name for name in oracle.TARGETS[kind] if tuning == "lora" or not name.startswith("fc")]
    spec = AdapterSpec(path, 4, 8, tuple(targets), invocation, None if kind in oracle.ENCODERS else "CAUSAL_LM")
    adapter = Adapter.initial(spec, engine.call(sites, spec), seed=3)
    adapter.theta.add_(direction(99, 0, adapter.numel), alpha=0.05)
    return adapter


def reference_loss(reference: oracle.Reference, objective: str, batch: Sequence[Example]) -> torch.Tensor:
    return reference.option_losses(batch).mean() if objective == "classification" else reference.token_loss(batch)


# --- the properties ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", BATCHES)
def test_losses_equal_peft(model, tuning, batch, tmp_path):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    adapter = random_adapter(engine, kind, path, tuning)
    z = [torch.zeros(adapter.numel)] * NUM_PERTURBATIONS
    plus, minus, leaked = engine.call(losses, tuning, adapter.spec, examples, objective, adapter.theta, z, 0.0, {})
    reference = oracle.Reference(path, adapter, tmp_path / "adapter")
    with torch.no_grad():
        expected = reference_loss(reference, objective, examples).item()
        adapted = [reference_loss(reference, objective, [example]) for example in examples]
        with reference.model.disable_adapter():
            base = [reference_loss(reference, objective, [example]) for example in examples]
    assert max(abs(a - b) for a, b in zip(adapted, base)) > 2e-3, "the adapter must matter"
    assert plus + minus == pytest.approx([expected] * 2 * NUM_PERTURBATIONS, abs=1e-4)
    assert leaked == 0


@pytest.mark.parametrize(
    "targets",
    [
        ["k_proj"],
        ["v_proj"],
        ["q_proj", "k_proj"],
        ["k_proj", "v_proj"],
        ["up_proj"],
        ["gate_proj", "v_proj"],
        ["fc2", "k_proj"],
        ["key"],
        ["query", "value"],
    ],
)
def test_any_subset_of_the_modules_can_be_adapted(model, tuning, targets, tmp_path):
    """SGLang's fused layers are given zeros for what is left out."""
    kind, path, engine = model
    if not set(targets) <= set(oracle.TARGETS[kind]) or (tuning == "alora" and "fc2" in targets):
        pytest.skip("another model's modules")
    objective, examples = batch_of(kind, "longer options")
    adapter = random_adapter(engine, kind, path, tuning, targets)
    z = [direction(6, 0, adapter.numel)]
    plus, minus, leaked = engine.call(losses, tuning, adapter.spec, examples, objective, adapter.theta, z, 0.05, {})
    for sign, loss in ((1, *plus), (-1, *minus)):
        moved = Adapter(adapter.spec, adapter.sites)
        moved.theta = adapter.theta + sign * 0.05 * z[0]
        with torch.no_grad():
            assert loss == pytest.approx(
                reference_loss(oracle.Reference(path, moved, tmp_path / "adapter"), objective, examples).item(),
                abs=1e-4,
            )
    assert plus != minus and leaked == 0


@pytest.mark.parametrize("batch", batches("longer options", "shared beginnings"))
def test_projected_grad_equals_autograd(model, tuning, batch, tmp_path):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    adapter = random_adapter(engine, kind, path, tuning)
    reference = oracle.Reference(path, adapter, tmp_path / "adapter", torch.float64)
    gradient = reference.gradient(reference_loss(reference, objective, examples))
    # Nearly orthogonal to the gradient, terms of third order in eps are not small beside the first: one per cent says
    # nothing there.
    drawn = (direction(5, k, adapter.numel) for k in itertools.count())
    sloped = (z_k for z_k in drawn if torch.dot(gradient, z_k.double()).abs() > 0.1 * gradient.norm())
    z = list(itertools.islice(sloped, NUM_PERTURBATIONS))
    for directions in (z[:1], z):
        plus, minus, _ = engine.call(
            losses, tuning, adapter.spec, examples, objective, adapter.theta, directions, ZO_EPS, {}
        )
        for z_k, plus_k, minus_k in zip(directions, plus, minus, strict=True):
            projected_grad = (plus_k - minus_k) / (2 * ZO_EPS)
            exact = torch.dot(gradient, z_k.double()).item()
            assert abs(projected_grad - exact) <= 0.01 * abs(exact)


@pytest.mark.parametrize("batch", batches("completions", "shared beginnings"))
def test_reuse_changes_nothing(model, tuning, batch):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    adapter = random_adapter(engine, kind, path, tuning)
    z = [direction(6, k, adapter.numel) for k in range(NUM_PERTURBATIONS)]
    arguments = (tuning, adapter.spec, examples, objective, adapter.theta, z, 0.05)
    reused = engine.call(losses, *arguments, {})
    computed = engine.call(losses, *arguments, {"prefix_reuse": False})
    split = engine.call(losses, *arguments, {"max_tokens_per_batch": 40})
    apart = engine.call(losses_without_sharing_in_slots, *arguments, {})
    for other in (computed, split, apart):
        assert other[0] + other[1] == pytest.approx(reused[0] + reused[1], abs=1e-5)
        assert other[2] == 0


def test_one_sided_losses_share_the_one_at_theta(model, tuning, tmp_path):
    kind, path, engine = model
    objective, examples = batch_of(kind, "longer options")
    adapter = random_adapter(engine, kind, path, tuning)
    z = [direction(8, k, adapter.numel) for k in range(2 * NUM_PERTURBATIONS)]
    plus, minus, leaked = engine.call(
        losses, tuning, adapter.spec, examples, objective, adapter.theta, z, ZO_EPS, {"estimator": "one_sided"}
    )
    with torch.no_grad():
        at_theta = reference_loss(
            oracle.Reference(path, adapter, tmp_path / "adapter", torch.float64), objective, examples
        ).item()
        assert minus == pytest.approx([at_theta] * len(z), abs=1e-4)
        for k in (0, len(z) - 1):
            beside = random_adapter(engine, kind, path, tuning)
            beside.theta.add_(z[k], alpha=ZO_EPS)
            exact = (
                reference_loss(
                    oracle.Reference(path, beside, tmp_path / f"beside-{k}", torch.float64), objective, examples
                ).item()
                - at_theta
            )
            assert abs(plus[k] - minus[k] - exact) <= 0.01 * abs(exact)
    assert leaked == 0


def test_leaving_one_out_compares_with_the_mean_of_the_other_directions(model, tuning, tmp_path):
    kind, path, engine = model
    objective, examples = batch_of(kind, "longer options")
    adapter = random_adapter(engine, kind, path, tuning)
    z = [direction(8, k, adapter.numel) for k in range(NUM_PERTURBATIONS)]
    plus, minus, leaked = engine.call(
        losses, tuning, adapter.spec, examples, objective, adapter.theta, z, 0.05, {"estimator": "leave_one_out"}
    )
    exact = []
    for k, z_k in enumerate(z):
        beside = random_adapter(engine, kind, path, tuning)
        beside.theta.add_(z_k, alpha=0.05)
        with torch.no_grad():
            reference = oracle.Reference(path, beside, tmp_path / f"beside-{k}", torch.float64)
            exact.append(reference_loss(reference, objective, examples).item())
    differences = [loss - (sum(exact) - loss) / (NUM_PERTURBATIONS - 1) for loss in exact]
    assert max(map(abs, differences)) > 1e-3
    assert [a - b for a, b in zip(plus, minus)] == pytest.approx(differences, rel=0.01, abs=2e-6)
    assert leaked == 0


def test_rows_of_a_slot_run_their_common_beginning_once(model):
    kind, path, engine = model
    objective, examples = batch_of(kind, "shared beginnings")
    adapter = random_adapter(engine, kind, path, "lora")
    stats = engine.call(prefix_stats, "lora", adapter.spec, examples, objective)
    if kind in oracle.ENCODERS:  # what comes after a beginning changes it
        assert stats.reused == stats.total == 0
        return
    rows = [example.prompt + option[:-1] for example in examples for option in example.options]
    beginnings = {row[: i + 1] for row in rows for i in range(len(row))}
    run = len(beginnings) + len(rows) - len(set(rows))  # a row runs at least its last token
    assert stats.reused == 2 * NUM_PERTURBATIONS * (sum(map(len, rows)) - run)
    assert stats.reused > stats.total / 2 > 0


def test_an_emptied_cache_is_noticed(model):
    kind, path, engine = model
    if kind in oracle.ENCODERS:
        pytest.skip("activated LoRA is refused")
    objective, examples = batch_of(kind, "single-token options")
    adapter = random_adapter(engine, kind, path, "alora")
    first, again = engine.call(losses_around_a_flush, adapter.spec, examples, objective, adapter.theta)
    assert again == first


def test_sharing_kv_between_signs_is_wrong_for_ordinary_lora(model, tmp_path):
    kind, path, engine = model
    if kind in oracle.ENCODERS:
        pytest.skip("nothing can be computed before all of a text is there")
    objective, examples = batch_of(kind, "single-token options")
    adapter = random_adapter(engine, kind, path, "lora")
    z = [direction(7, k, adapter.numel) for k in range(NUM_PERTURBATIONS)]
    reference = oracle.Reference(path, adapter, tmp_path / "adapter", torch.float64)
    gradient = reference.gradient(reference_loss(reference, objective, examples))
    exact = torch.stack([torch.dot(gradient, z_k.double()) for z_k in z])
    plus, minus, _ = engine.call(losses, "lora", adapter.spec, examples, objective, adapter.theta, z, ZO_EPS, {})
    shared = engine.call(losses_on_prefix_of_plus, adapter.spec, examples, adapter.theta, z)
    plus, minus, shared = torch.tensor(plus), torch.tensor(minus), torch.tensor(shared)
    assert ((plus - minus) / (2 * ZO_EPS) - exact).norm() < 0.01 * exact.norm()
    assert ((plus - shared) / (2 * ZO_EPS) - exact).norm() > 0.05 * exact.norm()
