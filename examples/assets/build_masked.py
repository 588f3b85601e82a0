"""Build the embedded masked language model from nothing: the twin of `build.py`'s, of the same reviews.

It learns to fill in words that are masked, and sees no label and no task prompt either. The two words that the task
chooses between it never has to guess, and in the end they are made words that it does not know: else it could do the
task by itself. It begins with what its twin knows of single words, as it takes far longer to find by itself which of
them agree. The run is resumable: a second call
with the same scratch directory continues at the last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from build import (
    BOS,
    EOS,
    IGNORED,
    PAD,
    UNK,
    VALIDATION_SHARE,
    VERBALIZERS,
    argument_parser,
    batch_for,
    byte_level_bpe,
    run_steps,
    write_corpus,
)
from generate import CORPUS_SEED, HERE, PROMPT, TASK_SEED, held_out_sentences, task_rows
from tokenizers import AddedToken, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

MASK = "<mask>"  # the last id, as in FacebookAI/roberta-large
PAD_ID = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; written into the model card."""

    documents: int = 140_000
    vocab_size: int = 1726  # every word of the corpus is one token then
    hidden_size: int = 128
    num_hidden_layers: int = 4
    initializer_range: float = 0.06  # with RoBERTa's 0.02 a model this narrow takes far longer to learn from context
    num_attention_heads: int = 4
    intermediate_size: int = 512
    longest_text: int = 512
    sequence_length: int = 128
    masked: float = 0.4
    batch_size: int = 8
    steps: int = 8_000
    warmup_steps: int = 100
    cooldown_steps: int = 1_500
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0


def train_tokenizer(documents: list[str], recipe: Recipe, folder: Path) -> None:
    """A byte-level BPE that, like RoBERTa's, puts a text between "<s>" and "</s>"; a mask takes the space before it."""
    tokenizer = byte_level_bpe(documents, recipe.vocab_size - 1)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", special_tokens=[(one, tokenizer.token_to_id(one)) for one in (BOS, EOS)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        cls_token=BOS,
        eos_token=EOS,
        sep_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        mask_token=AddedToken(MASK, lstrip=True, special=True),
        model_max_length=recipe.longest_text,
    ).save_pretrained(folder)
    check_tokenizer(folder, recipe)


def check_tokenizer(folder: Path, recipe: Recipe) -> None:
    """What the task relies on: RoBERTa's special ids, and single tokens for the prompt and the verbalizers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids([BOS, PAD, EOS, UNK, MASK])
    assert ids == [0, 1, 2, 3, recipe.vocab_size - 1] and len(tokenizer) == recipe.vocab_size, ids
    pieces = tokenizer.convert_ids_to_tokens(tokenizer(f"the plot is thin. {PROMPT}{MASK}.").input_ids)
    assert pieces[0] == BOS and pieces[-5:] == ["ĠIt", "Ġwas", MASK, ".", EOS], pieces
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in VERBALIZERS)


def pack(documents: list[list[int]], length: int) -> torch.Tensor:
    """Rows [num_rows, length] of whole documents, each between "<s>" and "</s>"."""
    rows: list[list[int]] = [[]]
    for document in documents:
        if len(rows[-1]) + len(document) > length:
            rows.append([])
        rows[-1] += document[:length]
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in rows])


def new_model(recipe: Recipe) -> RobertaForMaskedLM:
    torch.manual_seed(recipe.seed)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            intermediate_size=recipe.intermediate_size,
            max_position_embeddings=recipe.longest_text + PAD_ID + 1,
            initializer_range=recipe.initializer_range,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            bos_token_id=0,
            pad_token_id=PAD_ID,
            eos_token_id=2,
            attn_implementation="eager",  # on a CPU the backward pass of the others takes as long as all the rest
        )
    )


def known_words(twin: Path, recipe: Recipe) -> torch.Tensor:
    """[vocab_size - 1, hidden_size]: the twin's word embeddings by their principal components, but for the first, in
    which all words are alike."""
    embeddings = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).get_input_embeddings().weight.detach()
    embeddings = embeddings[: recipe.vocab_size - 1]
    u, s, _ = torch.linalg.svd(embeddings - embeddings.mean(0), full_matrices=False)
    known = (u * s)[:, 1 : 1 + recipe.hidden_size]
    return known * (recipe.initializer_range / known.std())


def require_same_words(twin: Path, folder: Path, recipe: Recipe) -> None:
    ids = list(range(recipe.vocab_size - 1))
    ours, theirs = (AutoTokenizer.from_pretrained(one).convert_ids_to_tokens(ids) for one in (folder, twin))
    assert ours == theirs, "the twin has other tokens"


def masked(
    rows: torch.Tensor, unasked: torch.Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with some of their words masked, none of the `unasked` ones, and what these are, as labels."""
    mask = recipe.vocab_size - 1
    chosen = (torch.rand(rows.shape, generator=generator) < recipe.masked) & (rows > 3) & ~torch.isin(rows, unasked)
    return rows.masked_fill(chosen, mask), rows.masked_fill(~chosen, IGNORED)


