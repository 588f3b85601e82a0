"""What the HTTP process and the scheduler say to each other about training.

Commands go to every rank through SGLang's control channel and are answered at once; what takes longer, and what a job
does by itself, comes back as a `MezoEvent` from rank 0 (``events``).
"""

from typing import Any, Literal, Union

from msgspec import Struct

from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.data.batches import Portion
from sglang.srt.mezo.service.wire.events import AnyEvent
from sglang.srt.mezo.service.wire.upstream import BaseReq, hook_custom_types


class Describe(Struct, tag=True, kw_only=True):
    """What the engine can train; answered with the fields of `EngineDescription`."""


class LoadExamples(Struct, tag=True, kw_only=True):
    """A part of a job's data as ``packed`` has it, ahead of its ``StartJob``; parts of a split add up in order."""

    job_id: str
    split: Literal["train", "eval"]
    examples: bytes


class _TakeUp(Struct, kw_only=True):
    """A job's adapter: a new one, or as it is where the seed log in ``config.output_dir`` ends.

    invocation: its tokens, none for ordinary LoRA. start: folder of the adapter that ``config.init_from`` names.
    """

    job_id: str
    config: MezoConfig
    base_model: str
    invocation: list[int]
    start: str | None = None


class StartJob(_TakeUp, tag=True, kw_only=True):
    """Train. portions: of the training data; the first counts from step 0 on."""

    portions: list[Portion]


class HoldJob(_TakeUp, tag=True, kw_only=True):
    """Hold the adapter ready for ``EvaluatePerturbed`` and ``ApplyUpdate``."""


class StopJob(Struct, tag=True, kw_only=True):
    """Give the engine back after the last whole step; the seed log holds all that is needed to go on.

    Answered with {"step": steps taken} where the job had the engine.
    """

    job_id: str


class AppendExamples(Struct, tag=True, kw_only=True):
    """More training data for the running job, as ``packed`` has it; answered with {"step": first step that draws from
    it}."""

    job_id: str
    examples: bytes


class SaveAdapter(Struct, tag=True, kw_only=True):
    """Write the adapter as it is now, as a PEFT folder; answered with {"step": steps it has taken}."""

    job_id: str
    directory: str


class EvaluatePerturbed(Struct, tag=True, kw_only=True):
    """Losses at theta + zo_eps z and theta - zo_eps z for the directions of ``zo_random_seed``.

    Answered at once; the losses follow as an event that carries ``operation``.
    """

    job_id: str
    operation: str
    examples: bytes
    zo_random_seed: int
    zo_eps: float


class ApplyUpdate(Struct, tag=True, kw_only=True):
    """One update along the directions of ``zo_random_seed``, written to the seed log; answered with {"step"}."""

    job_id: str
    zo_random_seed: int
    projected_grad: list[float]
    learning_rate: float


SPARE_SLOTS = 1
"""Of the LoRA pool, that a job leaves to serve adapters beside it."""


class EngineDescription(Struct, kw_only=True):
    """What a job may ask of this engine.

    target_modules: Hugging Face names of the linear layers that the LoRA pool can adapt. default_target_modules: for
    each tuning, what a job gets that names none. micro_step_tokens, idle_step_tokens: tokens of one forward pass that
    keep to the server's bounds on a piece, beside requests and while none come. no_alora, no_prefixes: why it cannot
    serve aLoRA adapters, or prefixes; empty where it can. rewards: names of those that a job may train by. base_model:
    the fingerprint of the weights, which may be replaced while the server runs. rendering: a digest of the tokenizer
    and of how messages are rendered; the HTTP process knows it.
    """

    model_path: str
    dtype: str
    context_length: int
    kv_capacity: int
    max_lora_rank: int
    max_loras_per_batch: int
    target_modules: list[str]
    default_target_modules: dict[str, list[str]]
    micro_step_tokens: int
    idle_step_tokens: int
    no_alora: str
    no_prefixes: str = ""
    rewards: list[str] = []
    base_model: str = ""
    rendering: str = ""


Command = Union[
    Describe, LoadExamples, StartJob, HoldJob, StopJob, AppendExamples, SaveAdapter, EvaluatePerturbed, ApplyUpdate
]


class MezoReqInput(BaseReq, kw_only=True):
    command: Command


class MezoReqOutput(BaseReq, kw_only=True):
    """Where ``success`` is False: param is the field at fault; code is "disk_full" where the disk took no more."""

    success: bool
    message: str = ""
    code: str = "engine_refused"
    param: str | None = None
    result: dict[str, Any] = {}


class MezoEvent(BaseReq, kw_only=True):
    event: AnyEvent


def register() -> None:
    """Make the types known to SGLang's msgpack codec, in every process."""
    hook_custom_types(MezoReqInput, MezoReqOutput, MezoEvent)
