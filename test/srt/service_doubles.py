"""What a job manager talks to, without an engine: SGLang's own tokenizer-side LoRA code, and a scheduler that answers
commands and trains nothing. What a job reports, a test says."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
from msgspec import structs

import hyperparameters
from sglang.srt.lora.lora_registry import LoRARegistry
from sglang.srt.managers import tokenizer_control_mixin, tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput, LoadLoRAAdapterReqInput, LoRAUpdateOutput
from sglang.srt.mezo.core.integrity import write_checked_json
from sglang.srt.mezo.service.wire import messages
from sglang.srt.mezo.service.wire.events import Event, Failed, Started, Succeeded
from sglang.srt.mezo.service.wire.messages import EngineDescription, MezoReqInput, MezoReqOutput
from sglang.srt.mezo.service.wire.packed import unpack

ENGINE = structs.replace(
    hyperparameters.ENGINE,
    model_path="/models/opt",
    context_length=64,
    target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
    default_target_modules={"alora": ["q_proj", "v_proj"], "lora": ["q_proj", "v_proj"]},
    base_model="sha256:opt",
)


class Refusal(Exception):
    """message, param"""


class Scheduler:
    """Answers as the real one does; ``fill`` makes the files that a run leaves.

    Attributes:
        commands: everything it was sent.
        refuses: kind of command to the error it is answered with.
        holds: kind of command to an event that must be set before it is answered.
    """

    def __init__(self, engine: EngineDescription = ENGINE):
        self.commands: list[Any] = []
        self.refuses: dict[type, Refusal] = {}
        self.holds: dict[type, asyncio.Event] = {}
        self.loaded: dict[tuple[str, str], list] = {}
        self.job: messages.StartJob | messages.HoldJob | None = None
        self.opened = False
        self.train: list = []
        self.portions: list[tuple[int, int]] = []
        self.step = 0
        self.on_event = lambda event: None
        self._handlers = {
            messages.Describe: lambda command: msgspec.to_builtins(engine),
            messages.LoadExamples: self._load,
            messages.StartJob: self._start,
            messages.HoldJob: self._start,
            messages.StopJob: self._stop,
            messages.AppendExamples: self._append,
            messages.SaveAdapter: self._save,
            messages.EvaluatePerturbed: self._evaluate,
            messages.ApplyUpdate: self._update,
        }

    async def handle(self, command) -> MezoReqOutput:
        await asyncio.sleep(0)
        self.commands.append(command)
        if type(command) in self.holds:
            await self.holds[type(command)].wait()
        try:
            if type(command) in self.refuses:
                raise self.refuses[type(command)]
            return MezoReqOutput(success=True, result=self._handlers[type(command)](command) or {})
        except Refusal as refusal:
            message, param = refusal.args
            return MezoReqOutput(success=False, message=message, param=param)

    def sent(self, kind: type) -> list[Any]:
        return [command for command in self.commands if isinstance(command, kind)]

    def report(self, kind: type[Event], step: int = 0, job_id: str | None = None, **fields: Any) -> None:
        """Let the job say something, and be what it says."""
        job_id = job_id or self.job.job_id
        if kind is Started:
            self.opened = True
        if kind in (Succeeded, Failed):
            self.job = None
        self.step = step
        self.on_event(kind(job_id=job_id, step=step, **fields))

    def succeed(self, step: int = 10, weights: str = "trained") -> None:
        write_adapter(Path(self.job.config.output_dir) / "adapter", weights)
        self.report(Succeeded, step, best_step=step, metrics={}, trained_tokens=123, train_seconds=1.0)

    # --- commands -----------------------------------------------------------------------------------------------------

    def _load(self, command) -> None:
        self.loaded.setdefault((command.job_id, command.split), []).extend(unpack(command.examples))

    def _start(self, command) -> None:
        train = self.loaded.pop((command.job_id, "train"), [])
        self.loaded.clear()
        if self.job is not None:
            raise Refusal(f"{self.job.job_id} has the engine", "job")
        self.job, self.opened, self.train = command, False, train
        if isinstance(command, messages.StartJob):
            assert sum(count for _, count in command.portions) == len(train)
            self.portions = list(command.portions)
        run = Path(command.config.output_dir)
        assert command.config.resume_from_checkpoint == run.exists()
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text("{}")
        (run / "seed_log").write_text("log")

    def _stop(self, command) -> dict[str, int]:
        for key in [key for key in self.loaded if key[0] == command.job_id]:
            del self.loaded[key]
        if self.job is None or self.job.job_id != command.job_id:
            return {}
        self.job = None
        return {"step": self.step}

    def _append(self, command) -> dict[str, int]:
        self._require_open(command, messages.StartJob)
        examples = unpack(command.examples)
        self.train += examples
        first = self.step + 1
        earlier = self.portions.pop()[1] if self.portions[-1][0] == first else 0
        self.portions.append((first, earlier + len(examples)))
        write_checked_json(Path(self.job.config.output_dir) / "segments.json", {"parts": self.portions})
        return {"step": first}

    def _save(self, command) -> dict[str, int]:
        self._require_open(command)
        write_adapter(Path(command.directory), f"step {self.step}")
        return {"step": self.step}

    def _evaluate(self, command) -> None:
        self._require_open(command, messages.HoldJob)

    def _update(self, command) -> dict[str, int]:
        self._require_open(command, messages.HoldJob)
        self.step += 1
        return {"step": self.step}

    def _require_open(self, command, kind: type = object) -> None:
        if self.job is None or self.job.job_id != command.job_id or not self.opened or not isinstance(self.job, kind):
            raise Refusal(f"{command.job_id} is not the job that has the engine", "job")


def write_adapter(directory: Path, weights: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.safetensors").write_text(weights)


class TokenizerManager(tokenizer_control_mixin.TokenizerControlMixin):
    """SGLang's LoRA registry and loading, in front of a scheduler that only keeps a list.

    Attributes:
        loaded: what the scheduler has: id to (name, weights).
        broken: weights that it fails to load.
    """

    _resolve_lora_path = tokenizer_manager.TokenizerManager._resolve_lora_path

    def __init__(self, scheduler: Scheduler, tokenizer, served_model_name: str = "opt"):
        self.tokenizer = tokenizer
        self.served_model_name = served_model_name
        self.context_len = ENGINE.context_length
        self.lora_registry = LoRARegistry()
        self.lora_ref_cache: dict[str, Any] = {}
        self.lora_update_lock = asyncio.Lock()
        self.pending_lora_unloads: dict[str, str] = {}
        self.loaded: dict[str, tuple[str, str]] = {}
        self.broken = ""
        self._scheduler = scheduler

    def auto_create_handle_loop(self) -> None:
        pass

    def config_value(self, name: str) -> Any:
        return self.tokenizer.name_or_path if name == "model_path" else None

    async def mezo_control_communicator(self, request: MezoReqInput) -> list[MezoReqOutput]:
        return [await self._scheduler.handle(request.command)]

    async def update_lora_adapter_communicator(self, request) -> list[LoRAUpdateOutput]:
        await asyncio.sleep(0)
        problem = None
        if isinstance(request, LoadLoRAAdapterReqInput):
            weights = Path(request.lora_path, "adapter_model.safetensors").read_text()
            if request.lora_name in [name for name, _ in self.loaded.values()]:
                problem = f"{request.lora_name} is already loaded"
            elif weights == self.broken:
                problem = "the weights are broken"
            else:
                self.loaded[request.lora_id] = (request.lora_name, weights)
        else:
            del self.loaded[request.lora_id]
        return [LoRAUpdateOutput(success=problem is None, error_message=problem, loaded_adapters={})]

    async def begin(self, name: str) -> str:
        """A request for an adapter comes in; returns the id of the adapter that it gets."""
        request = GenerateReqInput(input_ids=[1], lora_path=name)
        await self._resolve_lora_path(request)
        return request.lora_id

    async def end(self, lora_id: str) -> None:
        await self.lora_registry.release(lora_id)

    async def answer(self, name: str) -> str:
        """The weights that answer a request."""
        lora_id = await self.begin(name)
        weights = self.loaded[lora_id][1]
        await self.end(lora_id)
        return weights


def without_runtime_context(monkeypatch) -> None:
    """SGLang's settings of a server with LoRA, for code that looks them up in the process."""
    for module in (tokenizer_control_mixin, tokenizer_manager):
        monkeypatch.setattr(module, "get_lora", lambda: SimpleNamespace(enable_lora=True, max_loaded_loras=None))
    monkeypatch.setattr(tokenizer_control_mixin, "get_parallel", lambda: SimpleNamespace(dp_size=1))
