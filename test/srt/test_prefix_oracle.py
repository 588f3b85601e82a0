"""Prefix tuning against Transformers and PEFT, in float32."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.passes import drain
from test_full_oracle import BATCHES, KINDS, reference_loss

ZO_EPS, TOKENS = 1e-2, 5


# --- run in the engine's process --------------------------------------------------------------------------------------


def make_trainer(engine, spec: PrefixSpec, batch, objective: str, **settings):
    from sglang.srt.mezo.training.trainer import MezoTrainer

    defaults = {"prefix_positions": spec.positions, "zo_eps": ZO_EPS, "estimator": "two_sided"}
    config = MezoConfig(tuning="prefix", **{**defaults, **settings})
    return MezoTrainer(engine.handle, config, spec, batch, objective=objective)


def losses(engine, spec, batch, objective, theta, z, zo_eps, settings):
    """(loss_plus, loss_minus, KV tokens that are free in the end and were not before)."""
    free = engine.handle.free_kv_tokens
    trainer = make_trainer(engine, spec, batch, objective, num_perturbations=len(z), **settings)
    try:
        trainer.trainable.theta.copy_(theta)
        plus, minus = drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections(z), zo_eps))
    finally:
        trainer.close()
    return plus, minus, free - engine.handle.free_kv_tokens


def initial(engine, spec) -> torch.Tensor:
    trainer = make_trainer(engine, spec, oracle.examples(2), "classification")
    trainer.close()
    return trainer.trainable.theta


def steps(engine, spec, batch, count, folder):
    """Theta after some steps, the loss there, and the prefix in ``folder``."""
    trainer = make_trainer(engine, spec, batch, "classification", num_perturbations=2, learning_rate=0.1)
    try:
        for _ in range(count):
            drain(trainer.step_passes(trainer.source.plans))
        trainer.trainable.save_pretrained(folder)
        return trainer.trainable.theta, drain(trainer.evaluation_passes(trainer.source.plans))["eval_loss"]
    finally:
        trainer.close()


# --- the references ---------------------------------------------------------------------------------------------------


class PeftPrefix(oracle.Scores):
    """PEFT on the files that a prefix wrote."""

    def __init__(self, path: str, folder):
        base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        self.model = PeftModel.from_pretrained(base, folder).eval()


class UnshiftedPrefix(oracle.Scores):
    """Transformers with keys and values put in before the text, whose positions count from zero."""

    def __init__(self, path: str, adapter: PrefixAdapter, dtype: torch.dtype = torch.float32):
        self._base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        self._prefix = adapter.theta.view(adapter.by_layer).to(dtype)

    def model(self, input_ids: torch.Tensor):
        cache = DynamicCache(config=self._base.config)
        for layer in range(self._prefix.shape[1]):
            keys, values = (self._prefix[:, layer, which].transpose(0, 1)[None] for which in (0, 1))
            cache.update(keys, values, layer)
        positions = torch.arange(input_ids.shape[1])[None]
        mask = torch.ones(1, len(self._prefix) + input_ids.shape[1], dtype=torch.long)
        return self._base(input_ids, past_key_values=cache, position_ids=positions, attention_mask=mask)


def reference(spec: PrefixSpec, theta: torch.Tensor, folder) -> oracle.Scores:
    adapter = PrefixAdapter(spec, theta)
    if spec.positions == "unshifted":
        return UnshiftedPrefix(spec.base_model, adapter)
    adapter.save_pretrained(folder)
    return PeftPrefix(spec.base_model, folder)


# --- the properties ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(KINDS))
def model(request, tmp_path_factory):
    """(path, engine) of a small random model; one engine without LoRA for all tests of a kind."""
    kind, changes = KINDS[request.param]
    path = oracle.save_model(kind, tmp_path_factory.mktemp("prefix") / "model", **changes)
    engine = EngineProcess(model_path=path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=6000)
    yield path, engine
    engine.close()


def spec_of(path: str, positions: str) -> PrefixSpec:
    config = MezoConfig(tuning="prefix", prefix_positions=positions)
    return PrefixSpec.of(config, path, AutoConfig.from_pretrained(path))


def in_the_middle(engine, spec: PrefixSpec) -> torch.Tensor:
    theta = engine.call(initial, spec)
    return theta + 0.3 * direction(99, 0, theta.numel())


@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
def test_a_prefix_begins_as_what_the_model_computes(model, positions):
    path, engine = model
    spec = spec_of(path, positions)
    theta = engine.call(initial, spec).view(PrefixAdapter(spec).by_layer)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    # Which tokens they are is seen by the first keys; they are looked for among all.
    found = []
    for token in range(TOKENS):
        with torch.no_grad():
            tried = torch.tensor([[*found, word] for word in range(oracle.VOCAB)])
            cache = base(tried, use_cache=True).past_key_values
        keys = cache.layers[0].keys[:, :, token]
        found.append(int((keys - theta[token, 0, 0]).abs().sum((1, 2)).argmin()))
    assert len(set(found)) > 1
    with torch.no_grad():
        cache = base(torch.tensor([found]), use_cache=True).past_key_values
    for layer, held in enumerate(cache.layers):
        for which, kv in enumerate((held.keys, held.values)):
            torch.testing.assert_close(theta[:, layer, which], kv[0].transpose(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
def test_losses_equal_transformers_and_peft(model, positions, batch, tmp_path):
    path, engine = model
    objective, examples = BATCHES[batch]
    spec = spec_of(path, positions)
    theta = in_the_middle(engine, spec)
    z = [direction(6, k, theta.numel()) for k in range(2)]
    plus, minus, leaked = engine.call(losses, spec, examples, objective, theta, z, 0.1, {})
    for sign, ours in ((1, plus), (-1, minus)):
        for z_k, loss in zip(z, ours, strict=True):
            there = reference(spec, theta + sign * 0.1 * z_k, tmp_path / "prefix")
            assert loss == pytest.approx(reference_loss(there, objective, examples), abs=1e-5)
    assert plus[0] != minus[0] and plus[0] != plus[1] and leaked == 0


@pytest.mark.parametrize("batch", ["longer options", "shared beginnings"])
def test_projected_grad_equals_the_central_difference_of_transformers(model, batch):
    path, engine = model
    objective, examples = BATCHES[batch]
    spec = spec_of(path, "unshifted")
    theta = in_the_middle(engine, spec)
    z = [direction(5, k, theta.numel()) for k in range(3)]
    plus, minus, _ = engine.call(losses, spec, examples, objective, theta, z, ZO_EPS, {})
    for z_k, plus_k, minus_k in zip(z, plus, minus, strict=True):
        exact = []
        for sign in (1, -1):
            moved = UnshiftedPrefix(path, PrefixAdapter(spec), torch.float64)
            moved._prefix = (theta.double() + sign * ZO_EPS * z_k.double()).view(PrefixAdapter(spec).by_layer)
            exact.append(reference_loss(moved, objective, examples))
        assert (plus_k - minus_k) == pytest.approx(exact[0] - exact[1], rel=0.01)


@pytest.mark.parametrize(
    "settings", [{"prefix_reuse": False}, {"max_tokens_per_batch": 40}, {"estimator": "one_sided"}], ids=str
)
def test_how_points_are_packed_changes_nothing(model, settings):
    path, engine = model
    objective, examples = BATCHES["shared beginnings"]
    spec = spec_of(path, "shifted")
    theta = in_the_middle(engine, spec)
    z = [direction(6, k, theta.numel()) for k in range(3)]
    plus, minus, _ = engine.call(losses, spec, examples, objective, theta, z, 0.1, {})
    ours, theirs, leaked = engine.call(losses, spec, examples, objective, theta, z, 0.1, settings)
    assert ours == pytest.approx(plus, abs=2e-6) and leaked == 0
    if "estimator" not in settings:
        assert theirs == pytest.approx(minus, abs=2e-6)


@pytest.mark.parametrize("positions", ["shifted", "unshifted"])
def test_a_trained_prefix_is_what_peft_runs(model, positions, tmp_path):
    path, engine = model
    spec = spec_of(path, positions)
    objective, examples = BATCHES["longer options"]
    theta, loss = engine.call(steps, spec, examples, 4, tmp_path / "prefix")
    held = PrefixAdapter(spec)
    held.load_weights(tmp_path / "prefix")
    assert torch.equal(held.theta, theta)
    trained = reference(spec, theta, tmp_path / "again")
    assert loss == pytest.approx(reference_loss(trained, objective, examples), abs=1e-5)
