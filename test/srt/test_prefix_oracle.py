"""Prefix tuning against Transformers and PEFT, in float32. PEFT has no prefixes for encoders: keys and values are put
into Transformers' attention instead."""

import math
from types import MethodType

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, DynamicCache

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter, PrefixSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.errors import ConfigError, DivergedError
from sglang.srt.mezo.core.noise import direction
from sglang.srt.mezo.core.passes import drain
from test_full_oracle import BATCHES, KINDS, batch_of, reference_loss

ZO_EPS, TOKENS = 0.1, 5


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


def initial(engine, spec, batch) -> torch.Tensor:
    trainer = make_trainer(engine, spec, batch, "classification")
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
        self.model = PeftModel.from_pretrained(oracle.load(path), folder).eval()


class UnshiftedPrefix(oracle.Scores):
    """Transformers with keys and values put in before the text, whose positions count from zero."""

    def __init__(self, path: str, adapter: PrefixAdapter, dtype: torch.dtype = torch.float32):
        self._base = oracle.load(path, dtype)
        self._prefix = adapter.theta.view(adapter.by_layer).to(dtype)

    def model(self, input_ids: torch.Tensor):
        cache = DynamicCache(config=self._base.config)
        for layer in range(self._prefix.shape[1]):
            keys, values = (self._prefix[:, layer, which].transpose(0, 1)[None] for which in (0, 1))
            cache.update(keys, values, layer)
        positions = torch.arange(input_ids.shape[1])[None]
        mask = torch.ones(1, len(self._prefix) + input_ids.shape[1], dtype=torch.long)
        return self._base(input_ids, past_key_values=cache, position_ids=positions, attention_mask=mask)


class EncoderPrefix(oracle.Scores):
    """Transformers' encoder whose attention, written out, has keys and values before those of the text."""

    def __init__(self, path: str, adapter: PrefixAdapter, dtype: torch.dtype = torch.float32):
        self.model = oracle.load(path, dtype)
        self._prefix = adapter.theta.view(adapter.by_layer).to(dtype)
        for number, attention in enumerate(attentions(self.model)):
            attention.forward = MethodType(self._attend_in(number), attention)

    def _attend_in(self, number: int):
        def forward(attention, hidden_states, *args, **kwargs):
            by_head = (*hidden_states.shape[:2], attention.num_attention_heads, attention.attention_head_size)
            q, k, v = (
                one(hidden_states).view(by_head).transpose(1, 2)
                for one in (attention.query, attention.key, attention.value)
            )
            keys, values = (self._prefix[:, number, which].transpose(0, 1)[None] for which in (0, 1))
            scores = q @ torch.cat((keys, k), 2).transpose(-1, -2) / attention.attention_head_size**0.5
            output = scores.softmax(-1) @ torch.cat((values, v), 2)
            return output.transpose(1, 2).flatten(2), None

        return forward


def attentions(model) -> list:
    """The modules of an encoder that project to queries, keys and values."""
    return [module for module in model.modules() if hasattr(module, "query")]


def unshifted(path: str, adapter: PrefixAdapter, dtype: torch.dtype = torch.float32) -> oracle.Scores:
    kind = EncoderPrefix if adapter.spec.task_type is None else UnshiftedPrefix
    return kind(path, adapter, dtype)


