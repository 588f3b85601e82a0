"""Room in the LoRA pool: slots that a job is about to take are kept free of requests' adapters.

SGLang validates a batch's adapters when requests join it, and fails later if pinned adapters have taken slots since.
"""

from collections.abc import Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.lora.lora_manager import LoRAManager


_reserved = 0  # a process has one LoRA pool


def reserve(slots: int) -> None:
    """From now on requests are only admitted where their adapters leave so many slots."""
    global _reserved
    _reserved = slots


def admits(manager: "LoRAManager", lora_ids: Set[str | None]) -> bool:
    """Whether a batch of these adapters leaves what is reserved."""
    return _reserved == 0 or leave_room(manager, lora_ids, _reserved)


def leave_room(manager: "LoRAManager", lora_ids: Set[str | None], slots: int) -> bool:
    """Whether ``slots`` more adapters can be pinned beside a batch of these; the base model keeps its slot."""
    pinned = {lora_id for lora_id, ref in manager.lora_refs.items() if ref.pinned}
    return len((lora_ids | {None}) - pinned) + len(pinned) + slots <= manager.max_loras_per_batch