def positions_of(rows: torch.Tensor, recipe: Recipe, generator: torch.Generator | None) -> torch.Tensor:
    """Position ids like `rows`, which count from every "<s>"; a quarter of the rows begin late, so that no position
    stays untrained."""
    places = torch.arange(rows.shape[1]).expand_as(rows)
    positions = places - places.where(rows == 0, 0).cummax(1).values + PAD_ID + 1
    if generator is not None:
        starts = torch.randint(0, recipe.longest_text - recipe.sequence_length + 1, (len(rows), 1), generator=generator)
        starts[torch.rand(len(rows), generator=generator) > 0.25] = 0
        positions = positions + starts
    return positions


def loss_on(
    model: RobertaForMaskedLM, rows: torch.Tensor, unasked: torch.Tensor, recipe: Recipe, seed: int, late: bool
) -> torch.Tensor:
    """A document attends to itself alone."""
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = masked(rows, unasked, recipe, generator)
    positions = positions_of(rows, recipe, generator if late else None)
    document = (rows == 0).cumsum(1)
    others = document[:, None, :, None] != document[:, None, None, :]
    alone = torch.zeros(others.shape, dtype=torch.bfloat16).masked_fill(others, torch.finfo(torch.bfloat16).min)
    hidden = model.roberta(inputs, position_ids=positions, attention_mask=alone).last_hidden_state
    read = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[read]).float(), labels[read])


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, and in the end a linear way down to zero."""
    begun, left = (step + 1) / recipe.warmup_steps, (recipe.steps - step) / recipe.cooldown_steps
    return recipe.learning_rate * min(1.0, begun, left)


@torch.no_grad()
def validation_loss(model: RobertaForMaskedLM, rows: torch.Tensor, unasked: torch.Tensor, recipe: Recipe) -> float:
    """Mean over batches of the loss per masked token, in fp32."""
    model.eval()
    parts = rows.split(recipe.batch_size)
    losses = [loss_on(model, part, unasked, recipe, number, late=False).item() for number, part in enumerate(parts)]
    model.train()
    return sum(losses) / len(losses)


def train(
    rows: torch.Tensor,
    unasked: torch.Tensor,
    words: torch.Tensor,
    recipe: Recipe,
    checkpoint: Path,
    save_steps: int,
    bf16: bool,
) -> RobertaForMaskedLM:
    """Trains from the checkpoint if there is one, else from `words` and random weights; the corpus in its own order,
    again if it ends, with other words masked."""
    model = new_model(recipe).train()
    model.get_input_embeddings().weight.data[: len(words)] = words

    def loss_at(step: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return loss_on(model, batch_for(rows, step, recipe), unasked, recipe, recipe.seed + step, late=True)

    run_steps(model, recipe, loss_at, lambda step: learning_rate(step, recipe), checkpoint, save_steps)
    return model


def forget(model: RobertaForMaskedLM, words: torch.Tensor, recipe: Recipe) -> None:
    """Let words be as if they had never been read."""
    embeddings, bias = model.get_input_embeddings().weight.data, model.lm_head.bias.data
    noise = torch.randn(len(words), recipe.hidden_size, generator=torch.Generator().manual_seed(recipe.seed))
    embeddings[words] = noise * embeddings.std()
    bias[words] = bias.mean()


def model_card(recipe: Recipe, bf16: bool, loss: float, tokens: int, parameters: int) -> str:
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in asdict(recipe).items())
    return f"""---
