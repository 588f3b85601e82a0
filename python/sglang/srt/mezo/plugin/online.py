"""Fine-tuning in a running server: flags, defaults of server arguments, and the hooks into its processes.

Without ``--enable-mezo`` only the flags are there.
"""

import argparse
import asyncio
import os
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import fields
from types import ModuleType
from typing import TYPE_CHECKING, get_type_hints

from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.settings import setting_of
from sglang.srt.mezo.engine import base_model
from sglang.srt.mezo.plugin import overlay, server_defaults
from sglang.srt.mezo.plugin.hooks import Hook, StartRefused, install, wrap_static
from sglang.srt.mezo.service.wire.settings import ENABLE_FLAG, ENABLE_VARIABLE, ServiceSettings, flag, served, variable

if TYPE_CHECKING:
    from sglang.srt.mezo.service.scheduler.runner import MezoRunner
    from sglang.srt.mezo.service.wire.messages import MezoEvent

_LOOK_SECONDS = 0.1  # between two looks whether the server is to end
_END_SECONDS = 5.0  # that the application has to end once the engine has


def register() -> None:
    """Install what every process needs; the scheduler's hooks only where training is on.

    The process that parses the command line learns of the flag after this, and asks again when it matters.
    """
    overlay.on_import(
        "sglang.srt.server_args", lambda module: wrap_static(module, "ServerArgs", "add_cli_args", _add_flags)
    )
    install(
        Hook(
            "sglang.srt.server_args",
            "ServerArgs.resolve_once",
            "before",
            _fill_server_args,
            "room for adapters in training",
        )
    )
    install(
        Hook(
            _CONTROL,
            "TokenizerControlMixin.init_communicators",
            "around",
            _around_communicators,
            "commands to the scheduler, and its events",
        )
    )
    overlay.on_import("sglang.srt.entrypoints.http_server", _extend_app)
    if _settings().enabled:
        for hook in SCHEDULER_HOOKS:
            install(hook)


def _settings() -> ServiceSettings:
    try:
        return ServiceSettings.from_environment()
    except ConfigError as error:
        raise StartRefused(str(error)) from error


# --- command line -----------------------------------------------------------------------------------------------------


class _ToEnvironment(argparse.Action):
    """SGLang drops flags that it does not know; processes that it starts inherit the environment."""

    def __init__(self, *args, variable: str, **kwargs):
        super().__init__(*args, **kwargs)
        self._variable = variable

    def __call__(self, parser, namespace, value, option_string=None):
        os.environ[self._variable] = str(value)


class _SwitchToEnvironment(argparse._StoreTrueAction):
    """A flag without a value, of the only kind that SGLang's ``--config`` takes."""

    def __init__(self, *args, variable: str, **kwargs):
        super().__init__(*args, **kwargs)
        self._variable = variable

    def __call__(self, parser, namespace, value, option_string=None):
        os.environ[self._variable] = "1"


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sglang-mezo", "Fine-tuning with forward passes, in the server.")
    group.add_argument(
        ENABLE_FLAG,
        action=_SwitchToEnvironment,
        default=argparse.SUPPRESS,
        variable=ENABLE_VARIABLE,
        help=f"Serve the fine-tuning API. [{ENABLE_VARIABLE}]",
    )
    kinds = get_type_hints(ServiceSettings)
    for one in fields(ServiceSettings):
        if one.name in served():
            own, name = setting_of(one), variable(one.name)
            bounds = f"; {own.bounds}" if str(own.bounds) else ""
            help = f"{own.help} [{name}; {one.default}{bounds}]".replace("%", "%%")
            kind = kinds[one.name] if kinds[one.name] in (int, float) else str
            group.add_argument(
                flag(one.name), action=_ToEnvironment, default=argparse.SUPPRESS, type=kind, variable=name, help=help
            )


def _fill_server_args(server_args) -> None:
    """Runs once for each record."""
    try:
        server_defaults.fill(server_args, _settings())
    except ConfigError as error:
        raise StartRefused(str(error)) from error


# --- HTTP process -----------------------------------------------------------------------------------------------------


def _around_communicators(original: Callable, manager) -> None:
    if not _settings().enabled:
        return original(manager)
    from sglang.srt.managers import tokenizer_control_mixin
    from sglang.srt.mezo.service.wire import messages
    from sglang.utils import TypeBasedDispatcher

    messages.register()
    spec = ("mezo_control", messages.MezoReqOutput)
    if spec not in tokenizer_control_mixin._COMMUNICATOR_SPECS:
        tokenizer_control_mixin._COMMUNICATOR_SPECS.append(spec)
    original(manager)
    manager.mezo_service = None  # set by the application, where there is one
    manager._result_dispatcher += TypeBasedDispatcher(
        [(messages.MezoEvent, lambda message: _dispatch(manager, message))]
    )


def _dispatch(manager, message: "MezoEvent") -> None:
    if manager.mezo_service is not None:
        manager.mezo_service.on_event(message.event)


async def _around_shutdown(original: Callable, manager) -> None:
    """SGLang waits here for SIGTERM and until its requests are answered, and looks every 5 s; then it ends the
    scheduler.

    New requests are refused meanwhile: else their answers are waited for as well.
    """
    from sglang.srt.utils import get_bool_env_var

    while not manager.gracefully_exit:
        await asyncio.sleep(_LOOK_SECONDS)
    if manager.mezo_service is not None:
        manager.mezo_service.requests.refuse()
    while (
        manager.rid_to_state
        and manager.server_status.name != "UnHealthy"
        and not get_bool_env_var("SGL_FORCE_SHUTDOWN")
    ):
        await asyncio.sleep(_LOOK_SECONDS)
    try:
        await original(manager)
    finally:
        if manager.mezo_service is not None:
            manager.mezo_service.on_engine_end()
            _end_within(_END_SECONDS)


