"""Fine-tune an adapter inside a running server, with nothing but the official OpenAI client.

    sglang-mezo serve --model-path examples/assets/opt-reviews --dtype float32 &     # the server, on port 30000
    python examples/finetune_in_server.py                                            # embedded task, a minute
    python examples/finetune_in_server.py --train rows.jsonl --suffix mine --hyperparameters '{"learning_rate": 1e-3}'

Files hold one JSON object a line: {"prompt", "options", "label"}, {"prompt", "completion"} or {"messages"}.
"""

import argparse
import io
import json
import sys
import time
from pathlib import Path

from openai import OpenAI, OpenAIError

REVIEWS = Path(__file__).parent / "assets" / "reviews"
EMBEDDED = {"invocation": " It was"}
"""Hyperparameters for the model and the task that the repository carries."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}\n")  # in one line, without the usage


def main() -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:30000/v1")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--train", type=Path, help="training file; the embedded task's by default")
    parser.add_argument("--validation", type=Path, help="validation file")
    parser.add_argument("--suffix", default="reviews", help="name of the adapter")
    parser.add_argument("--hyperparameters", type=json_object, help="JSON object")
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.base_url, api_key=arguments.api_key)
    try:
        return finetune(client, arguments)
    except (OpenAIError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def json_object(text: str) -> dict:
    if isinstance(value := json.loads(text), dict):
        return value
    raise ValueError


def finetune(client: OpenAI, arguments: argparse.Namespace) -> int:
    embedded = arguments.train is None
    train = embedded_file("train") if embedded else arguments.train.open("rb")
    validation = embedded_file("validation") if embedded else arguments.validation and arguments.validation.open("rb")
    hyperparameters = (EMBEDDED if embedded else {}) | (arguments.hyperparameters or {})
    model = client.models.list().data[0].id
    files = {"training_file": client.files.create(file=train, purpose="fine-tune").id}
    if validation:
        files["validation_file"] = client.files.create(file=validation, purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(
        model=model,
        suffix=arguments.suffix,
        **files,
        method={"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
    )
    job = follow(client, job.id)
    if job.status != "succeeded":
        print(f"{job.id} {job.status}: {job.error.message if job.error else ''}", file=sys.stderr)
        return 1
    print(f"\n{job.fine_tuned_model} is served:")
    if embedded:
        for text in ("the acting is superb. It was", "the plot is thin and the cast is awful. It was"):
            answer = client.completions.create(model=job.fine_tuned_model, prompt=text, max_tokens=1, temperature=0)
            print(f"  {text}{answer.choices[0].text}")
    return 0


def follow(client: OpenAI, job_id: str):
    """Print the job's events until it ends."""
    seen: set[str] = set()
    while True:
        job = client.fine_tuning.jobs.retrieve(job_id)
        events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        for event in reversed(events):
            if event.id not in seen:
                seen.add(event.id)
                print(event.message, flush=True)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(1)


def embedded_file(split: str) -> tuple[str, io.BytesIO]:
    """The embedded task's rows as prompts with two options."""
    with open(REVIEWS / f"{split}.jsonl") as file:
        rows = [json.loads(line) for line in file]
    lines = [
        {"prompt": f"{row['sentence']} It was", "options": [" terrible", " great"], "label": row["label"]}
        for row in rows
    ]
    return f"{split}.jsonl", io.BytesIO("".join(json.dumps(line) + "\n" for line in lines).encode())


if __name__ == "__main__":
    sys.exit(main())
