"""From the hyperparameters that a client sends to the settings of a run.

OpenAI's three come beside the settings of ``MezoConfig`` that a job may choose; "auto" stands for the default of each.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, get_type_hints

from sglang.srt.mezo.core.config import MOST_STEPS, NEW_ADAPTER, MezoConfig, ServedTuning, defaults
from sglang.srt.mezo.core.errors import ConfigError, DataError, shown
from sglang.srt.mezo.core.estimator import SIGNS, Estimator
from sglang.srt.mezo.core.kinds import described, fits
from sglang.srt.mezo.core.objective import LOSS_METRIC, SCORE_METRICS, metric_name
from sglang.srt.mezo.core.settings import LARGEST, Bounds, names, setting_of
from sglang.srt.mezo.data.invocation import AUTO
from sglang.srt.mezo.engine.prefix_needs import POOL_SHARE
from sglang.srt.mezo.service.jobs.origins import Origin
from sglang.srt.mezo.service.wire.errors import RequestError
from sglang.srt.mezo.service.wire.messages import SPARE_SLOTS, EngineDescription
from sglang.srt.mezo.service.wire.settings import allowed_rewards
from sglang.srt.mezo.training.start import contradiction

MOST_EXAMPLES = 4096
"""Of a step, which works on its list of examples in one piece."""

_OPENAI: dict[str, tuple[Any, Bounds]] = {
    "n_epochs": (int, Bounds(at_least=1, at_most=MOST_STEPS)),
    "batch_size": (int, Bounds(at_least=1, at_most=MOST_EXAMPLES)),
    "learning_rate_multiplier": (float, Bounds(above=0, at_most=LARGEST)),
}
"""OpenAI's hyperparameters, with their types and bounds."""


def kinds(config: type[MezoConfig] = MezoConfig) -> dict[str, tuple[Any, Bounds]]:
    """Every hyperparameter, with its type and the bounds of a server beside those of ``config``.

    Where a type takes null, that is a value like others, such as no bound. What a server decides takes none.
    """
    types = get_type_hints(config)
    own = {one.name: (types[one.name], bounds) for one in fields(config) if (bounds := setting_of(one).job) is not None}
    of_server = {"tuning": (ServedTuning, Bounds()), "target_modules": (list[str], Bounds())}
    return {**_OPENAI, **own, **of_server}


_KINDS = kinds()
_SETTINGS = names(MezoConfig, job=True)
_PLACES = ("hyperparameters", "method.supervised.hyperparameters")
_WIRE_NAMES = {"per_device_train_batch_size": "batch_size", "num_train_epochs": "n_epochs"}
_UNSTORED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")  # where a run lies, and whether it goes on
_AUTO_STEPS = 250

_MOST_CHARACTERS = 1000  # of an invocation
_METRICS = (LOSS_METRIC, *SCORE_METRICS)


class _Given(NamedTuple):
    """A hyperparameter as it was sent, and where."""

    path: str
    value: Any


def resolve(
    request: Mapping[str, Any], engine: EngineDescription, num_train: int, seed: int, origin: Origin | None = None
) -> tuple[MezoConfig, dict[str, Any]]:
    """Settle everything that a job leaves open.

    Args:
        request: body of the job's creation.
        engine: what the server can train.
        num_train: training examples, 1 or more.
        seed: the job's.
        origin: the adapter of ``request["model"]`` where that is a fine-tuned one.

    Raises:
        RequestError: 400; ``param`` is the path of the hyperparameter in the body.

    Returns:
        The job's settings, and OpenAI's three hyperparameters. What a client gives as n_epochs stays so, as a long
        text becomes several examples.
    """
    given = _given(request)
    _check_together(given)
    _check_reward(engine, given)
    values = {name: sent.value for name, sent in given.items()}
    batch_size = values.pop("batch_size", min(16, num_train))
    most_batches = MOST_EXAMPLES // batch_size
    if not 1 <= values.get("gradient_accumulation_steps", 1) <= most_batches:
        raise _refusal(
            given["gradient_accumulation_steps"],
            f"from 1 to {most_batches}, as a step takes {MOST_EXAMPLES} examples at most",
        )
    multiplier = values.pop("learning_rate_multiplier", 1)
    n_epochs = values.pop("n_epochs", None)

    tuning = {} if origin is None else {"tuning": origin.settings["tuning"]}
    fields = _online_defaults(tuning | values, engine) | values
    if origin is not None:
        _check_origin(origin, given)
        fields |= origin.settings
    fields["per_device_train_batch_size"] = batch_size
    fields["seed"] = seed
    if n_epochs is None:
        fields.setdefault("max_steps", _AUTO_STEPS)
    else:
        fields["num_train_epochs"] = n_epochs
    config = _validated(fields, given)
    config = _multiplied(config, multiplier, given)
    _check_against(engine, config, given)

    if n_epochs is None or "max_steps" in fields:
        n_epochs = max(1, math.ceil(config.max_steps * config.train_batch_size / num_train))
    config = replace(config, num_train_epochs=min(n_epochs, MOST_STEPS))
    return config, {"n_epochs": n_epochs, "batch_size": batch_size, "learning_rate_multiplier": multiplier}