def _end_within(seconds: float) -> None:
    """Whatever thread is still at work then, such as one that waits for a disk: all that has been acknowledged is
    stored."""
    timer = threading.Timer(seconds, os._exit, (0,))
    timer.daemon = True
    timer.start()


def _extend_app(http_server: ModuleType) -> None:
    """Add the routes, and start and stop the service with the application."""
    settings = _settings()
    if not settings.enabled:
        return
    from sglang.srt.mezo.service.http import answers, latency, loads, native, page, routes
    from sglang.srt.mezo.service.http.app import Service

    service = Service(settings)
    routes.install(http_server.app, service)
    native.install(http_server.app, service)
    page.install(http_server.app)
    install(
        Hook(
            _TOKENIZER,
            "TokenizerManager._handle_batch_output",
            "around",
            latency.around_batch_output,
            "latency of served requests",
        )
    )
    http_server.app.add_middleware(service.requests.middleware)
    install(
        Hook(
            _TOKENIZER,
            "TokenizerManager.sigterm_watchdog",
            "around",
            _around_shutdown,
            "nothing waits for an engine that has ended",
        )
    )
    every, version = (
        "the adapter that a model's name says, on every route",
        "an answer names the version of its adapter",
    )
    install(
        Hook(
            "sglang.srt.entrypoints.openai.serving_base",
            "OpenAIServingBase.handle_request",
            "around",
            answers.around_request,
            every,
        )
    )
    install(
        Hook(
            "sglang.srt.entrypoints.openai.serving_responses",
            "OpenAIServingResponses.create_responses",
            "around",
            answers.around_responses,
            every,
        )
    )
    for name in ("handle_chat", "handle_generate"):
        install(
            Hook(
                "sglang.srt.entrypoints.ollama.serving", f"OllamaServing.{name}", "around", answers.around_ollama, every
            )
        )
    for name in ("load_lora_adapter", "load_lora_adapter_from_tensors", "unload_lora_adapter"):
        install(
            Hook(
                _CONTROL,
                f"TokenizerControlMixin.{name}",
                "around",
                loads.around_change,
                "the name of a job's adapter is its",
            )
        )
    install(Hook(_TOKENIZER, "TokenizerManager.generate_request", "before", answers.before_generating, every))
    install(Hook(_TOKENIZER, "TokenizerManager._resolve_lora_path", "around", answers.around_resolving, version))
    install(
        Hook(
            "sglang.srt.utils.auth",
            "add_api_key_middleware",
            "after",
            page.after_keys,
            "the page asks for the key itself",
        )
    )
    upstream = http_server.app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app):
        async with upstream(app) as state:
            manager = http_server.get_global_state().tokenizer_manager
            manager.mezo_service = service
            await service.start(manager)
            try:
                yield state
            finally:
                manager.mezo_service = None
                await service.stop()

    http_server.app.router.lifespan_context = lifespan


# --- scheduler --------------------------------------------------------------------------------------------------------


def _after_dispatcher(result: None, scheduler) -> None:
    """Take commands; the runner is built at the first one, when the scheduler is whole."""
    from sglang.srt.mezo.service.wire import messages
    from sglang.utils import TypeBasedDispatcher

    messages.register()
    scheduler.mezo_runner = None
    scheduler._request_dispatcher += TypeBasedDispatcher(
        [(messages.MezoReqInput, lambda request: _runner(scheduler).handle(request))]
    )


def _runner(scheduler) -> "MezoRunner":
    from sglang.srt.mezo.service.scheduler.runner import MezoRunner

    if scheduler.mezo_runner is None:
        scheduler.mezo_runner = MezoRunner(scheduler, _settings())
    return scheduler.mezo_runner


def _before_batch(scheduler, *args, **kwargs) -> None:
    if scheduler.mezo_runner is not None:
        scheduler.mezo_runner.tick()


def _around_sleep(original: Callable, scheduler) -> None:
    if scheduler.mezo_runner is None or not scheduler.mezo_runner.has_work:
        original(scheduler)


def _before_queue(scheduler, request, *args, **kwargs) -> None:
    """The time of the first token is sent along with --enable-metrics only, and not to be seen from outside if
    nothing streams."""
    if not request.stream:
        request.time_stats.has_timing_data = True


_CONTROL = "sglang.srt.managers.tokenizer_control_mixin"
_TOKENIZER = "sglang.srt.managers.tokenizer_manager"
_SCHEDULER = "sglang.srt.managers.scheduler"

_WEIGHTS = "sglang.srt.model_executor.model_runner_components.weight_updater"

SCHEDULER_HOOKS = (
    Hook(_SCHEDULER, "Scheduler.init_request_dispatcher", "after", _after_dispatcher, "takes commands about training"),
    Hook(_SCHEDULER, "Scheduler.get_next_batch_to_run", "before", _before_batch, "runs a piece of training"),
    Hook(
        _SCHEDULER,
        "Scheduler.maybe_sleep_on_idle",
        "around",
        _around_sleep,
        "keeps the loop awake while a job has work",
    ),
    Hook(
        _SCHEDULER, "Scheduler._add_request_to_queue", "before", _before_queue, "tells when the first token was there"
    ),
    *(
        Hook(_WEIGHTS, f"WeightUpdater.{name}", "after", look, "another base model is noticed")
        for name, look in (
            ("update_weights_from_disk", base_model.after_load_from_disk),
            ("load_weights_from_distributed", base_model.after_load),
            ("update_weights_from_tensor", base_model.after_load),
            ("update_weights_from_ipc", base_model.after_load),
        )
    ),
)
