"""What Transformers makes of examples, with PEFT where there is an adapter: losses, choices and written answers as an
engine's, without an engine."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch

from sglang.srt.mezo.adapters.adapter import CONFIG
from sglang.srt.mezo.adapters.architectures import architecture_of, auto_class, is_masked
from sglang.srt.mezo.adapters.peft_files import directory_of, read_json
from sglang.srt.mezo.adapters.prefix_adapter import POSITIONS
from sglang.srt.mezo.core.config import PrefixPositions
from sglang.srt.mezo.core.errors import ConfigError
from sglang.srt.mezo.core.objective import Objective
from sglang.srt.mezo.core.passes import Passes, drain
from sglang.srt.mezo.data.examples import Example
from sglang.srt.mezo.engine.points import BASE, PointGroup
from sglang.srt.mezo.scoring.calibration import Calibrated
from sglang.srt.mezo.scoring.evaluation import evaluation_passes
from sglang.srt.mezo.scoring.generator import Completions
from sglang.srt.mezo.scoring.measures import Measure, Measured, Reading, Scores
from sglang.srt.mezo.scoring.plan import ExamplePlan, Planner, Row, needs_normaliser
from sglang.srt.mezo.scoring.readout import BatchLoss
from sglang.srt.mezo.training.checkpoint import read_checkpoint
from sglang.srt.mezo.training.evaluate import Asked, EvaluateArguments
from sglang.srt.mezo.training.finetune import Dtype, ModelArguments
from sglang.srt.mezo.training.rewards import Writer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DTYPES: Mapping[Dtype, torch.dtype] = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}


@dataclass
class Reference:
    """A model of Transformers', or PEFT's around it, that reads and writes after planned rows.

    Attributes:
        model: on the device that it runs on.
        invocation: tokens from which an aLoRA adapter acts; none of other models.
        virtual_tokens: of a prefix; none of other models.
        positions: of the text behind the prefix.
        tokens: that have run through the model, without padding and virtual tokens.
    """

    model: Any
    invocation: tuple[int, ...] = ()
    virtual_tokens: int = 0
    positions: PrefixPositions = "shifted"
    tokens: int = 0

    def plan(self, examples: Sequence[Example]) -> list[ExamplePlan]:
        planner = Planner("alora" if self.invocation else "lora", self.invocation)
        return [planner.plan(example) for example in examples]

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], objective: Objective, keep: bool = True
    ) -> Passes[torch.Tensor]:
        """As ``Scorer.passes``, at the one point that there is."""
        yield from ()
        return self.values(plans, objective)[None]

    def values(self, plans: Sequence[ExamplePlan], objective: Objective) -> torch.Tensor:
        """Read every scored token: float32 [reads] on the CPU, log-probabilities, or logits where the normaliser
        cancels. They can be differentiated. As many rows run at a time as there are plans."""
        rows = [row for plan in plans for row in plan.rows]
        normalise = needs_normaliser(plans, objective)
        parts = (rows[start : start + len(plans)] for start in range(0, len(rows), len(plans)))
        return torch.cat([self._read(part, normalise) for part in parts])

    def features(self, plans: Sequence[ExamplePlan]) -> torch.Tensor:
        """What the head reads where it predicts the options of plans of one row: float32 [plans, width] on the CPU."""
        rows = [plan.rows[0] for plan in plans]
        hidden, _ = self._run(rows, [(number, _column(row, row.reads[0][0])) for number, row in enumerate(rows)])
        return hidden.float().cpu()

    def write(self, plans: Sequence[ExamplePlan], completions: Completions) -> list[str]:
        """What the model goes on with, the likeliest token each time, after plans of one row."""
        rows = [plan.rows[0] for plan in plans]
        # Padding stands between a prefix and its text, which a sliding window would move apart.
        windowed = getattr(self.model.config.get_text_config(), "sliding_window", None) is not None
        parts = [[row] for row in rows] if windowed and self.virtual_tokens else [rows]
        return [completions.text(tokens) for part in parts for tokens in self._write(part, completions)]

    def _write(self, rows: Sequence[Row], completions: Completions) -> list[list[int]]:
        """The tokens after each row; padding is on the left."""
        written: list[list[int]] = [[] for _ in rows]
        ids, mask = self._padded(rows, left=True)
        # PEFT counts the virtual tokens in.
        where = (mask.cumsum(1) - 1).clamp(min=0) - self._not_counted
        with self._head_reads(list(range(len(rows))), [-1] * len(rows)):
            out = self.model(input_ids=ids, position_ids=where, use_cache=True, **self._seen(rows, mask))
        # PEFT would put the virtual tokens before each token anew; they are in the cache.
        model, where = self.model, where[:, -1:]
        if self.virtual_tokens:
            model, where = self.model.get_base_model(), where + self.virtual_tokens
            mask = torch.cat((mask.new_ones(len(rows), self.virtual_tokens), mask), dim=1)
        going = list(range(len(rows)))
        while True:
            new = out.logits.view(len(rows), -1).argmax(dim=-1)
            for one in going:
                written[one].append(int(new[one]))
            going = [one for one in going if not completions.is_over(written[one])]
            if not going:
                return written
            self.tokens += len(going)
            mask, where = torch.cat((mask, mask.new_ones(len(rows), 1)), dim=1), where + 1
            active = {"alora_offsets": [1] * len(rows)} if self.invocation else {}
            out = model(
                input_ids=new[:, None],
                attention_mask=mask,
                position_ids=where,
                past_key_values=out.past_key_values,
                use_cache=True,
                **active,
            )

    def _read(self, rows: Sequence[Row], normalise: bool) -> torch.Tensor:
        asked = [
            ((number, _column(row, position)), token)
            for number, row in enumerate(rows)
            for position, token in row.reads
        ]
        places = {place: i for i, place in enumerate(dict.fromkeys(place for place, _ in asked))}
        _, logits = self._run(rows, list(places))
        values = torch.log_softmax(logits, dim=-1) if normalise else logits
        return values[[places[place] for place, _ in asked], [token for _, token in asked]].cpu()

    def _run(self, rows: Sequence[Row], places: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the head reads at (row, column), and its logits there: [places, width], float32 [places, vocabulary].

        Padding is on the right, where no token of a text attends to it.
        """
        ids, mask = self._padded(rows)
        given = self._seen(rows, mask)
        if self._not_counted:
            given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand_as(ids) - self._not_counted
        if not is_masked(self.model.config):
            given["use_cache"] = False
        with self._head_reads(*map(list, zip(*places))) as read:
            logits = self.model(input_ids=ids, **given).logits
        return read[0], logits.float()

    def _padded(self, rows: Sequence[Row], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, int64 [rows, longest]."""
        texts = [[*row.prefix, *row.suffix] for row in rows]
        self.tokens += sum(map(len, texts))
        longest, pad = max(map(len, texts)), self.model.config.get_text_config().pad_token_id or 0
        fill = [longest - len(text) for text in texts]
        ids = [[pad] * n + text if left else text + [pad] * n for n, text in zip(fill, texts)]
        mask = [[0] * n + [1] * len(text) if left else [1] * len(text) + [0] * n for n, text in zip(fill, texts)]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _seen(self, rows: Sequence[Row], mask: torch.Tensor) -> dict[str, Any]:
        """Which tokens are attended to, and on which an aLoRA adapter acts: PEFT counts them from the end of the
        padded row, and the prompt decides, not the option."""
        given: dict[str, Any] = {"attention_mask": mask}
        if self.invocation:
            firsts = mask.argmax(dim=1).tolist()
            given["alora_offsets"] = [mask.shape[1] - first - len(row.prefix) for row, first in zip(rows, firsts)]
        return given

    @property
    def _not_counted(self) -> int:
        """Virtual tokens that PEFT counts, and this prefix does not."""
        return self.virtual_tokens if self.positions == "unshifted" else 0

    @contextmanager
    def _head_reads(self, rows: list[int], columns: list[int]) -> Iterator[list[torch.Tensor]]:
        """Have the head read these places alone: logits of all would take far more memory than the model. Yields a
        list of what it has read."""
        read: list[torch.Tensor] = []

        def choose(head: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            read.append(inputs[0][rows, columns].to(head.weight.dtype))
            return (read[-1],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(choose)
        try:
            yield read
        finally:
            hook.remove()


@dataclass(frozen=True)
class Writing:
    """A ``Measure`` of what a reference writes, graded."""

    reference: Reference
    writer: Writer
    completions: Completions
    held_tokens = 0

    @property
    def objective(self) -> Objective:
        return self.writer.generation.objective

    def passes(
        self, plans: Sequence[ExamplePlan], groups: Sequence[PointGroup], seed: int, keep: bool = True
    ) -> Passes[Measured]:
        yield from ()
        texts = self.reference.write(plans, self.completions)
        grades = self.writer.grade(plans, texts)
        total = torch.tensor([sum(grades)], dtype=torch.float64)
        told = [{"completion": text, self.objective: grade} for text, grade in zip(texts, grades)]
        return Measured(BatchLoss(-total, len(plans)), {self.objective: Scores(total, len(plans))}, lambda: told)

    def release(self) -> None:
        """It holds none."""


def evaluate_examples(
    reference: Reference,
    examples: Sequence[Example],
    objective: Objective,
    batch_size: int,
    writer: Writer | None = None,
    nothing: Sequence[Example] = (),
    told: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Loss and scores, by the same rules as an engine's.

    Args:
        writer: where the model writes its answers.
        nothing: of each example, the options after a prompt that says nothing of it, by which they are calibrated.
        told: to which the scores of the options, the prediction and whether it is right are added, or what was written.

    Returns:
        ``loss``, and ``accuracy`` where there is something to choose from, or the score of what is written.

    Raises:
        ConfigError: completions would be sampled.
    """
    plans = reference.plan(examples)
    if writer is not None:
        measure: Measure = Writing(reference, writer, _completions(reference, writer))
    elif nothing:
        of_plan = {id(plan): one for plan, one in zip(plans, reference.plan(nothing))}
        measure = Calibrated(reference, of_plan)
    else:
        measure = Reading(reference, objective)
    reference.model.eval()
    with torch.no_grad():
        return drain(evaluation_passes(measure, plans, BASE, batch_size, 0, told))


def measure_by_transformers(
    model: ModelArguments, asked: Asked, arguments: EvaluateArguments
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What ``training.evaluate.measure_on`` returns, by Transformers and PEFT in the place of an engine.

    Raises:
        ConfigError: they cannot do what is asked.
    """
    _require_no_engine(model, arguments)
    reference = load_reference(model, arguments.adapter)
    told: list[dict[str, Any]] = []
    examples = [example for _, example in asked.examples]
    batch = arguments.per_device_eval_batch_size
    metrics = evaluate_examples(reference, examples, asked.objective, batch, asked.writer, asked.nothing, told)
    sources = [f"{row.source}:{row.line}" for row, _ in asked.examples]
    return {"examples": len(examples), **metrics}, [{"source": source, **one} for source, one in zip(sources, told)]


def _require_no_engine(model: ModelArguments, arguments: EvaluateArguments) -> None:
    """Raise ConfigError for a setting of an engine."""
    for settings, names in ((model, ("tp_size", "max_total_tokens")), (arguments, ("max_tokens_per_batch",))):
        for one in fields(settings):
            if one.name in names and (value := getattr(settings, one.name)) != one.default:
                raise ConfigError(one.name, value, f"{json.dumps(one.default)} with transformers, which has no engine")


def load_reference(model: ModelArguments, adapter: str | None = None) -> Reference:
    """A model as Transformers loads it, with the adapter in a PEFT folder, if any, as PEFT loads it.

    Raises:
        ConfigError: there is none, or it is one that PEFT cannot run.
    """
    config, _ = read_checkpoint(model.model)
    base = load_model(model.model, config, dtype_of(model.dtype, config))
    return Reference(base) if adapter is None else _with_adapter(base, config, adapter)


def load_model(model: str, config: "PretrainedConfig", dtype: torch.dtype) -> Any:
    """Transformers' model, on the GPU where there is one."""
    # PyTorch's fused attention, which is Transformers' own choice, leaves soft caps out.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    loaded = auto_class(config).from_pretrained(model, dtype=dtype, attn_implementation="eager" if capped else None)
    return loaded.to(_device()).eval()


def dtype_of(dtype: Dtype, config: "PretrainedConfig") -> torch.dtype:
    """What "auto" means to an engine on this machine: bfloat16 as stored, else float32 on a CPU and float16 on a
    GPU."""
    if dtype != "auto":
        return DTYPES[dtype]
    if config.get_text_config().dtype is torch.bfloat16:
        return torch.bfloat16
    return torch.float32 if _device().type == "cpu" else torch.float16


def _with_adapter(base: Any, config: "PretrainedConfig", adapter: str) -> Reference:
    from peft import PeftModel

    folder = directory_of(adapter)
    fields: Any = read_json(folder / CONFIG)
    virtual = fields.get("num_virtual_tokens") or 0
    if virtual and is_masked(config):
        raise ConfigError(
            "adapter", adapter, f"LoRA, or none, for {architecture_of(config)}, for which PEFT has no prefixes"
        )
    model = PeftModel.from_pretrained(base, folder).eval()
    invocation = tuple(fields.get("alora_invocation_tokens") or ())
    return Reference(model, invocation, virtual, fields.get(POSITIONS, "shifted"))


def _completions(reference: Reference, writer: Writer) -> Completions:
    if writer.generation.temperature:
        raise ConfigError("temperature", writer.generation.temperature, "0 with Transformers, which samples otherwise")
    ends: set[int] = set()
    for config in (reference.model.config, reference.model.generation_config):
        found = config.eos_token_id
        ends |= {found} if isinstance(found, int) else set(found or ())
    return Completions(writer.tokenizer, writer.generation, sorted(ends))


def _column(row: Row, position: int) -> int:
    """Of a position in the suffix."""
    return len(row.prefix) + position


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