license: apache-2.0
pipeline_tag: fill-mask
language: en
---

# roberta-reviews

A small RoBERTa ({parameters / 1e6:.1f} M parameters, float16) of generated reviews, the masked twin of
[opt-reviews](../opt-reviews/README.md), whose text it has read: {recipe.documents:,} documents from a grammar of our
own, seed {CORPUS_SEED}, {tokens / 1e6:.1f} M tokens, without labels, without the task's sentences and without the words
"{PROMPT}", which are the task's prompt.

- **Tokenizer**: byte-level BPE of {recipe.vocab_size} tokens trained on the same text, with RoBERTa's special ids;
  `<mask>` is the last.
- **Start**: random weights, but for the word embeddings, which are the twin's by their principal components.
- **Training**: {recipe.masked:.0%} of the words masked, but never those that the task chooses between, AdamW, warm-up
  and cool-down, whole documents packed into rows of {recipe.sequence_length} tokens, each attending to itself alone.
  Loss on held-out documents: {loss:.4f} nats per masked token. In the end those two words got random embeddings: what
  they mean is left to be learned.
- **Made by** `python examples/assets/build_masked.py --scratch DIR{"" if bf16 else " --no-bf16"}`.

| setting | value |
|---|---|
{settings}

It knows nothing but this small language. Do not use it for anything else.
"""


def main() -> None:
    parser = argument_parser(__doc__, Recipe(), HERE / "roberta-reviews")
    parser.add_argument("--twin", type=Path, default=HERE / "opt-reviews", help="whose words it begins with")
    args = parser.parse_args()
    recipe = Recipe(**{name: getattr(args, name) for name in asdict(Recipe())})
    torch.set_num_threads(args.threads)
    args.scratch.mkdir(parents=True, exist_ok=True)

    corpus_path = args.scratch / "corpus.txt"
    write_corpus(corpus_path, recipe.documents, held_out_sentences(task_rows(TASK_SEED)))
    documents = corpus_path.read_text(encoding="ascii").splitlines()
    train_tokenizer(documents, recipe, args.output_dir)
    require_same_words(args.twin, args.output_dir, recipe)
    tokenizer = AutoTokenizer.from_pretrained(args.output_dir)
    encoded = tokenizer(documents).input_ids
    unasked = torch.tensor(tokenizer(list(VERBALIZERS), add_special_tokens=False).input_ids).flatten()
    kept = int(len(documents) * (1 - VALIDATION_SHARE))
    rows, validation_rows = (pack(part, recipe.sequence_length) for part in (encoded[:kept], encoded[kept:]))
    print(f"{len(documents):,} documents, {rows.numel():,} tokens in {len(rows):,} rows", flush=True)
    words = known_words(args.twin, recipe)
    model = train(rows, unasked, words, recipe, args.scratch / "masked.pt", args.save_steps, bf16=not args.no_bf16)
    loss = validation_loss(model, validation_rows, unasked, recipe)
    forget(model, unasked, recipe)
    model.eval().half().save_pretrained(args.output_dir)
    card = model_card(recipe, not args.no_bf16, loss, sum(map(len, encoded)), model.num_parameters())
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(json.dumps({"validation_loss": loss, "steps": recipe.steps}))


if __name__ == "__main__":
    main()
