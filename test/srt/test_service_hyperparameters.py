"""What a client leaves open is settled from one place; what it gets wrong is named with its path, value and range."""

import json

import pytest

from hyperparameters import ENGINE, KINDS, PLACE, refused, request, resolved
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import shown
from sglang.srt.mezo.service.jobs.hyperparameters import reported, resolve, stored


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
        ("metric_for_best_model", "accuracy", "metric_for_best_model"),
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
    config, hyperparameters = resolved(tuning="prefix", num_virtual_tokens=7)
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
        (
            "metric_for_best_model",
            "bleu",
            "one of eval_loss, eval_accuracy, eval_f1, eval_exact_match, eval_reward, null",
        ),
        ("lr_scheduler_type", "polynomial", 'one of constant, linear, cosine, or "auto"'),
        ("objective", "bleu", 'one of classification, completion, accuracy, f1, exact_match, reward, null, or "auto"'),
        ("reward", "os:system", "one of brevity, politeness, the server's --mezo-rewards"),
        ("max_new_tokens", 5, "nothing beside objective=None, for which the model writes nothing"),
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
