"""Build the embedded model from nothing: corpus, tokenizer, language model, model card.

The model is a plain language model of generated reviews. It sees no label and no task prompt; what it knows of
sentiment it learns because the sentences of a review agree. The run is resumable: a second call with the same
scratch directory continues at the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from generate import CORPUS_SEED, HERE, PROMPT, TASK_SEED, corpus, held_out_sentences, task_rows, write_task
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"  # ids 0 to 3, as in facebook/opt-125m
VERBALIZERS = (" terrible", " great")
IGNORED = -100  # label that the loss skips
VALIDATION_SHARE = 0.01


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; written into the model card."""

    documents: int = 140_000
    vocab_size: int = 2048
    hidden_size: int = 256
    num_hidden_layers: int = 4
    init_std: float = 0.06  # with OPT's 0.02 a model this narrow takes far longer to learn from context
    num_attention_heads: int = 8
    ffn_dim: int = 1024
    max_position_embeddings: int = 512
    sequence_length: int = 128
    batch_size: int = 8
    steps: int = 5_000
    warmup_steps: int = 200
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    seed: int = 0


def write_corpus(path: Path, documents: int, held_out: set[str]) -> None:
    if path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="ascii") as file:
        for document in corpus(CORPUS_SEED, documents, held_out):
            file.write(document + "\n")
    temporary.rename(path)


def byte_level_bpe(documents: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, PAD, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def train_tokenizer(documents: list[str], recipe: Recipe, folder: Path) -> None:
    """A byte-level BPE that, like OPT's, puts "</s>" in front of every text."""
    tokenizer = byte_level_bpe(documents, recipe.vocab_size)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", pair=f"{EOS} $A {EOS} $B", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    # The model continues a text, so a conversation is its messages, one after the other.
    chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=chat_template,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=recipe.max_position_embeddings,
    ).save_pretrained(folder)
    check_tokenizer(folder)


def check_tokenizer(folder: Path) -> None:
    """What the task relies on: OPT's special ids, and single tokens for the prompt and the verbalizers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([BOS, PAD, EOS, UNK])
    assert ids == [0, 1, 2, 3], f"special tokens have the ids {ids}"
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (2, 1, 2)
    sentence = "the plot is thin."
    prefix = tokenizer(sentence).input_ids
    assert prefix[0] == tokenizer.bos_token_id
    for verbalizer in VERBALIZERS:
        tail = tokenizer(f"{sentence} {PROMPT}{verbalizer}").input_ids[len(prefix) :]
        pieces = [tokenizer.decode([token]) for token in tail]
        assert pieces == [" It", " was", verbalizer], f"the prompt splits into {pieces}"
    assert tokenizer.decode(prefix, skip_special_tokens=True) == sentence


def pack(documents: list[list[int]], length: int) -> torch.Tensor:
    """Rows [num_rows, length] of whole documents, each led by "</s>"; a row always begins with a document."""
    eos, pad = 2, 1
    rows: list[list[int]] = [[]]
    for tokens in documents:
        document = tokens[: length - 1]
        if len(rows[-1]) + len(document) + 1 > length:
            rows.append([])
        rows[-1] += [*document, eos] if rows[-1] else [eos, *document, eos][:length]
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])


def token_rows(documents: list[str], folder: Path, recipe: Recipe) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(documents, add_special_tokens=False).input_ids
    return pack(encoded, recipe.sequence_length)


def new_model(recipe: Recipe) -> OPTForCausalLM:
    torch.manual_seed(recipe.seed)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            word_embed_proj_dim=recipe.hidden_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            ffn_dim=recipe.ffn_dim,
            max_position_embeddings=recipe.max_position_embeddings,
            do_layer_norm_before=True,
            activation_function="relu",
            init_std=recipe.init_std,
            dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        )
    )


def optimizer_for(model: PreTrainedModel, recipe: Any) -> torch.optim.AdamW:
    """Weight decay on matrices only, as usual."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batch_for(rows: torch.Tensor, step: int, recipe: Any) -> torch.Tensor:
    """The batch of a step [batch_size, sequence_length]: the corpus in its own order, again if it ends."""
    first = step * recipe.batch_size
    return rows[torch.arange(first, first + recipe.batch_size) % len(rows)]


def positions_for(batch: torch.Tensor, step: int, recipe: Recipe) -> torch.Tensor:
    """Position ids like `batch`; a quarter of the rows start late, so that no position stays untrained."""
    generator = torch.Generator().manual_seed(recipe.seed + step)
    latest = recipe.max_position_embeddings - recipe.sequence_length
    starts = torch.randint(0, latest + 1, (len(batch), 1), generator=generator)
    starts[torch.rand(len(batch), generator=generator) > 0.25] = 0
    return starts + torch.arange(batch.shape[1])


def loss_on(model: OPTForCausalLM, batch: torch.Tensor, positions: torch.Tensor, bf16: bool) -> torch.Tensor:
    labels = batch.masked_fill(batch == model.config.pad_token_id, IGNORED)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        return model(input_ids=batch, position_ids=positions, labels=labels, use_cache=False).loss


@torch.no_grad()
def validation_loss(model: OPTForCausalLM, rows: torch.Tensor, batch_size: int) -> float:
    """Mean over batches of the loss per token, in fp32."""
    model.eval()
    losses = [
        loss_on(model, batch, torch.arange(batch.shape[1]).expand_as(batch), bf16=False).item()
        for batch in rows.split(batch_size)
    ]
    model.train()
    return sum(losses) / len(losses)


