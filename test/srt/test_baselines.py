# SPDX-License-Identifier: Apache-2.0
"""The two baseline loops against each other and against autograd, in fp32.

The oracle scores every option of every example alone, unpadded, with PEFT's own
forward, and differentiates the loss.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from baselines import OfficialStyleMezo, StrongMezo, build_peft_model

EPS, LEARNING_RATE, SEED = 1e-3, 1e-2, 7
LOSS_TOLERANCE = 1e-5
# A loss is off by about 1e-7, which projected_grad divides by 2 * EPS; the rest
# is the third derivative along z.
GRAD_TOLERANCE = 1e-3
INVOCATION = [11, 12]
PAD = 1


@dataclasses.dataclass(frozen=True)
class Row:
    prompt: list[int]
    options: list[list[int]]
    label: int


def random_opt() -> OPTForCausalLM:
    """Smooth: a kink of ReLU between the two points is an error of order EPS."""
    config = OPTConfig(
        vocab_size=211,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        activation_function="gelu",
    )
    return OPTForCausalLM(config)


def random_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=211,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


MODELS = {"opt": random_opt, "llama": random_llama}
TARGETS = {
    ("opt", "lora"): ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ("opt", "alora"): ["q_proj", "k_proj", "v_proj", "out_proj"],
    ("llama", "lora"): ["q_proj", "v_proj", "down_proj"],
    ("llama", "alora"): ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"],
}


def random_adapter_model(family: str, tuning: str) -> PeftModel:
    torch.manual_seed(0)
    model = MODELS[family]()
    for param in model.parameters():
        param.data += 0.1 * torch.randn_like(param)
    tokens = INVOCATION if tuning == "alora" else []
    peft_model = build_peft_model(model, tuning, 4, 8, TARGETS[family, tuning], tokens)
    for param in peft_model.parameters():
        if param.requires_grad:  # PEFT starts from B = 0, where A has no gradient
            param.data.normal_(0.0, 0.1)
    return peft_model


def random_batch(kind: str) -> list[Row]:
    """Prompts of unlike lengths which end in the invocation, and another token."""
    draw = np.random.default_rng(3)

    def tokens(low: int, high: int) -> list[int]:
        return draw.integers(20, 211, draw.integers(low, high)).tolist()

    batch = []
    for i in range(5):
        if kind == "single" or (kind == "mixed" and i % 2):
            options = [[33], [44]]
        else:
            options = [tokens(1, 5) for _ in range(2 + i % 2)]
        prompt = tokens(1, 15) + INVOCATION + tokens(1, 3)
        batch.append(Row(prompt, options, int(draw.integers(len(options)))))
    return batch


def oracle_loss(model: PeftModel, batch: list[Row]) -> torch.Tensor:
    losses = []
    for row in batch:
        scores = []
        for option in row.options:
            ids = torch.tensor([row.prompt + option])
            logprobs = model(ids).logits[0, :-1].log_softmax(-1)
            taken = logprobs.gather(1, ids[0, 1:, None])[-len(option) :]
            scores.append(taken.mean())
        losses.append(F.cross_entropy(torch.stack(scores), torch.tensor(row.label)))
    return torch.stack(losses).mean()


def trainable(model: PeftModel) -> list[torch.nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def first_direction(model: PeftModel) -> list[torch.Tensor]:
    """z of a loop's first step, as its seed defines it."""
    seed = int(np.random.default_rng(SEED).integers(10**9))
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in trainable(model)]


@torch.no_grad()
def shifted_loss(model: PeftModel, batch, directions, scale: float) -> float:
    model = copy.deepcopy(model)
    for param, z in zip(trainable(model), directions, strict=True):
        param += scale * z
    return oracle_loss(model, batch).item()


CASES = [
    (family, tuning, kind)
    for family in MODELS
    for tuning in ("lora", "alora")
    for kind in ("single", "multiple", "mixed")
]


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[PeftModel, list[Row]]:
    family, tuning, kind = request.param
    return random_adapter_model(family, tuning), random_batch(kind)


@pytest.fixture(params=[OfficialStyleMezo, StrongMezo])
def loop_class(request) -> type:
    return request.param


def make(loop_class: type, model: PeftModel):
    return loop_class(copy.deepcopy(model), zo_eps=EPS, learning_rate=LEARNING_RATE, seed=SEED, pad_token_id=PAD)


def test_step_equals_oracle(case, loop_class, record_property):
    """Losses against unpadded forwards, projected_grad against z . grad L, and
    the update against its definition."""
    model, batch = case
    z = first_direction(model)
    gradients = torch.autograd.grad(oracle_loss(model, batch), trainable(model))
    slope = sum((g * d).sum() for g, d in zip(gradients, z, strict=True)).item()
    loop = make(loop_class, model)
    loss_plus, loss_minus, projected_grad = loop.step(batch)
    loss_error = max(
        abs(loss_plus - shifted_loss(model, batch, z, EPS)), abs(loss_minus - shifted_loss(model, batch, z, -EPS))
    )
    grad_error = abs(projected_grad - slope)
    record_property("loss_error", loss_error)
    record_property("projected_grad_error", grad_error)
    print(f"loss {loss_error:.1e}, slope {slope:+.3f} error {grad_error:.1e}")
    assert loss_error <= LOSS_TOLERANCE
    assert abs(slope) > 10 * GRAD_TOLERANCE
    assert grad_error <= GRAD_TOLERANCE
    triples = zip(trainable(loop.model), trainable(model), z, strict=True)
    for after, before, direction in triples:
        step = LEARNING_RATE * projected_grad * direction
        assert torch.allclose(after, before - step, atol=1e-6)


def test_loops_agree_over_steps(case, record_property):
    """Three steps from the same seed: the trajectories stay together."""
    model, batch = case
    official, strong = make(OfficialStyleMezo, model), make(StrongMezo, model)
    worst = 0.0
    for _ in range(3):
        losses = official.step(batch)[:2], strong.step(batch)[:2]
        worst = max(worst, *(abs(a - b) for a, b in zip(*losses, strict=True)))
    record_property("max_abs_diff", worst)
    print(f"max |loss difference| = {worst:.1e}")
    assert worst <= LOSS_TOLERANCE


@pytest.mark.parametrize("family", MODELS)
def test_prompt_without_invocation_runs_the_base_model(family):
    """Padding that looks like the invocation must not switch the adapter on."""
    model = random_adapter_model(family, "alora")
    model.active_peft_config.alora_invocation_tokens = [PAD]
    batch = [Row([25, 26, 27], [[33], [44]], 0), Row([31, 32, 33, 34, 35, 36], [[33, 40], [44]], 1)]
    loss_plus, loss_minus, projected_grad = make(StrongMezo, model).step(batch)
    assert projected_grad == 0.0
    with model.disable_adapter(), torch.no_grad():
        assert abs(loss_plus - oracle_loss(model, batch).item()) <= LOSS_TOLERANCE


def test_step_in_bfloat16(loop_class):
    """The loops take a model in low precision, adapter included."""
    model = random_adapter_model("opt", "lora").to(torch.bfloat16)
    loop = make(loop_class, model)
    assert {p.dtype for p in loop.params} == {torch.bfloat16}
    assert all(np.isfinite(loop.step(random_batch("mixed"))))


def test_bad_tuning_is_an_error():
    with pytest.raises(ValueError, match="tuning='ia3'"):
        build_peft_model(random_opt(), "ia3", 4, 8, ["q_proj"])
    with pytest.raises(ValueError, match="invocation_tokens"):
        build_peft_model(random_opt(), "alora", 4, 8, ["q_proj"])
