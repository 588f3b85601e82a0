"""A bad setting is named with its value and what is allowed; derived numbers are what their names say."""

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.core.errors import ConfigError, DataError, MezoError
from sglang.srt.mezo.core.settings import setting_of


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        *(
            (name, value, "at least 1")
            for value in (0, -3)
            for name in (
                "r",
                "num_perturbations",
                "perturbation_interval",
                "echoes",
                "per_device_train_batch_size",
                "gradient_accumulation_steps",
                "per_device_eval_batch_size",
                "max_tokens_per_batch",
                "eval_steps",
                "logging_steps",
            )
        ),
        *(
            (name, value, "a positive number")
            for value in (0.0, -1.0, float("nan"))
            for name in (
                "lora_alpha",
                "learning_rate",
                "zo_eps",
                "num_train_epochs",
                "clip_projected_grad",
                "adam_epsilon",
            )
        ),
        *((name, -1, "zero or more") for name in ("weight_decay", "warmup_steps", "save_steps")),
        ("max_steps", 10**9 + 1, "at most 1000000000"),
        ("num_train_epochs", 1e308, "at most 1000000000"),
        *(
            (name, 1e308, "at most 1000000")
            for name in ("learning_rate", "weight_decay", "clip_projected_grad", "zo_eps", "lora_alpha", "adam_epsilon")
        ),
        ("zo_eps", 1e-320, "at least 1e-12"),
        ("tuning", "prompt", "one of alora, lora, full, prefix"),
        ("objective", "bleu", "one of classification, completion, accuracy, f1, exact_match, reward, null"),
        ("lr_scheduler_type", "polynomial", "one of constant, linear, cosine"),
        ("perturbation", "uniform", "one of gaussian, rademacher"),
        ("perturbation_rank", 0, "at least 1, or none for full rank"),
        ("estimator", "forward", "one of two_sided, one_sided, leave_one_out"),
        ("optim", "adam", "one of sgd, adamw"),
        *(
            (name, value, "at least 0 and below 1")
            for value in (-0.1, 1.0)
            for name in ("momentum", "adam_beta1", "adam_beta2")
        ),
        ("report_to", 3, "a list of strings, a string"),
        ("target_modules", [], "at least one module"),
        ("target_modules", "q_proj", "a list of strings, null"),
        ("r", "8", "a whole number"),
        ("r", 8.0, "a whole number"),
        ("r", True, "a whole number"),
        ("learning_rate", "1e-3", "a number"),
        ("scale_by_loss_std", 1, "true or false"),
        ("output_dir", None, "a string"),
        ("seed", -1, "an unsigned 64-bit number"),
        ("seed", 2**64, "an unsigned 64-bit number"),
    ],
)
def test_a_bad_value_is_an_error_with_field_value_and_range(field, value, allowed):
    with pytest.raises(ConfigError) as caught:
        MezoConfig(**{field: value})
    assert str(caught.value) == f"{field}={value!r} is not allowed: {allowed}"
    assert caught.value.field == field
    assert isinstance(caught.value, MezoError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    "error", [ConfigError("r", 0, "at least 1"), DataError("no tokens", "rows.jsonl", 3), DataError("no tokens")]
)
def test_an_error_says_the_same_after_travelling_between_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


