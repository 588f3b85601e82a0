"""Check that the embedded model and task are fit for their purpose, with Transformers and PEFT alone.

The task must be out of reach of word counting, the untouched model must start near chance, first-order training
must solve it (so the model does know sentiment), and MeZO must find most of that with forward passes only.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from generate import HERE, PROMPT
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

VERBALIZERS = (" terrible", " great")  # by label
LORA_TARGETS = ["q_proj", "v_proj"]
ALORA_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
RANK, ALPHA = 8, 16
FIRST_ORDER_STEPS, FIRST_ORDER_LEARNING_RATE, BATCH_SIZE = 400, 1e-3, 16

Row = dict[str, str | int]


@dataclass(frozen=True)
class Encoded:
    """A split as tensors: `ids` and `mask` [rows, length], padded on the right; `labels` [rows]."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> Encoded:
        return Encoded(self.ids[index], self.mask[index], self.labels[index])


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


# the bag of words


def words_of(row: Row) -> list[str]:
    return re.findall(r"[a-z]+", str(row["sentence"]))


def word_counts(rows: list[Row], vocabulary: dict[str, int]) -> torch.Tensor:
    """Counts [rows, vocabulary]; unknown words are skipped."""
    counts = torch.zeros(len(rows), len(vocabulary))
    for index, row in enumerate(rows):
        for word in words_of(row):
            if word in vocabulary:
                counts[index, vocabulary[word]] += 1
    return counts


