"""What the model writes at every point, against Transformers + PEFT in float32, and what is made of it."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import oracle
from engine_process import EngineProcess
from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.adapters.prefix_adapter import KVShape, PrefixAdapter, PrefixSpec
from sglang.srt.mezo.adapters.weights import WeightsSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.directions import KeptDirections
from sglang.srt.mezo.core.noise import direction, sample_uniform
from sglang.srt.mezo.core.objective import Generation
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Example
from test_prefix_oracle import PeftPrefix

ZO_EPS, NEW_TOKENS, SEED = 0.05, 12, 17
STOP = 5  # the tokenizer's end of a text
ENDS = {STOP, 2}  # and that of the models' configurations
EXAMPLES = [Example(prompt, columns={"prompt": "", "answers": []}) for prompt in oracle.prompts(6)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Every token is a word: text and tokens are one another."""
    words = {f"w{token}": token for token in range(oracle.VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words)), eos_token=f"w{STOP}")


# --- run in the engine's process --------------------------------------------------------------------------------------


def written(engine, spec, tuning: str, theta, z, settings) -> tuple[list[list[str]], int]:
    """The texts at theta + and - eps z of each direction, and the KV tokens that are no longer free."""
    from sglang.srt.mezo.training.rewards import Writer
    from sglang.srt.mezo.training.trainer import MezoTrainer

    texts = []

    def grade(plans, of_points):
        texts.extend(of_points[i : i + len(EXAMPLES)] for i in range(0, len(of_points), len(EXAMPLES)))
        return [0.0] * len(of_points)

    of_tuning = {}
    if isinstance(spec, AdapterSpec):
        of_tuning = {"r": spec.r, "lora_alpha": spec.lora_alpha}
    elif isinstance(spec, PrefixSpec):
        of_tuning = {"num_virtual_tokens": spec.num_virtual_tokens}
    config = MezoConfig(
        tuning=tuning,
        zo_eps=ZO_EPS,
        num_perturbations=len(z),
        estimator="two_sided",
        objective="f1",
        max_new_tokens=NEW_TOKENS,
        **of_tuning,
        **settings,
    )
    engine.scheduler.flush_cache()
    free = engine.handle.free_kv_tokens
    trainer = MezoTrainer(engine.handle, config, spec, EXAMPLES, writer=Writer(config.generation, tokenizer(), grade))
    start = trainer.trainable.theta.clone()
    try:
        trainer.trainable.theta.copy_(theta)
        drain(trainer.probe.loss_passes(trainer.source.plans, KeptDirections(z), ZO_EPS, SEED))
        trainer.trainable.theta.copy_(start)
    finally:
        trainer.close()
    return texts, free - engine.handle.free_kv_tokens


def sites(engine, spec):
    from sglang.srt.mezo.engine.layers import adapted_sites

    return adapted_sites(engine.handle, spec.target_modules)


# --- the reference ----------------------------------------------------------------------------------------------------


def expected(scores: oracle.Scores, temperature: float) -> list[str]:
    """One token after the other, each from a pass over all before it."""
    texts = []
    for number, example in enumerate(EXAMPLES):
        tokens: list[int] = []
        while len(tokens) < NEW_TOKENS and not ENDS & set(tokens):
            with torch.no_grad():
                logits = scores.model(input_ids=torch.tensor([[*example.prompt, *tokens]])).logits[0, -1]
            tokens.append(chosen(logits, temperature, sample_uniform(SEED, number, len(tokens))))
        texts.append(" ".join(f"w{token}" for token in tokens if token not in ENDS))
    return texts


def chosen(logits: torch.Tensor, temperature: float, uniform: float) -> int:
    if not temperature:
        return int(logits.argmax())
    sums = torch.softmax(logits.double() / temperature, 0).cumsum(0)
    return int((sums <= uniform).sum())


class Weights(oracle.ModelReference):
    def __init__(self, path: str, theta: torch.Tensor):
        super().__init__(path)
        self.set(theta)


@pytest.fixture(scope="module", params=["opt-125m, adapters", "llama, adapters", "llama, plain"])
def model(request, tmp_path_factory):
    """(kind, path, engine, ways of tuning): one with adapters of layers, or one without."""
    kind, _, holds = request.param.partition(", ")
    path = oracle.save_model(kind, tmp_path_factory.mktemp(kind) / "model")
    lora = {"r": 4, "target_modules": oracle.TARGETS[kind], "num_slots": 5} if holds == "adapters" else {}
    engine = EngineProcess(model_path=path, dtype="float32", skip_tokenizer_init=True, max_total_tokens=6000, **lora)
    yield kind, path, engine, ("alora", "lora") if lora else ("full", "prefix")
    engine.close()


def case(tuning: str, kind: str, path: str, engine, folder):
    """What is trained, a theta for it, and the reference at another."""
    if tuning == "full":
        theta = oracle.ModelReference(path).theta
        return WeightsSpec(path, None), theta, lambda moved: Weights(path, moved)
    if tuning == "prefix":
        spec = PrefixSpec(path, 3, KVShape(2, 2 if kind == "llama" else 4, 16))
        theta = direction(98, 0, PrefixAdapter(spec).numel)

        def prefix(moved):
            PrefixAdapter(spec, moved).save_pretrained(folder)
            return PeftPrefix(path, folder)

        return spec, theta, prefix
    invocation = oracle.INVOCATION if tuning == "alora" else ()
    spec = AdapterSpec(path, 4, 8, tuple(name for name in oracle.TARGETS[kind] if name.endswith("proj")), invocation)
    adapter = Adapter.initial(spec, engine.call(sites, spec), seed=3)
    adapter.theta.add_(direction(99, 0, adapter.numel), alpha=0.05)

    def peft(moved):
        other = Adapter(spec, adapter.sites)
        other.theta = moved
        return oracle.Reference(path, other, folder)

    return spec, adapter.theta, peft


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("number", [0, 1])
def test_texts_equal_those_of_transformers(model, number, temperature, tmp_path):
    kind, path, engine, tunings = model
    tuning = tunings[number]
    spec, theta, reference = case(tuning, kind, path, engine, tmp_path / "adapter")
    z = [direction(7, k, theta.numel()) for k in range(2)]
    settings = {"temperature": temperature}
    texts, leaked = engine.call(written, spec, tuning, theta, z, settings)
    points = [theta + sign * ZO_EPS * z_k for z_k in z for sign in (1, -1)]
    assert texts == [expected(reference(point), temperature) for point in points]
    assert len({tuple(of_point) for of_point in texts}) > 1, "points must differ"
    assert leaked == 0
    if tuning != "full":  # which has one point at a time
        assert engine.call(written, spec, tuning, theta, z, {**settings, "max_tokens_per_batch": 40}) == (texts, 0)
        assert engine.call(written, spec, tuning, theta, z, {**settings, "prefix_reuse": False}) == (texts, 0)


def test_what_ends_a_text():
    from sglang.srt.mezo.scoring.generator import Completions

    generation = Generation("f1", None, 4, 0.0, "w7")
    completions = Completions(tokenizer(), generation, (9,))
    for tokens, over, text in (
        ([3], False, "w3"),
        ([3, STOP], True, "w3"),
        ([3, 9], True, "w3"),
        ([3, 7], True, "w3 "),
        ([3, 4, 6, 8], True, "w3 w4 w6 w8"),
        ([STOP], True, ""),
    ):
        assert (completions.is_over(tokens), completions.text(tokens)) == (over, text)