def test_a_run_cannot_be_resumed_and_deleted_at_once():
    with pytest.raises(ConfigError, match="resume_from_checkpoint=True"):
        MezoConfig(resume_from_checkpoint=True, overwrite_output_dir=True)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"optim": "adamw", "momentum": 0.9}, "momentum"),
        ({"num_perturbations": 1, "scale_by_loss_std": True}, "scale_by_loss_std"),
        ({"num_perturbations": 1, "estimator": "one_sided", "scale_by_loss_std": True}, "scale_by_loss_std"),
        ({"num_perturbations": 2, "estimator": "leave_one_out", "scale_by_loss_std": True}, "scale_by_loss_std"),
        ({"num_perturbations": 1, "estimator": "leave_one_out"}, "estimator"),
        ({"num_perturbations": 1, "estimator": "leave_one_out", "scale_by_loss_std": False}, "estimator"),
        *(({"tuning": tuning, "r": 8}, "r") for tuning in ("full", "prefix")),
        *(({"tuning": tuning, "target_modules": ["q_proj"]}, "target_modules") for tuning in ("full", "prefix")),
        *(({"tuning": tuning, "invocation": " It was"}, "invocation") for tuning in ("full", "prefix")),
        ({"tuning": "full", "init_from": "adapter"}, "init_from"),
        *(({"tuning": tuning, "parameters": "bias"}, "parameters") for tuning in ("alora", "lora", "prefix")),
        *(({"tuning": tuning, "num_virtual_tokens": 5}, "num_virtual_tokens") for tuning in ("lora", "full")),
        *(({"tuning": tuning, "prefix_positions": "shifted"}, "prefix_positions") for tuning in ("lora", "full")),
        ({"tuning": "full", "parameters": "("}, "parameters"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, field):
    with pytest.raises(ConfigError) as caught:
        MezoConfig(**settings)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("settings", "estimator", "scale_by_loss_std", "learning_rate"),
    [
        ({}, "leave_one_out", True, 0.02),
        ({"num_perturbations": 3}, "leave_one_out", True, 0.02),
        ({"num_perturbations": 2}, "two_sided", True, 0.02),
        ({"num_perturbations": 2, "estimator": "leave_one_out"}, "leave_one_out", False, 0.001),
        ({"num_perturbations": 1}, "two_sided", False, 0.001),
        ({"num_perturbations": 1, "estimator": "one_sided"}, "one_sided", False, 0.001),
        ({"num_perturbations": 1, "learning_rate": 0.5}, "two_sided", False, 0.5),
        ({"scale_by_loss_std": False}, "leave_one_out", False, 0.02),
    ],
)
def test_defaults_follow_what_is_given(settings, estimator, scale_by_loss_std, learning_rate):
    config = MezoConfig(**settings)
    assert (config.estimator, config.scale_by_loss_std, config.learning_rate) == (
        estimator,
        scale_by_loss_std,
        learning_rate,
    )
    assert MezoConfig(**config.to_dict()) == config  # what config.json says makes the same run


def test_directions_that_share_factors_have_a_rank():
    assert MezoConfig(perturbation_interval=5).perturbation_rank == 2
    assert MezoConfig(perturbation_interval=5, perturbation_rank=1).perturbation_rank == 1
    assert MezoConfig().perturbation_rank is None


@pytest.mark.parametrize(
    ("estimator", "slots", "passes"), [("two_sided", 9, 8), ("one_sided", 5, 5), ("leave_one_out", 5, 4)]
)
def test_slots_and_forward_passes_follow_from_the_estimator(estimator, slots, passes):
    config = MezoConfig(num_perturbations=4, estimator=estimator)
    assert (config.num_slots, config.forward_passes) == (slots, passes)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="learning_rat"):
        MezoConfig(learning_rat=1.0)


def test_settings_cannot_change_after_validation():
    with pytest.raises(FrozenInstanceError):
        MezoConfig().r = 0


def test_every_setting_explains_itself_in_one_sentence():
    assert [field.name for field in fields(MezoConfig)] == list(MezoConfig().to_dict())
    for field in fields(MezoConfig):
        assert setting_of(field).help.endswith("."), field.name


@pytest.mark.parametrize(
    ("settings", "num_examples", "steps"),
    [
        ({"max_steps": 7}, 1000, 7),
        ({"num_train_epochs": 3, "per_device_train_batch_size": 16}, 160, 30),
        ({"num_train_epochs": 0.5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 160, 5),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 64}, 3, 1),
    ],
)
def test_steps_come_from_max_steps_or_from_epochs(settings, num_examples, steps):
    assert MezoConfig(**settings).steps_for(num_examples) == steps


@pytest.mark.parametrize(("warmup_steps", "expected"), [(0, 0), (0.1, 20), (1, 1), (30, 30)])
def test_warmup_below_one_is_a_share(warmup_steps, expected):
    assert MezoConfig(warmup_steps=warmup_steps).warmup_steps_of(200) == expected


@pytest.mark.parametrize(
    ("tuning", "zo_eps", "rates"),
    [
        ("alora", 1e-2, (0.02, 1e-3)),
        ("lora", 1e-2, (0.02, 1e-3)),
        ("prefix", 0.1, (0.03, 0.01)),
        ("full", 1e-3, (1e-3, 1e-6)),
    ],
)
def test_each_way_of_tuning_has_its_own_defaults(tuning, zo_eps, rates):
    for settings, rate in zip(({}, {"num_perturbations": 1}), rates):
        config = MezoConfig(tuning=tuning, **settings)
        assert (config.zo_eps, config.learning_rate) == (zo_eps, rate)
    adapted = tuning in ("alora", "lora")
    assert (config.r, config.lora_alpha) == ((8, 16) if adapted else (None, None))
    assert config.num_virtual_tokens == (5 if tuning == "prefix" else None)
    assert MezoConfig(**config.to_dict()) == config
