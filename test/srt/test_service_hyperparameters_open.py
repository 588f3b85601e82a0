"""What a job leaves open follows from what it gives, from its rows, and from the server."""

from dataclasses import replace

import msgspec
import pytest

from hyperparameters import ENGINE, KINDS, PLACE, refused, request, resolved
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.service.jobs.hyperparameters import beyond, reported, resolve, settle, stored
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import EngineDescription


def test_epochs_that_a_client_asks_for_are_counted_in_examples_later():
    config, hyperparameters = resolved(n_epochs=3, num_train=1)
    assert MezoConfig(**stored(config)).steps_for(160) == 480
    assert reported(stored(config), hyperparameters)["max_steps"] == "auto"


def test_the_multiplier_is_of_the_default_learning_rate_only():
    config, hyperparameters = resolved(learning_rate_multiplier=2)
    assert config.learning_rate == 2 * MezoConfig().learning_rate
    assert hyperparameters["learning_rate_multiplier"] == 2
    assert resolved(learning_rate_multiplier=1, learning_rate=0.5)[0].learning_rate == 0.5
    error = refused(request(learning_rate_multiplier=2, learning_rate=0.5))
    assert error.param == f"{PLACE}.learning_rate_multiplier"
    assert "multiplies the default learning rate" in error.message


