"""Generate the review corpus and the sentiment task, from a grammar of our own.

Two outputs share one grammar and nothing else. The corpus is plain text for a language model: short reviews
whose sentences agree in their overall sentiment, and neutral text. It carries no labels, and the words of the
task's prompt, "It was", never occur in it. The task is single sentences with a label, as in SST-2.

Opinions are built so that counting kind and unkind words is not enough: a negation turns a word around, the
main clause outweighs the concession, and a strong word outweighs a weak one.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from grammar import Grammar, sentence_case
from lexicon import DOMAINS

HERE = Path(__file__).resolve().parent
PROMPT = "It was"
SPLITS = {"train": 1000, "validation": 300, "test": 600}
MIN_WORDS, MAX_WORDS = 6, 30
TASK_SEED, CORPUS_SEED = 1, 2


def task_rows(seed: int) -> dict[str, list[dict[str, str | int]]]:
    """The labelled splits: balanced, shuffled, no sentence twice."""
    rng = random.Random(seed)
    seen: set[str] = set()
    splits = {}
    for split, size in SPLITS.items():
        labels = [index % 2 for index in range(size)]
        rng.shuffle(labels)
        splits[split] = [
            {"sentence": task_sentence(rng, label, seen), "label": label, "idx": index}
            for index, label in enumerate(labels)
        ]
    return splits


def task_sentence(rng: random.Random, label: int, seen: set[str]) -> str:
    while True:
        sentence = Grammar(rng, rng.choice(DOMAINS)).opinion(2 * label - 1) + "."
        if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and sentence not in seen:
            seen.add(sentence)
            return sentence


def contains_any(document: str, sentences: set[str]) -> bool:
    """Whether a task sentence occurs in the document, alone or as the end of a longer sentence."""
    for sentence in document.lower().split("."):
        words = sentence.split()
        if any(" ".join(words[start:]) + "." in sentences for start in range(len(words))):
            return True
    return False


def note_share(progress: float) -> float:
    """Plain words before artful ones: the corpus opens with terse reviews, and is read in order."""
    return max(0.25, 1.0 - 7.5 * max(0.0, progress - 0.05))


def corpus(seed: int, documents: int, held_out: set[str]) -> Iterator[str]:
    """Documents for the language model, in the order of reading; none holds a sentence of `held_out` or the prompt."""
    rng = random.Random(seed)
    produced = 0
    while produced < documents:
        grammar = Grammar(rng, rng.choice(DOMAINS))
        sentences = grammar.document(note_share(produced / documents))
        careful = rng.random() < 0.3  # careful writers begin every sentence with a capital letter
        document = " ".join(sentence_case(s) if careful or rng.random() < 0.2 else s for s in sentences)
        if contains_any(document, held_out) or PROMPT in document:
            continue
        assert document.isascii()
        produced += 1
        yield document


def held_out_sentences(splits: dict[str, list[dict[str, str | int]]]) -> set[str]:
    return {str(row["sentence"]) for rows in splits.values() for row in rows}


def write_task(folder: Path, splits: dict[str, list[dict[str, str | int]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="ascii")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task-dir", type=Path, default=HERE / "reviews", help="where the labelled splits go")
    parser.add_argument("--corpus", type=Path, help="also write the language-model corpus to this file")
    parser.add_argument("--documents", type=int, default=100_000, help="documents in the corpus")
    args = parser.parse_args()
    splits = task_rows(TASK_SEED)
    write_task(args.task_dir, splits)
    print(f"task: {', '.join(f'{split} {len(rows)}' for split, rows in splits.items())} rows in {args.task_dir}")
    if args.corpus:
        with args.corpus.open("w", encoding="ascii") as file:
            for document in corpus(CORPUS_SEED, args.documents, held_out_sentences(splits)):
                file.write(document + "\n")
        print(f"corpus: {args.documents} documents, {args.corpus.stat().st_size:,} bytes in {args.corpus}")


if __name__ == "__main__":
    main()