def stored(config: MezoConfig) -> dict[str, Any]:
    """What is kept of a job's settings: not where its run lies, nor whether it goes on."""
    return {name: value for name, value in config.to_dict().items() if name not in _UNSTORED}


def settle(
    config: MezoConfig, request: Mapping[str, Any], engine: EngineDescription, found: str | list[int] | DataError
) -> MezoConfig:
    """Settle how an adapter acts whose invocation is open.

    Args:
        config: from ``resolve``.
        request: body of the job's creation.
        found: the invocation that the job's rows suggest, or why they suggest none; then the adapter acts on every
            token.

    Raises:
        RequestError: they suggest none, and the client wants activated LoRA.
    """
    if not isinstance(found, DataError):
        return replace(config, invocation=found)
    given = _given(request)
    if "tuning" in given:
        raise _refused(
            "invocation", AUTO, f"the text from which activated LoRA acts, such as ' It was', as {found.reason}", given
        )
    targets = given["target_modules"].value if "target_modules" in given else engine.default_target_modules["lora"]
    return replace(config, tuning="lora", invocation=None, target_modules=targets)


def reported(config: Mapping[str, Any], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """What was ``stored``, under the names that a client uses; "auto" is what the job's tuning does not have, and
    max_steps where n_epochs decides."""
    settings = {name: _or_auto(name, config.get(name)) for name in _SETTINGS}
    has_steps = isinstance(settings["max_steps"], int) and settings["max_steps"] >= 1
    return {**hyperparameters, **settings, "max_steps": settings["max_steps"] if has_steps else "auto"}


def _or_auto(name: str, value: Any) -> Any:
    return "auto" if value is None and not fits(None, _KINDS[name][0]) else value


def _given(request: Mapping[str, Any]) -> dict[str, _Given]:
    """Everything that is not "auto", by name, with the right type."""
    method = (request.get("method") or {}).get("supervised") or {}
    given: dict[str, _Given] = {}
    for place, sent in zip(_PLACES, (request.get("hyperparameters"), method.get("hyperparameters"))):
        for name, value in (sent or {}).items():
            path = f"{place}.{name[:100]}"
            if name not in _KINDS:
                raise RequestError(
                    400, f"{path} is not a hyperparameter; there are {', '.join(_KINDS)}", path, "unknown_parameter"
                )
            if name in given:
                raise _refusal(given[name], f"it is given as {path} as well; one place is enough")
            if value != "auto":
                given[name] = _Given(path, value)
                _require_type(given[name], _KINDS[name][0])
    return given


def _require_type(sent: _Given, kind: Any) -> None:
    if not fits(sent.value, kind):
        raise _refusal(sent, f'{described(kind)}, or "auto"')


def _check_together(given: Mapping[str, _Given]) -> None:
    """What ``MezoConfig`` does not know of."""
    for name, sent in given.items():
        _, bounds = _KINDS[name]
        if isinstance(sent.value, int | float) and (allowed := bounds.problem(sent.value)) is not None:
            raise _refusal(sent, allowed if bounds.at_least is None else str(bounds))
    if "invocation" in given and len(given["invocation"].value or "") > _MOST_CHARACTERS:
        raise _refusal(given["invocation"], f"at most {_MOST_CHARACTERS} characters or tokens")
    multiplier = given.get("learning_rate_multiplier")
    if multiplier is not None and multiplier.value != 1 and "learning_rate" in given:
        raise _refusal(multiplier, "1 beside learning_rate, as it multiplies the default learning rate")
    metric = given.get("metric_for_best_model")
    if metric is not None and metric_name(metric.value) not in _METRICS:
        raise _refusal(metric, f"one of {', '.join(_METRICS)}, null")


def _check_reward(engine: EngineDescription, given: Mapping[str, _Given]) -> None:
    objective, reward = (given[name].value if name in given else None for name in ("objective", "reward"))
    if (reward is not None or objective == "reward") and reward not in engine.rewards:
        raise _refused("reward", reward, allowed_rewards(engine.rewards), given)


def _check_origin(origin: Origin, given: Mapping[str, _Given]) -> None:
    if (
        wrong := contradiction({name: sent.value for name, sent in given.items()}, origin.adapter, origin.tokenizer)
    ) is not None:
        name, value = wrong
        raise _refusal(given[name], f"{value!r}, as the adapter has it that the job goes on from")


def _online_defaults(values: Mapping[str, Any], engine: EngineDescription) -> dict[str, Any]:
    """Where a server has a better answer than ``MezoConfig``. What a job leaves open of its invocation its rows
    decide (``settle``)."""
    is_open = "invocation" not in values
    act_on_all = bool(engine.no_alora) if is_open else values["invocation"] is None
    suggested = "prefix" if "num_virtual_tokens" in values else "lora" if act_on_all else "alora"
    tuning = values.get("tuning", suggested)
    of_layers = {
        "invocation": AUTO if is_open and tuning == "alora" else None,
        "target_modules": engine.default_target_modules.get(tuning),
        "r": min(NEW_ADAPTER["r"], engine.max_lora_rank),
    }
    return {
        "tuning": tuning,
        **({"prefix_positions": "shifted"} if tuning == "prefix" else of_layers),
        "estimator": _default_estimator(tuning, values.get("num_perturbations", MezoConfig.num_perturbations), engine),
        "max_tokens_per_batch": min(engine.idle_step_tokens, engine.kv_capacity),
        "save_steps": values.get("eval_steps", MezoConfig.eval_steps),
    }


def _default_estimator(tuning: ServedTuning, num_perturbations: int, engine: EngineDescription) -> Estimator:
    estimator = defaults(tuning, num_perturbations, None, 1)["estimator"]
    return estimator if tuning == "prefix" or _slots(estimator) <= engine.max_loras_per_batch else "one_sided"


def _slots(estimator: Estimator) -> int:
    """Of the LoRA pool, that a job needs: theta and one direction, beside the base model and what is served."""
    return 1 + len(SIGNS[estimator]) + 1 + SPARE_SLOTS


def _validated(fields: dict[str, Any], given: Mapping[str, _Given]) -> MezoConfig:
    try:
        return MezoConfig(**fields)
    except ConfigError as error:
        raise _refused(_WIRE_NAMES.get(error.field, error.field), error.value, error.allowed, given) from error


def _multiplied(config: MezoConfig, multiplier: float, given: Mapping[str, _Given]) -> MezoConfig:
    try:
        return replace(config, learning_rate=multiplier * config.learning_rate)
    except ConfigError as error:
        raise _refusal(
            given["learning_rate_multiplier"], f"one that leaves the learning rate {error.allowed}"
        ) from error


def _check_against(engine: EngineDescription, config: MezoConfig, given: Mapping[str, _Given]) -> None:
    def require(name: str, condition: bool, allowed: str) -> None:
        if not condition:
            raise _refused(name, getattr(config, name), allowed, given)

    if config.tuning == "alora":
        require("invocation", bool(config.invocation), "the text from which activated LoRA acts, such as ' It was'")
    else:
        require("invocation", config.invocation is None, f"null, as what {config.tuning} trains acts on every token")
    targets = config.target_modules or []
    require("target_modules", len(set(targets)) == len(targets), "each module once")
    for name, allowed in beyond(engine, config):
        require(name, False, allowed)


def beyond(engine: EngineDescription, config: MezoConfig, to_serve: bool = False) -> Iterator[tuple[str, str]]:
    """What the engine was not started for: each field of ``config`` that asks for it, and what is allowed.

    to_serve: its finished adapter, which asks for less than its training.
    """
    if config.tuning == "alora" and engine.no_alora:
        yield "tuning", f"lora, as this server cannot serve aLoRA adapters: {engine.no_alora}"
    if config.tuning == "prefix":
        yield from _beyond_with_prefix(engine, config)
    elif config.r > engine.max_lora_rank:
        yield "r", f"from 1 to {engine.max_lora_rank}, the server's --max-lora-rank"
    if not set(config.target_modules or []) <= set(engine.target_modules):
        yield "target_modules", f"some of {', '.join(engine.target_modules)}, which this server adapts"
    if to_serve:
        return
    if config.reward is not None and config.reward not in engine.rewards:
        yield "reward", allowed_rewards(engine.rewards)
    if config.tuning != "prefix" and (slots := _slots(config.estimator)) > engine.max_loras_per_batch:
        yield (
            "estimator",
            f"one that the server's --max-loras-per-batch={engine.max_loras_per_batch} has room for: this one needs "
            f"{slots}",
        )
    if config.max_tokens_per_batch > engine.kv_capacity:
        yield "max_tokens_per_batch", f"from 1 to {engine.kv_capacity}, the size of the KV pool"


def _beyond_with_prefix(engine: EngineDescription, config: MezoConfig) -> Iterator[tuple[str, str]]:
    if engine.no_prefixes:
        yield "tuning", f"alora or lora, as this server cannot serve prefixes: {engine.no_prefixes}"
    most = min(int(POOL_SHARE * engine.kv_capacity), engine.context_length - 1)
    if config.num_virtual_tokens > most:
        yield "num_virtual_tokens", f"from 1 to {most}, a quarter of the KV pool and less than the context"


def _refused(name: str, value: Any, allowed: str, given: Mapping[str, _Given]) -> RequestError:
    return _refusal(_Given(given[name].path if name in given else f"{_PLACES[1]}.{name}", value), allowed)


def _refusal(sent: _Given, allowed: str) -> RequestError:
    return RequestError(400, f"{sent.path}={shown(sent.value)} is not allowed: {allowed}", sent.path, "invalid_value")