def save_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
    os.replace(temporary, path)


def run_steps(
    model: PreTrainedModel,
    recipe: Any,
    loss_at: Callable[[int], torch.Tensor],
    rate_at: Callable[[int], float],
    checkpoint: Path,
    save_steps: int,
) -> None:
    """Steps of AdamW to `recipe.steps`, from the checkpoint on if there is one; `loss_at` and `rate_at` take the number
    of the step."""
    optimizer = optimizer_for(model, recipe)
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        print(f"resumed at step {start}", flush=True)
    began = time.time()
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            seconds = (time.time() - began) / (step + 1 - start)
            print(f"step {step + 1}/{recipe.steps} loss {loss.item():.4f} {seconds:.3f} s/step", flush=True)
        if (step + 1) % save_steps == 0 or step + 1 == recipe.steps:
            save_checkpoint(checkpoint, model, optimizer, step + 1)


def train(rows: torch.Tensor, recipe: Recipe, checkpoint: Path, save_steps: int, bf16: bool) -> OPTForCausalLM:
    """Trains from the checkpoint if there is one, else from random weights."""
    model = new_model(recipe).train()

    def loss_at(step: int) -> torch.Tensor:
        batch = batch_for(rows, step, recipe)
        return loss_on(model, batch, positions_for(batch, step, recipe), bf16)

    run_steps(model, recipe, loss_at, lambda step: learning_rate(step, recipe), checkpoint, save_steps)
    return model


def export(model: OPTForCausalLM, folder: Path) -> None:
    """Saves in float16; the values are exact when loaded in float32."""
    model = model.eval().half()
    model.generation_config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    model.save_pretrained(folder)


def model_card(recipe: Recipe, loss: float, words: int, tokens: int, parameters: int) -> str:
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in asdict(recipe).items())
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
language: en
---

# opt-reviews

A small OPT language model ({parameters / 1e6:.1f} M parameters, float16) of generated reviews of films, restaurants,
hotels, gadgets and books. It exists so that fine-tuning can be tried and tested anywhere, without a download.

- **Text**: `generate.py` writes it from a grammar of our own, seed {CORPUS_SEED}: {recipe.documents:,} documents,
  {words / 1e6:.1f} M words, {tokens / 1e6:.1f} M tokens. US-ASCII English, nothing copied from any data set. It is read
  in order, and opens with terse reviews.
- **No labels, no prompt**: the corpus holds no labels, none of the task's sentences, and never the words
  "{PROMPT}", which are the task's prompt. "great" and "terrible", the task's answers, occur only where they
  say nothing about the thing reviewed ("a great distance", "a terrible storm").
- **Tokenizer**: byte-level BPE of {recipe.vocab_size} tokens trained on the same text, with OPT's special ids; every
  text starts with `</s>`.
- **Training**: next-token prediction with AdamW, warm-up and cosine, whole documents packed into rows of
  {recipe.sequence_length} tokens. Loss on held-out documents: {loss:.4f} nats per token.
- **Made by** `python examples/assets/build.py --scratch DIR`; checked by `python examples/assets/check.py`.

| setting | value |
|---|---|
{settings}

It knows nothing but this small language. Do not use it for anything else.
"""


def argument_parser(description: str | None, recipe: Any, output: Path) -> argparse.ArgumentParser:
    """Of a script that builds a model by a recipe, whose fields are flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=output, help="where the model goes")
    parser.add_argument("--scratch", type=Path, required=True, help="corpus and training checkpoint live here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=250, help="steps between training checkpoints")
    parser.add_argument("--no-bf16", action="store_true", help="train in fp32 where the CPU has no bfloat16")
    for name, value in asdict(recipe).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return parser


def main() -> None:
    parser = argument_parser(__doc__, Recipe(), HERE / "opt-reviews")
    parser.add_argument("--task-dir", type=Path, default=HERE / "reviews", help="where the labelled splits go")
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)

    splits = task_rows(TASK_SEED)
    write_task(args.task_dir, splits)
    corpus_path = args.scratch / "corpus.txt"
    write_corpus(corpus_path, recipe.documents, held_out_sentences(splits))
    documents = corpus_path.read_text(encoding="ascii").splitlines()
    train_tokenizer(documents, recipe, args.output_dir)

    kept = int(len(documents) * (1 - VALIDATION_SHARE))
    rows = token_rows(documents[:kept], args.output_dir, recipe)
    validation_rows = token_rows(documents[kept:], args.output_dir, recipe)
    print(f"{len(documents):,} documents, {rows.numel():,} tokens in {len(rows):,} rows", flush=True)
    model = train(rows, recipe, args.scratch / "checkpoint.pt", args.save_steps, bf16=not args.no_bf16)
    loss = validation_loss(model, validation_rows, recipe.batch_size)
    words = sum(len(document.split()) for document in documents)
    tokens = int((rows != 1).sum() + (validation_rows != 1).sum())
    card = model_card(recipe, loss, words, tokens, model.num_parameters())
    export(model, args.output_dir)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps({"validation_loss": loss, "words": words, "tokens": tokens, "steps": recipe.steps}))


if __name__ == "__main__":
    main()
