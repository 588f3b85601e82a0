# SPDX-License-Identifier: Apache-2.0
"""OPT in the engine against Transformers' OPTForCausalLM, in fp32.

The oracle is Transformers (with PEFT where an adapter is on): log-probabilities
of every prompt token (prefill) and of a greedy continuation (decode). Weights
are random and large enough, layer norms and biases included, that a dropped
bias or a missing scale moves the log-probabilities far more than the tolerance.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

from engine_process import ServingEngine, require_devices
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_parallel

load_plugins()  # before the model: the plugin serves this module name
from sglang.srt.models import opt  # noqa: E402

TOLERANCE = 1e-4
NEW_TOKENS = 6
PROMPT_LENGTHS = (5, 17, 9, 2)
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]

SMALL = {
    "vocab_size": 323,  # no multiple of the padding that vocab-parallel layers add
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "pad_token_id": 1,
}
KINDS = {
    "opt-125m": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "galactica": {
        "enable_bias": False,
        "activation_function": "gelu",
        "layer_norm_elementwise_affine": False,
        "_remove_final_layer_norm": True,
    },
    "untied": {"tie_word_embeddings": False, "activation_function": "silu"},
}
WITH_ADAPTER = "opt-125m"
SLOW = (("galactica", 2), ("untied", 2), ("opt-350m", 2))  # which split little that opt-125m does not


@dataclasses.dataclass(frozen=True)
class Case:
    """One model folder with its prompts and what Transformers says of them."""

    folder: Path
    prompts: list[list[int]]
    base: "Expected"
    adapter: Path | None = None
    adapted: "Expected | None" = None


@dataclasses.dataclass(frozen=True)
class Expected:
    prefill: list[torch.Tensor]  # a prompt's [L - 1] log p(token | before)
    tokens: list[list[int]]  # NEW_TOKENS greedy tokens
    decode: list[torch.Tensor]  # [NEW_TOKENS] their log-probabilities


def random_model(overrides: dict) -> OPTForCausalLM:
    """A random OPT in which every parameter matters, zeros and ones included."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**SMALL, **overrides)).eval()
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            param.data.normal_(1.0, 0.3)
        elif name.endswith("bias"):
            param.data.normal_(0.0, 0.3)
        else:
            param.data.normal_(0.0, 0.12)
    return model


@torch.no_grad()
def expect(model: torch.nn.Module, prompts: list[list[int]]) -> Expected:
    prefill, tokens, decode = [], [], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        taken = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        prefill.append(taken[: len(prompt) - 1])
        tokens.append(ids[len(prompt) :])
        decode.append(taken[len(prompt) - 1 :])
    return Expected(prefill, tokens, decode)


def random_adapter(model: OPTForCausalLM, folder: Path) -> torch.nn.Module:
    config = LoraConfig(r=4, lora_alpha=12, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, param in adapted.named_parameters():
        if "lora_B" in name:  # PEFT starts from B = 0, which would test nothing
            param.data.normal_(0.0, 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("opt")
    torch.manual_seed(1)
    prompts = [torch.randint(4, SMALL["vocab_size"], (n,)).tolist() for n in PROMPT_LENGTHS]
    cases = {}
    for kind, overrides in KINDS.items():
        model = random_model(overrides)
        folder, adapter = root / kind, root / f"{kind}-adapter"
        model.save_pretrained(folder)
        base = expect(model, prompts)
        cases[kind] = Case(folder, prompts, base)
        if kind == WITH_ADAPTER:
            adapted = expect(random_adapter(model, adapter), prompts)
            cases[kind] = Case(folder, prompts, base, adapter, adapted)
    return cases


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((kind, tp), marks=[pytest.mark.slow] * ((kind, tp) in SLOW)) for kind in KINDS for tp in (1, 2)
    ],
    ids=lambda p: f"{p[0]}-tp{p[1]}",
)
def served(request, cases) -> Iterator[tuple]:
    """(engine, case): one engine for every kind and tensor-parallel size."""
    kind, tp_size = request.param
    require_devices(tp_size)
    case = cases[kind]
    lora = {}
    if case.adapter is not None:
        lora = {"lora_paths": [f"adapter={case.adapter}"], "max_loras_per_batch": 2}
    engine = ServingEngine(
        model_path=str(case.folder),
        dtype="float32",
        skip_tokenizer_init=True,
        tp_size=tp_size,
        max_total_tokens=2048,
        log_level="error",
        **lora,
    )
    try:
        yield engine, case
    finally:
        engine.close()


