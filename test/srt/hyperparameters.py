"""A server's answer to hyperparameters."""

import pytest

from sglang.srt.mezo.service.jobs.hyperparameters import kinds, resolve
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription

KINDS = {name: kind for name, (kind, _) in kinds().items()}


ENGINE = EngineDescription(
    model_path="/models/tiny",
    dtype="float32",
    context_length=128,
    kv_capacity=4000,
    max_lora_rank=16,
    max_loras_per_batch=8,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    default_target_modules={"alora": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora": ["q_proj", "v_proj"]},
    micro_step_tokens=64,
    idle_step_tokens=256,
    no_alora="",
    rewards=["brevity", "politeness"],
)


PLACE = "method.supervised.hyperparameters"


def request(**hyperparameters):
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}}


def resolved(num_train=1000, engine=ENGINE, **hyperparameters):
    return resolve(request(**hyperparameters), engine, num_train, seed=7)


def refused(body, engine=ENGINE):
    with pytest.raises(RequestError) as caught:
        resolve(body, engine, 1000, seed=7)
    assert caught.value.status == 400
    return caught.value