def bag_of_words_accuracy(train: list[Row], test: list[Row], decay: float) -> float:
    """Held-out accuracy of a logistic regression on word counts."""
    vocabulary = {word: index for index, word in enumerate(sorted({w for row in train for w in words_of(row)}))}
    counts, labels = word_counts(train, vocabulary), torch.tensor([row["label"] for row in train]).float()
    weight, bias = torch.zeros(len(vocabulary), requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(counts @ weight + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    predicted = (word_counts(test, vocabulary) @ weight + bias > 0).long()
    return (predicted == torch.tensor([row["label"] for row in test])).float().mean().item()


# the language model


class Probe:
    """The model, its tokenizer and the task's prompt."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.invocation: list[int] = self.tokenizer(f" {PROMPT}", add_special_tokens=False).input_ids
        options = self.tokenizer(list(VERBALIZERS), add_special_tokens=False).input_ids
        self.options = torch.tensor(options).squeeze(1)

    def base(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model_dir, dtype=torch.float32).eval()

    def adapted(self, activated: bool, seed: int) -> PeftModel:
        """The model with a fresh LoRA, or an aLoRA that acts on the prompt's last words only."""
        torch.manual_seed(seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=ALORA_TARGETS if activated else LORA_TARGETS,
            alora_invocation_tokens=self.invocation if activated else None,
        )
        return get_peft_model(self.base(), config).eval()

    def encode(self, rows: list[Row], prompt: str) -> Encoded:
        batch = self.tokenizer([f"{row['sentence']}{prompt}" for row in rows], padding=True, return_tensors="pt")
        return Encoded(batch.input_ids, batch.attention_mask, torch.tensor([row["label"] for row in rows]))

    def option_scores(self, model: torch.nn.Module, batch: Encoded) -> torch.Tensor:
        """Log-probabilities [rows, 2] of the verbalizers at the last position."""
        logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        last = logits[torch.arange(len(batch.ids)), batch.mask.sum(1) - 1]
        return last.log_softmax(-1)[:, self.options]

    @torch.no_grad()
    def accuracy(self, model: torch.nn.Module, data: Encoded) -> float:
        return mean_accuracy(self.option_scores(model, data), data.labels)


def mean_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return (scores.argmax(-1) == labels).float().mean().item()


def option_loss(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over the two options, as the MeZO paper trains classification."""
    return F.cross_entropy(scores, labels)


def batches(size: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """Returns a function that gives the row numbers of the next batch, epoch after epoch."""
    pending: list[torch.Tensor] = []

    def next_batch() -> torch.Tensor:
        if not pending:
            order = torch.randperm(size, generator=generator)
            pending.extend(order[: size - size % BATCH_SIZE].split(BATCH_SIZE))
        return pending.pop()

    return next_batch


def fit_first_order(probe: Probe, model: PeftModel, train: Encoded, seed: int) -> None:
    """Adam on the adapter with a linear decay: what gradients can reach."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=FIRST_ORDER_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, FIRST_ORDER_STEPS)
    next_batch = batches(len(train.labels), torch.Generator().manual_seed(seed))
    for _ in range(FIRST_ORDER_STEPS):
        batch = train[next_batch()]
        option_loss(probe.option_scores(model, batch), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


class CachedPrefixes:
    """A split whose sentences are already in a KV cache.

    An aLoRA leaves everything before its invocation to the base model, so the KV of the sentences never changes
    and a step needs to compute the two tokens of the prompt only.
    """

    def __init__(self, probe: Probe, rows: list[Row]) -> None:
        self.probe = probe
        sentences = probe.encode(rows, prompt="")
        self.mask, self.labels = sentences.mask, sentences.labels
        with torch.no_grad():
            output = probe.base()(input_ids=sentences.ids, attention_mask=sentences.mask, use_cache=True)
        # per layer: keys and values [rows, heads, length, head size]
        self.layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    def scores(self, model: PeftModel, index: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [len(index), 2] of the verbalizers after sentence and prompt."""
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys[index], values[index], number)
        ids = torch.tensor([self.probe.invocation]).expand(len(index), -1)
        mask = torch.cat([self.mask[index], torch.ones_like(ids)], dim=1)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        return logits.log_softmax(-1)[:, self.probe.options]

    def accuracy(self, model: PeftModel) -> float:
        return mean_accuracy(self.scores(model, torch.arange(len(self.labels))), self.labels)


@dataclass(frozen=True)
class MezoSettings:
    learning_rate: float
    zo_eps: float
    steps: int
    eval_steps: int


@torch.no_grad()
def fit_mezo(
    model: PeftModel, train: CachedPrefixes, validation: CachedPrefixes, settings: MezoSettings, seed: int
) -> dict[int, float]:
    """MeZO (arXiv 2305.17333, algorithm 1) on the adapter; returns validation accuracy by step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    next_batch = batches(len(train.labels), torch.Generator().manual_seed(seed))
    curve = {0: validation.accuracy(model)}
    for step in range(1, settings.steps + 1):
        index = next_batch()
        z = [torch.randn(p.shape, generator=generator) for p in parameters]
        losses = []
        for scale in (settings.zo_eps, -2 * settings.zo_eps):
            torch._foreach_add_(parameters, z, alpha=scale)
            losses.append(option_loss(train.scores(model, index), train.labels[index]).item())
        torch._foreach_add_(parameters, z, alpha=settings.zo_eps)
        projected_grad = (losses[0] - losses[1]) / (2 * settings.zo_eps)
        torch._foreach_add_(parameters, z, alpha=-settings.learning_rate * projected_grad)
        if step % settings.eval_steps == 0:
            curve[step] = validation.accuracy(model)
    return curve


def check_mezo(probe: Probe, splits: dict[str, list[Row]], settings: MezoSettings, seeds: list[int]) -> list[float]:
    """Test accuracy by seed."""
    train, validation, test = (CachedPrefixes(probe, splits[name]) for name in ("train", "validation", "test"))
    accuracies = []
    for seed in seeds:
        model = probe.adapted(activated=True, seed=seed)
        began = time.time()
        curve = fit_mezo(model, train, validation, settings, seed)
        seconds = time.time() - began
        with torch.no_grad():
            accuracies.append(test.accuracy(model))
        reached = next((step for step, accuracy in curve.items() if accuracy >= 0.85), None)
        print(f"MeZO aLoRA seed {seed}: test {accuracies[-1]:.3f}, validation 85 % at step {reached}, {seconds:.0f} s")
        print("  validation " + " ".join(f"{step}:{accuracy:.3f}" for step, accuracy in curve.items()), flush=True)
    return accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-dir", type=Path, default=HERE / "opt-reviews")
    parser.add_argument("--task-dir", type=Path, default=HERE / "reviews")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of MeZO, constant")
    parser.add_argument("--zo-eps", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=2000, help="of MeZO")
    parser.add_argument("--eval-steps", type=int, default=100)
    parser.add_argument("--skip-first-order", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    splits = {name: read_rows(args.task_dir / f"{name}.jsonl") for name in ("train", "validation", "test")}
    probe = Probe(args.model_dir)
    train, test = (probe.encode(splits[name], prompt=f" {PROMPT}") for name in ("train", "test"))
    results: list[tuple[str, float, bool]] = []

    words = max(bag_of_words_accuracy(splits["train"], splits["test"], decay) for decay in (1e-4, 1e-3, 1e-2))
    results.append(("bag of words < 0.85", words, words < 0.85))
    zero_shot = probe.accuracy(probe.base(), test)
    results.append(("zero-shot < 0.60", zero_shot, zero_shot < 0.60))
    if not args.skip_first_order:
        for name, activated in (("LoRA", False), ("aLoRA", True)):
            model = probe.adapted(activated, seed=0)
            fit_first_order(probe, model, train, seed=0)
            accuracy = probe.accuracy(model, test)
            results.append((f"first-order {name} >= 0.93", accuracy, accuracy >= 0.93))
    settings = MezoSettings(args.learning_rate, args.zo_eps, args.steps, args.eval_steps)
    for seed, accuracy in zip(args.seeds, check_mezo(probe, splits, settings, args.seeds), strict=True):
        results.append((f"MeZO aLoRA seed {seed} >= 0.87", accuracy, accuracy >= 0.87))

    for name, value, passed in results:
        print(f"{'ok    ' if passed else 'FAILED'} {name}: {value:.3f}")
    if not all(passed for _, _, passed in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