def generate(engine, prompts: list[list[int]], adapters=None) -> list[dict]:
    return engine.generate(
        input_ids=prompts,
        sampling_params={"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
        return_logprob=True,
        logprob_start_len=0,
        lora_path=adapters,
    )


def logprobs(output: dict, key: str) -> torch.Tensor:
    """Log-probabilities in an engine's reply; a prompt's first token has none."""
    values = [entry[0] for entry in output["meta_info"][key]]
    return torch.tensor([value for value in values if value is not None])


def largest_difference(outputs: list[dict], expected: Expected) -> float:
    worst = 0.0
    for i, output in enumerate(outputs):
        assert output["output_ids"] == expected.tokens[i]
        prefill = logprobs(output, "input_token_logprobs")
        decode = logprobs(output, "output_token_logprobs")
        for got, want in ((prefill, expected.prefill[i]), (decode, expected.decode[i])):
            assert got.shape == want.shape
            worst = max(worst, (got - want).abs().max().item())
    return worst


def test_logprobs_equal_transformers(served, record_property):
    """Base rows, and adapter rows beside them in one batch where there is one:
    each row gets its own weights."""
    engine, case = served
    n = len(case.prompts)
    if case.adapter is None:
        worst = largest_difference(generate(engine, case.prompts), case.base)
    else:
        names = [None] * n + ["adapter"] * n
        outputs = generate(engine, case.prompts * 2, names)
        worst = largest_difference(outputs[:n], case.base)
        worst = max(worst, largest_difference(outputs[n:], case.adapted))
    record_property("max_abs_diff", worst)
    print(f"max |log-prob difference| = {worst:.1e}")
    assert worst <= TOLERANCE


def test_adapter_has_an_effect(cases):
    """Else the adapter rows above would prove nothing."""
    case = cases[WITH_ADAPTER]
    pairs = zip(case.adapted.prefill, case.base.prefill, strict=True)
    assert max((a - b).abs().max() for a, b in pairs) > 1000 * TOLERANCE


@contextlib.contextmanager
def pipeline_rank(rank: int, size: int = 1) -> Iterator[None]:
    """A process that believes to be one rank of a pipeline, without the others."""
    group = SimpleNamespace(is_first_rank=rank == 0, is_last_rank=rank == size - 1)
    ranks = {"tp_size": 1, "tp_rank": 0, "tp_group": None}
    ranks |= {"pp_size": size, "pp_rank": rank, "pp_group": group}
    with get_context().override_server_args(), get_parallel().override(**ranks):
        yield


def build(config: OPTConfig, rank: int = 0, size: int = 1) -> "opt.OPTForCausalLM":
    with pipeline_rank(rank, size):
        return opt.OPTForCausalLM(config)


def test_loads_names_without_model_prefix():
    reference = random_model({})
    weights = reference.model.state_dict() | {"decoder.version": torch.ones(1)}
    model = build(reference.config)
    loaded = model.load_weights(weights.items())
    assert loaded == {f"model.{name}" for name in reference.model.state_dict()}
    embed, head = model.get_embed_and_head()
    assert embed is head
    vocab = SMALL["vocab_size"]
    assert torch.equal(embed[:vocab], reference.lm_head.weight)


@pytest.mark.parametrize("lost", ["layers.1.self_attn.k_proj.bias", "layers.2.fc2.bias"])
def test_missing_weight_is_an_error(lost):
    reference = random_model({})
    name = f"model.decoder.{lost}"
    weights = {k: v for k, v in reference.state_dict().items() if k != name}
    with pytest.raises(ValueError, match=re.escape(name)):
        build(reference.config).load_weights(weights.items())


@pytest.mark.parametrize("kind", ["galactica", "opt-125m"])
def test_unknown_weight_is_an_error(kind):
    reference = random_model(KINDS[kind])
    stray = {"model.decoder.layers.0.self_attn.rotary.bias": torch.ones(1)}
    weights = reference.state_dict() | stray
    with pytest.raises(ValueError, match="rotary"):
        build(reference.config).load_weights(weights.items())


def test_later_load_may_be_partial():
    reference = random_model({"tie_word_embeddings": False})
    model = build(reference.config)
    model.load_weights(reference.state_dict().items())
    model.load_weights([("lm_head.weight", torch.ones_like(reference.lm_head.weight))])
    assert model.lm_head.weight[: SMALL["vocab_size"]].eq(1).all()
    dummy = build(reference.config)
    dummy.post_load_weights()
    assert dummy.load_weights([]) == set()


def test_lora_dimensions():
    model = build(OPTConfig(**SMALL, word_embed_proj_dim=32))
    hidden, ffn, vocab = 64, 128, 323
    assert model.get_hidden_dim("qkv_proj", 0) == (hidden, 3 * hidden)
    assert model.get_hidden_dim("out_proj", 0) == (hidden, hidden)
    assert model.get_hidden_dim("fc1", 2) == (hidden, ffn)
    assert model.get_hidden_dim("fc2", 2) == (ffn, hidden)
    assert model.get_hidden_dim("lm_head", 0) == (32, vocab)
    with pytest.raises(NotImplementedError, match="gate_proj"):
        model.get_hidden_dim("gate_proj", 0)


def test_bad_configuration_is_an_error():
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        build(OPTConfig(**SMALL | {"num_attention_heads": 5}))
    with pytest.raises(KeyError, match="bogus"):
        build(OPTConfig(**SMALL, activation_function="bogus"))


def causal_attention(q, k, v, forward_batch) -> torch.Tensor:
    """[T, H] each, one sequence, no cache: stands in for the attention backend."""
    heads = SMALL["num_attention_heads"]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return output.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_pipeline_stages_chain_to_the_whole(kind):
    """Two pipeline ranks hand on hidden states and end where Transformers does."""
    reference = random_model(KINDS[kind])
    ids = torch.randint(4, SMALL["vocab_size"], (11,))
    positions, state = torch.arange(len(ids)), None
    for rank in (0, 1):
        model = build(reference.config, rank, size=2)
        model.load_weights(reference.state_dict().items())
        for layer in model.model.decoder.layers[model.start_layer : model.end_layer]:
            layer.self_attn.attn.forward = causal_attention
        with pipeline_rank(rank, size=2), torch.no_grad():
            state = model.model(ids, positions, None, pp_proxy_tensors=state)
    vocab = SMALL["vocab_size"]
    logits = torch.nn.functional.linear(state, model.lm_head.weight[:vocab])
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    assert (logits - expected).abs().max() <= TOLERANCE