def keys_and_values(path: str, tokens: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every layer, [texts, heads, tokens, head_dim] each."""
    model, found = oracle.load(path), []

    def keep(attention, args, output):
        by_head = (*args[0].shape[:2], attention.num_attention_heads, attention.attention_head_size)
        found.append(tuple(one(args[0]).view(by_head).transpose(1, 2) for one in (attention.key, attention.value)))

    for attention in attentions(model):
        attention.register_forward_hook(keep)
    with torch.no_grad():
        if attentions(model):
            model(tokens)
            return found
        return [(layer.keys, layer.values) for layer in model(tokens, use_cache=True).past_key_values.layers]


def reference(spec: PrefixSpec, theta: torch.Tensor, folder) -> oracle.Scores:
    adapter = PrefixAdapter(spec, theta)
    if spec.positions == "unshifted":
        return unshifted(spec.base_model, adapter)
    adapter.save_pretrained(folder)
    return PeftPrefix(spec.base_model, folder)


# --- the properties ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(KINDS))
def model(request, tmp_path_factory):
    """(kind, path, engine) of a small random model; one engine without LoRA for all tests of a kind."""
    kind, changes = KINDS[request.param]
    path = oracle.save_model(kind, tmp_path_factory.mktemp("prefix") / "model", **changes)
    engine = EngineProcess(model_path=path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=6000)
    yield kind, path, engine
    engine.close()


@pytest.fixture(params=["shifted", "unshifted"])
def positions(request, model) -> str:
    if request.param == "shifted" and model[0] in oracle.ENCODERS:
        pytest.skip("refused")
    return request.param


def spec_of(path: str, positions: str | None) -> PrefixSpec:
    config = MezoConfig(tuning="prefix", prefix_positions=positions)
    return PrefixSpec.of(config, path, AutoConfig.from_pretrained(path))


def begun_in_a_model_that_overflows(engine, spec, batch) -> tuple[str, int, bool]:
    """What is said, how many places of the pool are lost, and whether what they held is finite."""
    free, weight = engine.handle.free_kv_tokens, next(engine.handle.model_runner.model.parameters())
    kept = weight.detach().clone()
    with torch.inference_mode():
        weight.fill_(math.inf)
    try:
        make_trainer(engine, spec, batch, "classification").close()
        said = "nothing"
    except DivergedError as error:
        said = str(error)
    finally:
        with torch.inference_mode():
            weight.copy_(kept)
    pool = engine.handle.kv_allocator.get_kvcache()
    finite = all(buffer.isfinite().all() for buffer in pool.get_kv_buffer(pool.start_layer))
    return said, free - engine.handle.free_kv_tokens, finite


def test_a_model_that_overflows_gives_no_prefix_and_keeps_no_places(model):
    kind, path, engine = model
    spec = spec_of(path, "unshifted")
    said, lost, finite = engine.call(begun_in_a_model_that_overflows, spec, batch_of(kind, "longer options")[1])
    assert "serve it in another dtype" in said and lost == 0 and finite


def in_the_middle(model, spec: PrefixSpec) -> torch.Tensor:
    kind, _, engine = model
    theta = engine.call(initial, spec, batch_of(kind, "longer options")[1])
    return theta + 0.3 * direction(99, 0, theta.numel())


def test_a_prefix_begins_as_what_the_model_computes(model, positions):
    kind, path, engine = model
    spec = spec_of(path, positions)
    theta = engine.call(initial, spec, batch_of(kind, "longer options")[1]).view(PrefixAdapter(spec).by_layer)
    # Which tokens they are is seen by the first keys; they are looked for among all.
    found = []
    for token in range(TOKENS):
        tried = torch.tensor([[*found, word] for word in range(oracle.VOCAB)])
        keys = keys_and_values(path, tried)[0][0][:, :, token]
        found.append(int((keys - theta[token, 0, 0]).abs().sum((1, 2)).argmin()))
    assert len(set(found)) > 1
    for layer, held in enumerate(keys_and_values(path, torch.tensor([found]))):
        for which, kv in enumerate(held):
            torch.testing.assert_close(theta[:, layer, which], kv[0].transpose(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", BATCHES)
def test_losses_equal_transformers_and_peft(model, positions, batch, tmp_path):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    spec = spec_of(path, positions)
    theta = in_the_middle(model, spec)
    z = [direction(6, k, theta.numel()) for k in range(2)]
    plus, minus, leaked = engine.call(losses, spec, examples, objective, theta, z, 0.1, {})
    for sign, ours in ((1, plus), (-1, minus)):
        for z_k, loss in zip(z, ours, strict=True):
            there = reference(spec, theta + sign * 0.1 * z_k, tmp_path / "prefix")
            assert loss == pytest.approx(reference_loss(there, objective, examples), abs=1e-5)
    assert plus[0] != minus[0] and plus[0] != plus[1] and leaked == 0


@pytest.mark.parametrize("batch", ["longer options", "shared beginnings"])
def test_projected_grad_equals_the_central_difference_of_transformers(model, batch):
    kind, path, engine = model
    objective, examples = batch_of(kind, batch)
    spec = spec_of(path, "unshifted")
    theta = in_the_middle(model, spec)
    z = [direction(5, k, theta.numel()) for k in range(3)]
    plus, minus, _ = engine.call(losses, spec, examples, objective, theta, z, ZO_EPS, {})
    for z_k, plus_k, minus_k in zip(z, plus, minus, strict=True):
        exact = []
        for sign in (1, -1):
            moved = unshifted(path, PrefixAdapter(spec), torch.float64)
            moved._prefix = (theta.double() + sign * ZO_EPS * z_k.double()).view(PrefixAdapter(spec).by_layer)
            exact.append(reference_loss(moved, objective, examples))
        assert (plus_k - minus_k) == pytest.approx(exact[0] - exact[1], rel=0.01)


@pytest.mark.parametrize(
    "settings", [{"prefix_reuse": False}, {"max_tokens_per_batch": 40}, {"estimator": "one_sided"}], ids=str
)
def test_how_points_are_packed_changes_nothing(model, settings):
    kind, path, engine = model
    objective, examples = batch_of(kind, "shared beginnings")
    spec = spec_of(path, None)
    theta = in_the_middle(model, spec)
    z = [direction(6, k, theta.numel()) for k in range(3)]
    plus, minus, _ = engine.call(losses, spec, examples, objective, theta, z, 0.1, {})
    ours, theirs, leaked = engine.call(losses, spec, examples, objective, theta, z, 0.1, settings)
    assert ours == pytest.approx(plus, abs=2e-6) and leaked == 0
    if "estimator" not in settings:
        assert theirs == pytest.approx(minus, abs=2e-6)


def test_a_trained_prefix_is_what_peft_runs(model, positions, tmp_path):
    kind, path, engine = model
    spec = spec_of(path, positions)
    objective, examples = batch_of(kind, "longer options")
    theta, loss = engine.call(steps, spec, examples, 4, tmp_path / "prefix")
    held = PrefixAdapter(spec)
    held.load_weights(tmp_path / "prefix")
    assert torch.equal(held.theta, theta)
    trained = reference(spec, theta, tmp_path / "again")
    assert loss == pytest.approx(reference_loss(trained, objective, examples), abs=1e-5)


@pytest.mark.parametrize("kind", oracle.ENCODERS)
def test_what_peft_could_run_is_refused_of_an_encoder(kind, tmp_path):
    path = oracle.save_model(kind, tmp_path / "model")
    with pytest.raises(ConfigError, match="prefix_positions='shifted'"):
        spec_of(path, "shifted")
    spec = spec_of(path, None)
    assert spec.positions == "unshifted"
    spec.require_agreement(MezoConfig(tuning="prefix"))
    adapter = PrefixAdapter(spec, direction(1, 0, PrefixAdapter(spec).numel))
    adapter.save_pretrained(tmp_path / "prefix")
    again = PrefixAdapter.from_pretrained(tmp_path / "prefix")
    assert again.spec == spec and torch.equal(again.theta, adapter.theta)
