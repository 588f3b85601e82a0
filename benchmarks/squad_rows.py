"""SQuAD's rows as prompts and answers, for ``--objective f1``, in the form of the MeZO paper.

python benchmarks/squad_rows.py rajpurkar/squad data/squad-prompts --most_characters 700
"""

import argparse
import json
from pathlib import Path

from sglang.srt.mezo.data.rows import read_rows

INVOCATION = "\nAnswer:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="hub name, or a folder with a file for each split")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--most_characters", type=int, default=2000, help="longer contexts are left out")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True)
    for split in ("train", "validation"):
        rows = [row.fields for row in read_rows(arguments.dataset, split)]
        lines = [json.dumps(prompted(row)) for row in rows if len(row["context"]) <= arguments.most_characters]
        (arguments.output / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{split}: {len(lines)} of {len(rows)} rows")


def prompted(row: dict) -> dict:
    prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}{INVOCATION}"
    return {"prompt": prompt, "answers": row["answers"]["text"]}


if __name__ == "__main__":
    main()