def test_an_invocation_makes_the_adapter_an_activated_one():
    config, _ = resolved(invocation=" It was")
    assert (config.tuning, config.target_modules) == ("alora", ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert resolved(tuning="alora", invocation=" It was")[0] == config
    assert refused(request(tuning="alora", invocation=None)).param == f"{PLACE}.invocation"
    assert refused(request(tuning="alora", invocation="")).param == f"{PLACE}.invocation"
    assert refused(request(tuning="lora", invocation=" It was")).param == f"{PLACE}.invocation"


@pytest.mark.parametrize(
    "sent",
    [{}, {"invocation": "auto"}, {"tuning": "auto"}, {"tuning": "alora"}, {"tuning": "alora", "invocation": "auto"}],
)
def test_an_invocation_that_is_left_open_is_for_the_rows_to_settle(sent):
    config, hyperparameters = resolved(**sent)
    assert (config.tuning, config.invocation) == ("alora", "auto") and reported(stored(config), hyperparameters)[
        "invocation"
    ] == "auto"
    for found in ("<|assistant|>", [1, 2, 3]):
        settled = settle(config, request(**sent), ENGINE, found)
        assert settled == replace(config, invocation=found)


@pytest.mark.parametrize("sent", [{"tuning": "lora"}, {"tuning": "lora", "invocation": "auto"}, {"invocation": None}])
def test_ordinary_lora_can_be_asked_for(sent):
    config, _ = resolved(**sent)
    assert (config.tuning, config.invocation, config.target_modules) == ("lora", None, ["q_proj", "v_proj"])


def test_rows_that_suggest_no_invocation_make_ordinary_lora_unless_the_client_wants_another():
    why = DataError("there are no messages")
    config = settle(resolved()[0], request(), ENGINE, why)
    assert config == resolved(tuning="lora")[0]
    asked = settle(resolved(target_modules=["o_proj"])[0], request(target_modules=["o_proj"]), ENGINE, why)
    assert asked.target_modules == ["o_proj"]
    with pytest.raises(RequestError) as caught:
        settle(resolved(tuning="alora")[0], request(tuning="alora"), ENGINE, why)
    assert (
        caught.value.param == f"{PLACE}.invocation"
        and "such as ' It was', as there are no messages" in caught.value.message
    )


def test_a_prefix_has_defaults_of_its_own_and_nothing_of_adapters():
    config, _ = resolved(tuning="prefix")
    assert (config.num_virtual_tokens, config.prefix_positions, config.invocation) == (5, "shifted", None)
    assert config.r is config.lora_alpha is config.target_modules is None
    assert (config.learning_rate, config.zo_eps) == (0.03, 0.1)
    few_slots = EngineDescription(**{**msgspec.structs.asdict(ENGINE), "max_loras_per_batch": 2})
    assert resolved(tuning="prefix", engine=few_slots)[0] == config, "a prefix needs no slot"
    for name, value in {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj"], "invocation": " It was"}.items():
        error = refused(request(tuning="prefix", **{name: value}))
        assert error.param == f"{PLACE}.{name}" and "nothing beside tuning=prefix" in error.message
    assert "nothing beside tuning=lora" in refused(request(tuning="lora", num_virtual_tokens=5)).message


@pytest.mark.parametrize(("tokens", "allowed"), [(0, "at least 1"), (128, "from 1 to 127"), (1001, "from 1 to 127")])
def test_a_prefix_fits_the_context_and_the_pool(tokens, allowed):
    error = refused(request(tuning="prefix", num_virtual_tokens=tokens))
    assert error.param == f"{PLACE}.num_virtual_tokens" and allowed in error.message


def test_a_job_names_a_reward_that_the_operator_has_registered():
    config, _ = resolved(reward="brevity", max_new_tokens=8)
    assert (config.objective, config.reward, config.max_new_tokens, config.temperature) == ("reward", "brevity", 8, 0)
    error = refused(request(objective="reward"))
    assert error.message.startswith(f"{PLACE}.reward=None is not allowed: one of brevity, politeness")
    without = EngineDescription(**{**msgspec.structs.asdict(ENGINE), "rewards": []})
    error = refused(request(reward="brevity"), without)
    assert error.param == f"{PLACE}.reward" and "as the server was started without --mezo-rewards" in error.message
    [(name, allowed)] = beyond(without, config)  # of a server that was started anew
    assert name == "reward" and "without --mezo-rewards" in allowed


def test_a_server_that_cannot_serve_prefixes_says_so():
    engine = EngineDescription(**{**msgspec.structs.asdict(ENGINE), "no_prefixes": "it has no room"})
    error = refused(request(tuning="prefix"), engine)
    assert error.param == f"{PLACE}.tuning" and "cannot serve prefixes: it has no room" in error.message


def test_a_backend_without_activated_adapters_says_so():
    engine = EngineDescription(
        **{name: getattr(ENGINE, name) for name in ENGINE.__struct_fields__}
        | {"no_alora": "start with --lora-backend triton"}
    )
    assert (
        "cannot serve aLoRA adapters: start with --lora-backend triton"
        in refused(request(invocation=" It was"), engine).message
    )
    assert resolve(request(), engine, 10, seed=7)[0].tuning == "lora"


@pytest.mark.parametrize(("estimator", "needed"), [("two_sided", 5), ("one_sided", 4), ("leave_one_out", 4)])
def test_a_server_needs_room_for_one_direction_and_an_adapter_beside(estimator, needed):
    def engine(max_loras_per_batch: int) -> EngineDescription:
        return EngineDescription(
            **{name: getattr(ENGINE, name) for name in ENGINE.__struct_fields__}
            | {"max_loras_per_batch": max_loras_per_batch}
        )

    assert resolved(estimator=estimator, engine=engine(needed))[0].num_perturbations == MezoConfig.num_perturbations
    error = refused(request(estimator=estimator), engine(needed - 1))
    assert error.param == f"{PLACE}.estimator"
    assert f"--max-loras-per-batch={needed - 1} has room for: this one needs {needed}" in error.message


SERVERS = {
    "ordinary": {},
    "of a small rank": {"max_lora_rank": 4},
    "of rank 1": {"max_lora_rank": 1},
    "with few slots": {"max_loras_per_batch": 4},
    "with a small pool": {"kv_capacity": 100},
    "for other modules": {"target_modules": ["fc1"], "default_target_modules": {"alora": ["fc1"], "lora": ["fc1"]}},
    "without aLoRA": {"no_alora": "no segments"},
}


def server(kind):
    return EngineDescription(**{name: getattr(ENGINE, name) for name in ENGINE.__struct_fields__} | SERVERS[kind])


def in_range(engine):
    """Of every hyperparameter, the ends of what is allowed, and something between."""
    numbers = {name: (1, 2, 3, 64) for name in ("num_perturbations", "perturbation_rank")}
    counts = {
        name: (1, 2, 10**9)
        for name in ("n_epochs", "max_steps", "perturbation_interval", "echoes", "eval_steps", "logging_steps")
    }
    from_zero = {name: (0, 1, 10**9) for name in ("save_steps", "warmup_steps")}
    positive = {
        name: (1e-12, 0.5, 1, 10**6)
        for name in (
            "learning_rate",
            "zo_eps",
            "lora_alpha",
            "adam_epsilon",
            "clip_projected_grad",
            "learning_rate_multiplier",
        )
    }
    below_one = {name: (0, 0.5, 0.999999) for name in ("momentum", "adam_beta1", "adam_beta2")}
    booleans = {name: (True, False) for name in ("scale_by_loss_std", "load_best_model_at_end")}
    two_sided = ("two_sided",) if engine.max_loras_per_batch > 4 else ()
    return {
        **numbers,
        **counts,
        **from_zero,
        **positive,
        **below_one,
        **booleans,
        "weight_decay": (0, 0.1, 10**6),
        "batch_size": (1, 7, 4096),
        "gradient_accumulation_steps": (1, 2, 256),
        "r": {1, engine.max_lora_rank},
        "max_tokens_per_batch": (1, 100, min(8192, engine.kv_capacity)),
        "lr_scheduler_type": ("constant", "linear", "cosine"),
        "optim": ("sgd", "adamw"),
        "estimator": ("one_sided", "leave_one_out", *two_sided),
        "perturbation": ("gaussian", "rademacher"),
        "tuning": ("lora", "prefix"),
        "num_virtual_tokens": (1, 5, min(engine.kv_capacity // 4, engine.context_length - 1)),
        "invocation": (None, *([" It was"] if not engine.no_alora else ())),
        "target_modules": engine.target_modules and [engine.target_modules],
        "objective": (None, "classification", "completion", "accuracy", "f1", "exact_match"),
        "reward": (None, "brevity"),
        "max_new_tokens": (1, 64),
        "temperature": (0, 1, 10**6),
        "stop": (None, "\n"),
        "metric_for_best_model": (None, "eval_loss", "eval_accuracy"),
    }


def beside(name):
    """What a hyperparameter has a meaning with only."""
    return {"objective": "f1"} if name in ("max_new_tokens", "temperature", "stop") else {}


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("num_train", [1, 1000])
def test_whatever_is_sent_alone_can_be_trained(kind, num_train):
    """What a client leaves open never contradicts it."""
    ranges = in_range(server(kind))
    assert ranges.keys() == KINDS.keys()
    resolved(num_train, server(kind))
    for name, values in ranges.items():
        for value in values:
            config, hyperparameters = resolved(num_train, server(kind), **{name: value}, **beside(name))
            assert reported(stored(config), hyperparameters)[name] == value or name in (
                "invocation",
                "perturbation_rank",
            )
            assert MezoConfig(**stored(config)) == config


def test_what_is_left_open_follows_what_is_sent():
    def of(kind="ordinary", **hyperparameters):
        config, _ = resolved(engine=server(kind), **hyperparameters)
        return config.estimator, config.scale_by_loss_std, config.learning_rate

    assert of() == of(num_perturbations=3) == ("leave_one_out", True, 0.02)
    assert of(num_perturbations=2) == ("two_sided", True, 0.02)
    assert of(num_perturbations=2, estimator="leave_one_out") == ("leave_one_out", False, 0.001)
    assert of(num_perturbations=1) == ("two_sided", False, 0.001)
    assert of(num_perturbations=1, learning_rate_multiplier=3) == ("two_sided", False, 0.003)
    assert of("with few slots", num_perturbations=1) == ("one_sided", False, 0.001)
    assert resolved(engine=server("of a small rank"))[0].r == 4
    assert resolved(perturbation_interval=50)[0].perturbation_rank == 2
    assert resolved(engine=server("for other modules"))[0].target_modules == ["fc1"]


@pytest.mark.parametrize("multiplier", [5e-324, 1e-323])
def test_a_multiplier_that_leaves_no_learning_rate_is_named(multiplier):
    assert refused(request(learning_rate_multiplier=multiplier)).param == f"{PLACE}.learning_rate_multiplier"


def test_a_long_value_is_cut_in_the_message():
    assert len(refused(request(r="x" * 100_000)).message) < 400
