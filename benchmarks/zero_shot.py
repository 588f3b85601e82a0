"""Zero-shot predictions of the engine against a plain Transformers loop, row by row, on real rows and a real model.

    python benchmarks/zero_shot.py --model models/smollm2-135m --data data --json benchmarks/results/zero_shot.json

``--data`` is a folder with a folder of files for each task. The loop has no code of ours but the tasks' texts: it
tokenises a prompt and an option together, runs them alone, and takes the mean log-probability of the option's tokens;
answers it writes with ``generate``. A task whose result is there is not run again.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang.srt.mezo.core.integrity import write_json
from sglang.srt.mezo.data.tasks import TASKS, Task, TextExample, final
from sglang.srt.mezo.engine.ranks import FIRST
from sglang.srt.mezo.training.evaluate import EvaluateArguments, evaluation_engine, measure_on, read_evaluation
from sglang.srt.mezo.training.finetune import ModelArguments
from step_time import machine

NEAR = 1e-4  # between two options: which of them is better is then a matter of rounding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {"rows": []}
    wanted = [name for name in arguments.tasks if all(row["task"] != name for row in results["rows"])]
    model = ModelArguments(arguments.model, "float32", max_total_tokens=40_000)
    engine = evaluation_engine(model, None, FIRST) if wanted else None
    plain = Plain(arguments.model)
    for name in wanted:
        settings = EvaluateArguments(
            task=name, dataset=str(arguments.data / name), split=arguments.split, rows=arguments.rows
        )
        asked = read_evaluation(model, settings)
        started = time.perf_counter()
        metrics, told = measure_on(engine, model.model, asked, settings)
        middle = time.perf_counter()
        rows = [row.fields for row, _ in asked.examples]
        found = [plain.answer(TASKS[name], row) for row in rows]
        results["rows"].append(
            {
                "task": name,
                **metrics,
                **compared(told, found),
                "engine_seconds": middle - started,
                "plain_seconds": time.perf_counter() - middle,
            }
        )
        results |= {
            "model": Path(arguments.model).name,
            "dtype": "float32",
            "machine": machine(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads()))),
        }
        write_json(arguments.json, results)
        print(json.dumps(results["rows"][-1]), flush=True)
    print("\n".join(table(results)))
    os._exit(0)  # the engine's threads are of no further use


class Plain:
    def __init__(self, model: str):
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def answer(self, task: Task, row: dict[str, Any]) -> list[float] | str:
        """Scores of the options, or what is written."""
        text = final(task.render(row))
        if task.max_new_tokens is None:
            return [self._score(text, option) for option in text.options]
        ids = self.tokenizer(text.prompt, return_tensors="pt").input_ids
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=task.max_new_tokens, do_sample=False,
            stop_strings=["\n"], tokenizer=self.tokenizer, pad_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()

    def _score(self, text: TextExample, option: str) -> float:
        start = len(self.tokenizer(text.prompt).input_ids)
        ids = self.tokenizer(text.prompt + option, return_tensors="pt").input_ids
        read = self.model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        return read[torch.arange(len(read)), ids[0, start:]].mean().item()


def compared(told: list[dict[str, Any]], found: list[Any]) -> dict[str, Any]:
    """How many predictions are the same, how many differ between options that are as good as alike, and how far
    scores are apart where they are log-probabilities."""
    if isinstance(found[0], str):
        same = sum(one["completion"].strip() == text for one, text in zip(told, found))
        return {"same": same, "near": 0, "apart": None}
    same = near = 0
    apart = 0.0
    for one, scores in zip(told, found):
        best = max(range(len(scores)), key=scores.__getitem__)
        ours = one["prediction"]
        same += ours == best
        near += ours != best and scores[best] - scores[ours] < NEAR
        gaps = [(a - b) - (one["scores"][0] - scores[0]) for a, b in zip(one["scores"], scores)]
        apart = max(apart, *map(abs, gaps))  # of single tokens only differences are read
    return {"same": same, "near": near, "apart": apart}


def table(results: dict[str, Any]) -> list[str]:
    """Of docs/benchmarks.md."""
    lines = [
        "| task | rows | same prediction | differ within rounding | scores apart by | accuracy or F1 |",
        "|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        apart = "-" if row["apart"] is None else f"{row['apart']:.0e}"
        score = row.get("accuracy", row.get("f1"))
        lines.append(f"| {row['task']} | {row['examples']} | {row['same']} | {row['near']} | {apart} | {score:.1%} |")
    return lines


if __name__ == "__main__":
    main()
