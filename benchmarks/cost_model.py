"""What a step cannot avoid, and how fast this machine could do it.

The work of a step is counted from its plans, whatever the implementation does:

- every token that must be computed goes through every linear layer once, in every slot; a token that rows of one slot
have
  in common counts once, and a base-model prefix not at all, as its KV is kept;
- every computed token attends to all tokens before it; a base-model prefix is read from the KV pool once;
- scores need the head at the rows that are read: single words where the normaliser cancels, the vocabulary where not;
- the adapter is read for the points and again for the update, which writes it; the directions are read; a slot for each
adapter
  that is evaluated is written, and read by the products;
- of full tuning the master copy is read, and the weights are written, at every point, each of which has its own passes;
the update reads and writes the copy. Directions are drawn, and take no memory.

The ceiling is measured side by side with the steps: the time of the bare matrix products at these shapes over the
model's own weights, which come from memory as in a step, by the fastest of PyTorch's choice, oneDNN and linear.c, and
the bandwidth of a copy. Attention and LoRA products are small; they are taken to run at the rate of the large ones.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from sglang.srt.mezo.core.tokens import distinct_tokens
from sglang.srt.mezo.cpu.linear import HAS_C, HAS_ONEDNN, c_linear, onednn_linear
from sglang.srt.mezo.scoring.plan import ExamplePlan, needs_normaliser
from sglang.srt.mezo.training.trainer import MezoTrainer

_COPY_BYTES = 256 << 20
_END_OF_PREFIX = -1  # between what runs on the base model and what runs in a slot


@dataclass(frozen=True)
class Work:
    """Of one step.

    Attributes:
        tokens: tokens that run, in all slots.
        gemm_flops: of the linear layers, the head's included.
        head_rows: rows whose whole vocabulary is needed.
        small_flops: attention and LoRA.
        bytes: KV of base-model prefixes, what is trained, the directions and the slots.
    """

    tokens: int
    gemm_flops: int
    head_rows: int
    small_flops: int
    bytes: int


def work(trainer: MezoTrainer, batch: Sequence[ExamplePlan]) -> Work:
    """The unavoidable work of a step on ``batch``."""
    config, model = trainer.config, trainer.handle.model_runner.model_config
    slots = config.forward_passes
    itemsize = trainer.slot_dtype.itemsize
    rows = [row for plan in batch for row in plan.rows]
    prefixes = {row.prefix for row in rows}
    base_tokens = distinct_tokens(prefixes)
    texts = {row.prefix + (_END_OF_PREFIX,) + row.suffix for row in rows}
    tokens = slots * (distinct_tokens(texts) - base_tokens - len(prefixes))
    mean_context = statistics.mean(
        len(row.prefix) + position + 1 for row in rows for position in range(len(row.suffix))
    )
    attention = 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * tokens * round(mean_context)
    head = _head_weight(trainer)
    normalise = needs_normaliser(batch, trainer.objective)
    head_rows = (
        slots * len({(row.prefix, row.suffix[: position + 1]) for row in rows for position, _ in row.reads})
        if normalise
        else 0
    )
    single_reads = 0 if normalise else slots * sum(len(row.reads) for row in rows)
    full = config.tuning == "full"
    numel = trainer.trainable.numel
    moved = (
        numel * (4 * 2 + slots * (4 + itemsize))
        if full
        else (numel * (4 * (3 + config.num_perturbations) + 2 * slots * itemsize))
    )
    kv_width = 2 * model.num_hidden_layers * model.get_total_num_kv_heads() * model.head_dim
    return Work(
        tokens=tokens,
        gemm_flops=2 * tokens * sum(weight.numel() for weight in linear_weights(trainer))
        + 2 * head_rows * head.numel(),
        head_rows=head_rows,
        small_flops=attention + (0 if full else 2 * tokens * numel) + 2 * single_reads * head.shape[1],
        bytes=base_tokens * kv_width * itemsize + moved,
    )


def mean_work(works: Sequence[Work]) -> Work:
    """Field by field."""
    return Work(**{field: round(statistics.mean(getattr(one, field) for one in works)) for field in asdict(works[0])})


@dataclass(frozen=True)
class Ceiling:
    """Of this machine, for one kind of work.

    Attributes:
        gemm_seconds: time of the step's large products alone.
        bytes_per_second: of a copy, what is read and what is written.
    """

    gemm_seconds: float
    bytes_per_second: float

    def seconds(self, work: Work) -> float:
        """The shortest that a step with this work could take."""
        rate = work.gemm_flops / self.gemm_seconds
        return self.gemm_seconds + work.small_flops / rate + work.bytes / self.bytes_per_second


class CeilingMeter:
    """Measures a ceiling piece by piece, so that other measurements can come between."""

    def __init__(self, trainer: MezoTrainer, work: Work):
        self._work = work
        self._weights = linear_weights(trainer)
        like = {"dtype": self._weights[0].dtype, "device": self._weights[0].device}
        points = trainer.config.forward_passes if trainer.config.tuning == "full" else 1
        self._passes = points * max(1, -(-work.tokens // points // trainer.config.max_tokens_per_batch))
        tokens = -(-work.tokens // self._passes)
        widths = {weight.shape[1] for weight in self._weights}
        self._inputs = {width: torch.randn(tokens, width, **like) for width in widths}
        self._head = (_head_weight(trainer), torch.randn(work.head_rows, _head_weight(trainer).shape[1], **like))
        self._source = torch.ones(_COPY_BYTES // 4, device=like["device"])
        self._target = torch.empty_like(self._source)
        self._gemm: dict[Callable, list[float]] = {linear: [] for linear in linears(self._weights[0])}
        self._copy: list[float] = []

    def sweep(self) -> None:
        """All large products of a step by each of the ``linears``, and one copy."""
        with torch.inference_mode():
            for linear, seconds in self._gemm.items():
                started = time.perf_counter()
                for _ in range(self._passes):
                    for weight in self._weights:
                        linear(self._inputs[weight.shape[1]], weight)
                weight, rows = self._head
                if len(rows):
                    linear(rows, weight)
                synchronize()
                seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            self._target.copy_(self._source)
            synchronize()
            self._copy.append(time.perf_counter() - started)

    @property
    def gemm_seconds(self) -> dict[str, float]:
        """Median time of the large products, by the name of who made them."""
        return {linear.__name__: statistics.median(seconds) for linear, seconds in self._gemm.items()}

    @property
    def ceiling(self) -> Ceiling:
        return Ceiling(min(self.gemm_seconds.values()), 2 * _COPY_BYTES / statistics.median(self._copy))

    @property
    def limit(self) -> float:
        """Seconds: the shortest that the step could take."""
        return self.ceiling.seconds(self._work)


def meter_of_next_steps(trainer: MezoTrainer, steps: int = 16) -> CeilingMeter:
    """For the mean work of the trainer's next steps."""
    return CeilingMeter(
        trainer, mean_work([work(trainer, trainer.batch(trainer.global_step + i)) for i in range(steps)])
    )


def linears(weight: torch.Tensor) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """PyTorch's linear, and those in float32 on CPU that can run here."""
    plain = [torch.nn.functional.linear]
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return plain
    return plain + [onednn_linear] * HAS_ONEDNN + [c_linear] * HAS_C


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def linear_weights(trainer: MezoTrainer) -> list[torch.Tensor]:
    """Weights of the linear layers, [out, in] each, in the order of the model; the head is not one of them."""
    from sglang.srt.layers.linear import LinearBase

    modules = trainer.handle.model_runner.model.modules()
    return [module.weight for module in modules if isinstance(module, LinearBase)]


def _head_weight(trainer: MezoTrainer) -> torch.Tensor:
    return trainer.handle.model_runner.model.lm_head.weight
