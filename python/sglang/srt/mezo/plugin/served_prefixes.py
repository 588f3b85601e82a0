"""Prefixes (PEFT's PrefixTuning) that this process serves: loaded by name, held in the KV pool, placed anew where that
has been emptied."""

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from sglang.srt.mezo.adapters.peft_prefix import PREFIX_TUNING
from sglang.srt.mezo.adapters.prefix_adapter import PrefixAdapter
from sglang.srt.mezo.core.errors import CapacityError, ConfigError
from sglang.srt.mezo.engine.handle import EngineHandle
from sglang.srt.mezo.engine.held_places import OURS, HeldPlaces
from sglang.srt.mezo.engine.prefix_needs import POOL_SHARE, why_no_prefixes
from sglang.srt.mezo.engine.prefix_points import PrefixLayout
from sglang.srt.mezo.engine.streams import forward_stream
from sglang.srt.mezo.plugin.hooks import StartRefused

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

_NUMBERS = count(1)


@dataclass
class ServedPrefix:
    """A load of a prefix.

    Attributes:
        name: as requests have it.
        namespace: of the radix tree, new with every load: what one has computed the next does not meet.
        held: where its keys and values are; None until the engine has a pool.
    """

    lora_id: str
    name: str
    adapter: PrefixAdapter
    namespace: str
    held: HeldPlaces | None = None

    @property
    def tokens(self) -> int:
        return self.adapter.spec.num_virtual_tokens


_SERVED: dict[str, ServedPrefix] = {}


@dataclass
class _Engine:
    """longest, longest_prompt: that SGLang takes where no prefix is held."""

    scheduler: Any
    longest: int
    longest_prompt: int


_engine: _Engine | None = None


def find(lora_id: str | None) -> ServedPrefix | None:
    """The prefix that a request's adapter is, None where it is none."""
    return None if lora_id is None else _SERVED.get(lora_id)


def public_name(name: str, lora_id: str) -> str:
    """What requests call an adapter, of which a published version has its id behind the name."""
    return name.removesuffix(f"@{lora_id}")


def load(lora_id: str, name: str, adapter: PrefixAdapter) -> None:
    """Serve a prefix.

    Raises:
        ConfigError, CapacityError: it would be answered wrongly, or has no room; nothing of it stays.
    """
    positions = adapter.spec.positions
    if positions != "shifted":
        raise ConfigError("prefix_positions", positions, "shifted: a server gives texts PEFT's positions and no others")
    prefix = ServedPrefix(lora_id, public_name(name, lora_id), adapter, f"{OURS}prefix{next(_NUMBERS)}{OURS}")
    if _engine is not None:
        _place(_engine.scheduler, prefix)
    _SERVED[lora_id] = prefix
    _leave_room()


def unload(lora_id: str) -> None:
    """Forget a prefix, if it is one: the tree may evict it from now on."""
    prefix = _SERVED.pop(lora_id, None)
    if prefix is not None and prefix.held is not None:
        prefix.held.release()
        _leave_room()


def attach(scheduler: "Scheduler") -> None:
    """The engine has its pool: place what it was started with, or end."""
    global _engine
    _engine = _Engine(scheduler, scheduler.max_req_len, scheduler.max_req_input_len)
    for prefix in _SERVED.values():
        try:
            _place(scheduler, prefix)
        except (ConfigError, CapacityError) as error:
            raise StartRefused(f"--lora-paths {prefix.name}: {error}") from error
    _leave_room()


def place_all() -> None:
    """Place anew what is not there, as the pool has been emptied; not while its memory is given away."""
    if _engine is None or _engine.scheduler.weight_updater.offload_tags:
        return
    for prefix in _SERVED.values():
        if prefix.held is None or not prefix.held.is_valid:
            _place(_engine.scheduler, prefix)


def _place(scheduler: "Scheduler", prefix: ServedPrefix) -> None:
    """Put keys and values where requests find them."""
    if (reason := why_no_prefixes(scheduler)) is not None:
        raise ConfigError("peft_type", PREFIX_TUNING, f"LORA: {reason}")
    handle = EngineHandle.from_scheduler(scheduler)
    others = sum(other.tokens for other in _SERVED.values() if other is not prefix)
    room = int(POOL_SHARE * handle.kv_capacity) - others
    if prefix.tokens > room:
        raise CapacityError(
            f"a prefix of {prefix.tokens} tokens is more than the {max(room, 0)} of the KV pool's "
            f"{handle.kv_capacity} tokens that prefixes may have beside those that are served: raise --max-total-tokens"
        )
    layout = PrefixLayout(handle, prefix.adapter.spec)
    with forward_stream(scheduler):
        prefix.held = HeldPlaces(handle, prefix.tokens, prefix.namespace)
        layout.write(prefix.adapter.theta.view(prefix.adapter.by_layer), prefix.held.places)


def _leave_room() -> None:
    """Requests are never longer than what prefixes leave of the pool: one that is would wait for ever."""
    if _engine is not None:
        room = _engine.scheduler.max_total_num_tokens - 1 - sum(prefix.tokens for prefix in _SERVED.values())
        reserved = _engine.longest - _engine.longest_prompt
        _engine.scheduler.max_req_len = min(_engine.longest, room)
        _engine.scheduler.max_req_input_len = min(_engine.longest_prompt, room - reserved)
