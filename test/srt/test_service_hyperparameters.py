"""What a client leaves open is settled from one place; what it gets wrong is named with its path, value and range."""

import json
from dataclasses import replace

import pytest

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import DataError, shown
from sglang.srt.mezo.service.jobs.hyperparameters import kinds, reported, resolve, settle, stored
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


@pytest.mark.parametrize(
    "body", [{}, {"method": None}, {"method": {"type": "supervised"}}, {"hyperparameters": None}, request()]
)
def test_nothing_given_is_the_default_of_a_server(body):
    config, hyperparameters = resolve(body, ENGINE, 1000, seed=7)
    assert hyperparameters == {"n_epochs": 4, "batch_size": 16, "learning_rate_multiplier": 1}
    expected = MezoConfig(
        invocation="auto",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        max_tokens_per_batch=256,
        max_steps=250,
        num_train_epochs=4,
        seed=7,
        save_steps=50,
    )
    assert config == expected
    assert not {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"} & stored(config).keys()


def test_auto_is_the_default_of_every_hyperparameter():
    assert resolved(**dict.fromkeys(KINDS, "auto")) == resolved()


@pytest.mark.parametrize(
    ("name", "value", "field"),
    [
        ("learning_rate", 1, "learning_rate"),
        ("learning_rate", 3e-4, "learning_rate"),
        ("lr_scheduler_type", "cosine", "lr_scheduler_type"),
        ("warmup_steps", 0.1, "warmup_steps"),
        ("warmup_steps", 10, "warmup_steps"),
        ("weight_decay", 0.01, "weight_decay"),
        ("clip_projected_grad", 5, "clip_projected_grad"),
        ("clip_projected_grad", None, "clip_projected_grad"),
        ("zo_eps", 1e-3, "zo_eps"),
        ("num_perturbations", 4, "num_perturbations"),
        ("perturbation", "rademacher", "perturbation"),
        ("perturbation_rank", 2, "perturbation_rank"),
        ("perturbation_rank", None, "perturbation_rank"),
        ("perturbation_interval", 1, "perturbation_interval"),
        ("estimator", "one_sided", "estimator"),
        ("scale_by_loss_std", False, "scale_by_loss_std"),
        ("optim", "adamw", "optim"),
        ("momentum", 0.9, "momentum"),
        ("echoes", 4, "echoes"),
        ("adam_beta1", 0.8, "adam_beta1"),
        ("adam_beta2", 0.99, "adam_beta2"),
        ("adam_epsilon", 1e-6, "adam_epsilon"),
        ("tuning", "lora", "tuning"),
        ("invocation", " It was", "invocation"),
        ("invocation", None, "invocation"),
        ("invocation", [5, 6], "invocation"),
        ("r", 16, "r"),
        ("lora_alpha", 32, "lora_alpha"),
        ("target_modules", ["o_proj"], "target_modules"),
        ("max_steps", 3, "max_steps"),
        ("objective", "completion", "objective"),
        ("objective", None, "objective"),
        ("eval_steps", 5, "eval_steps"),
        ("logging_steps", 1, "logging_steps"),
        ("save_steps", 0, "save_steps"),
        ("gradient_accumulation_steps", 4, "gradient_accumulation_steps"),
        ("load_best_model_at_end", False, "load_best_model_at_end"),
        ("metric_for_best_model", "eval_accuracy", "metric_for_best_model"),
        ("metric_for_best_model", None, "metric_for_best_model"),
        ("max_tokens_per_batch", 4000, "max_tokens_per_batch"),
        ("batch_size", 4, "per_device_train_batch_size"),
        ("n_epochs", 2, "num_train_epochs"),
    ],
)
def test_a_value_reaches_its_setting_and_is_reported(name, value, field):
    config, hyperparameters = resolved(**{name: value})
    assert getattr(config, field) == value
    assert reported(stored(config), hyperparameters)[name] == value
    assert MezoConfig(**stored(config)) == config


def test_every_hyperparameter_is_reported_under_its_own_name():
    config, hyperparameters = resolved()
    report = reported(stored(config), hyperparameters)
    assert report.keys() == KINDS.keys()
    assert json.loads(json.dumps(report)) == report


def test_what_is_reported_makes_the_same_job_again():
    config, hyperparameters = resolved(r=4, n_epochs=3, zo_eps=1e-3, invocation=" It was", num_perturbations=4)
    assert resolved(**reported(stored(config), hyperparameters)) == (config, hyperparameters)


WRONG_TYPES = {
    int: ["3", 1.5, True, None, [1], {}],
    float: ["3", True, None, [1], {}],
    bool: [0, "true", None],
    str: [0, True, ["a"]],
    list[str]: ["q_proj", [1], {}, [None]],
}


def wrong_values():
    for name, kind in KINDS.items():
        base = next(
            (base for base in reversed(WRONG_TYPES) if base == kind or base in getattr(kind, "__args__", ())), str
        )
        nullable = type(None) in getattr(kind, "__args__", ())
        yield from ((name, value) for value in WRONG_TYPES[base] if not (nullable and value is None))


@pytest.mark.parametrize(("name", "value"), list(wrong_values()))
def test_a_wrong_type_is_named_with_its_path_and_what_is_allowed(name, value):
    error = refused(request(**{name: value}))
    assert error.param == f"{PLACE}.{name}"
    assert error.code == "invalid_value"
    assert error.message.startswith(f"{PLACE}.{name}={value!r} is not allowed: ")
    assert error.message.endswith('or "auto"')


@pytest.mark.parametrize("name", KINDS)
def test_null_is_a_setting_of_its_own_or_refused(name):
    """What is settled has a value for all that a run cannot go without."""
    if type(None) not in getattr(KINDS[name], "__args__", ()):
        assert refused(request(**{name: None})).param == f"{PLACE}.{name}"
        return
    config, hyperparameters = resolved(**{name: None})
    assert reported(stored(config), hyperparameters)[name] is None and getattr(MezoConfig(), name) is None
    assert config.target_modules and MezoConfig(**stored(config))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        *(
            (name, value, "a positive number")
            for value in (0, -1.0)
            for name in ("learning_rate", "zo_eps", "lora_alpha", "clip_projected_grad", "learning_rate_multiplier")
        ),
        *((name, 0, "at least 1") for name in ("r", "num_perturbations", "eval_steps", "logging_steps")),
        *(
            (name, value, "from 1 to 1000000000")
            for name in ("n_epochs", "max_steps")
            for value in (0, 10**9 + 1, 2**63)
        ),
        *(
            (name, 10**9 + 1, "at most 1000000000")
            for name in ("eval_steps", "logging_steps", "save_steps", "warmup_steps")
        ),
        *(
            (name, 1e300, "at most 1000000")
            for name in (
                "learning_rate",
                "learning_rate_multiplier",
                "weight_decay",
                "clip_projected_grad",
                "zo_eps",
                "lora_alpha",
            )
        ),
        ("zo_eps", 1e-320, "at least 1e-12"),
        ("invocation", "i" * 1001, "at most 1000 characters or tokens"),
        *((name, -1, "zero or more") for name in ("weight_decay", "warmup_steps", "save_steps")),
        ("batch_size", 0, "from 1 to 4096"),
        ("batch_size", 4097, "from 1 to 4096"),
        *(
            ("gradient_accumulation_steps", value, "from 1 to 256, as a step takes 4096 examples at most")
            for value in (0, 257)
        ),
        ("r", 17, "from 1 to 16, the server's --max-lora-rank"),
        ("num_perturbations", 65, "at most 64"),
        ("max_tokens_per_batch", 0, "from 1 to 8192"),
        ("max_tokens_per_batch", 8193, "from 1 to 8192"),
        ("max_tokens_per_batch", 4001, "from 1 to 4000, the size of the KV pool"),
        ("target_modules", [], "at least one module"),
        ("target_modules", ["fc1"], "some of q_proj, k_proj, v_proj, o_proj, which this server adapts"),
        ("target_modules", ["v_proj", "v_proj"], "each module once"),
        ("metric_for_best_model", "f1", "one of eval_loss, eval_accuracy, null"),
        ("lr_scheduler_type", "polynomial", 'one of constant, linear, cosine, or "auto"'),
        ("objective", "f1", 'one of classification, completion, language_modeling, null, or "auto"'),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(name, value, allowed):
    error = refused(request(**{name: value}))
    assert error.message == f"{PLACE}.{name}={shown(value)} is not allowed: {allowed}"
    assert (error.param, error.code) == (f"{PLACE}.{name}", "invalid_value")


@pytest.mark.parametrize(
    "name",
    [
        "output_dir",
        "report_to",
        "seed",
        "resume_from_checkpoint",
        "prefix_reuse",
        "zo_epsilon",
        "per_device_train_batch_size",
    ],
)
def test_what_a_job_may_not_set_is_refused_with_what_it_may(name):
    error = refused(request(**{name: "/etc"}))
    assert error.message.startswith(f"{PLACE}.{name} is not a hyperparameter; there are n_epochs, batch_size, ")
    assert (error.param, error.code) == (f"{PLACE}.{name}", "unknown_parameter")


def test_the_older_place_does_as_well_and_errors_name_it():
    assert resolve({"hyperparameters": {"n_epochs": 2}}, ENGINE, 1000, seed=7) == resolved(n_epochs=2)
    assert refused({"hyperparameters": {"zo_eps": "x"}}).param == "hyperparameters.zo_eps"
    assert refused({"hyperparameters": {"r": 99}}).param == "hyperparameters.r"
    both = refused({"hyperparameters": {"r": 4}, **request(r=4)})
    assert both.message == f"hyperparameters.r=4 is not allowed: it is given as {PLACE}.r as well; one place is enough"
    assert resolve({"hyperparameters": {"r": 4}, **request(n_epochs=2)}, ENGINE, 1000, seed=7) == resolved(
        r=4, n_epochs=2
    )


@pytest.mark.parametrize(
    ("hyperparameters", "num_train", "n_epochs", "batch_size", "max_steps"),
    [
        ({}, 1000, 4, 16, 250),
        ({}, 5, 250, 5, 250),
        ({}, 1_000_000, 1, 16, 250),
        ({"batch_size": 8}, 1000, 2, 8, 250),
        ({"gradient_accumulation_steps": 2}, 1000, 8, 16, 250),
        ({"max_steps": 10}, 1000, 1, 16, 10),
        ({"max_steps": 10, "n_epochs": 7}, 20, 8, 16, 10),
        ({"n_epochs": 3}, 1000, 3, 16, -1),
    ],
)
def test_steps_and_epochs_agree(hyperparameters, num_train, n_epochs, batch_size, max_steps):
    config, resolved_three = resolved(num_train, **hyperparameters)
    assert resolved_three == {"n_epochs": n_epochs, "batch_size": batch_size, "learning_rate_multiplier": 1}
    assert (config.max_steps, config.num_train_epochs) == (max_steps, n_epochs)


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
        "tuning": ("lora",),
        "invocation": (None, *([" It was"] if not engine.no_alora else ())),
        "target_modules": engine.target_modules and [engine.target_modules],
        "objective": (None, "classification", "completion", "language_modeling"),
        "metric_for_best_model": (None, "eval_loss", "eval_accuracy"),
    }


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("num_train", [1, 1000])
def test_whatever_is_sent_alone_can_be_trained(kind, num_train):
    """What a client leaves open never contradicts it."""
    ranges = in_range(server(kind))
    assert ranges.keys() == KINDS.keys()
    resolved(num_train, server(kind))
    for name, values in ranges.items():
        for value in values:
            config, hyperparameters = resolved(num_train, server(kind), **{name: value})
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
