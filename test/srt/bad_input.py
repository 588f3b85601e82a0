"""Kinds of bad input, each with what a server has to say to it.

What is expected of an answer is its status, and ``param``, ``code`` and a part of ``message`` of its error. Names in
braces stand for ids of jobs, by their state, and of a file in use.
"""

import json
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
Expected = tuple[int, str | None, str, str]

MIB = 1 << 20
ROW = {"prompt": "the plot is thin. It was", "options": [" terrible", " great"], "label": 0}
JOB = {
    "invocation": " It was",
    "learning_rate": 1e-3,
    "num_perturbations": 1,
    "estimator": "two_sided",
    "scale_by_loss_std": False,
    "zo_eps": 3e-3,
    "clip_projected_grad": 1.0,
    "max_tokens_per_batch": 32,
}

REFUSED_FLAGS = {
    "--dp-size 2": "--enable-mezo needs dp_size=1, not 2",
    "--page-size 16": "--enable-mezo needs page_size=1, not 16",
    "--mezo-share 2": "--mezo-share=2.0 is not allowed: at least 0 and below 1",
    "--mezo-dir /dev/null/mezo": "--mezo-dir='/dev/null/mezo' is not allowed: a folder that can be made (Not a "
    "directory)",
    "--mezo-on-restart maybe": "--mezo-on-restart='maybe' is not allowed: one of resume, fail",
    "--model-path gpt2": "architectures='GPT2LMHeadModel' is not allowed: the families that can be trained are "
    "BERT, Cohere, ",
    "--mezo-rewards best=nowhere:function": "reward='nowhere:function' is not allowed: module:function "
    "(ModuleNotFoundError: No module named 'nowhere')",
    f"--model-path {ASSETS / 'roberta-reviews'}": "architectures='RobertaForMaskedLM' is not allowed: a model that "
    "generates text; masked language models are trained offline",
}
"""What ends a start; ``gpt2`` is a folder with a model of that family."""


def supervised(**hyperparameters) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


# --- uploads ---------------------------------------------------------------------------------------------------------


def form(*parts: tuple[str, str | None, bytes], end: bytes = b"--edge--\r\n") -> bytes:
    body = b""
    for name, filename, content in parts:
        disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
        body += f"--edge\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + content + b"\r\n"
    return body + end


PURPOSE, FILE = ("purpose", None, b"fine-tune"), ("file", "rows.jsonl", json.dumps(ROW).encode())
FORM = "multipart/form-data; boundary=edge"
UPLOADS: dict[str, tuple[bytes, str, Expected]] = {
    "another purpose": (
        form(("purpose", None, b"batch"), FILE),
        FORM,
        (400, "purpose", "invalid_value", "purpose='batch' is not allowed: fine-tune"),
    ),
    "two files": (form(PURPOSE, FILE, FILE), FORM, (400, "file", "invalid_form", "more than one file")),
    "no file": (form(PURPOSE), FORM, (400, "file", "invalid_form", "has no file")),
    "no purpose": (form(FILE), FORM, (400, "purpose", "invalid_form", "has no purpose")),
    "an empty file": (
        form(PURPOSE, ("file", "a.jsonl", b"")),
        FORM,
        (400, "file", "invalid_form", "'a.jsonl' is empty"),
    ),
    "a file without a name": (
        form(PURPOSE, ("file", None, b"x")),
        FORM,
        (400, "file", "invalid_form", "without a filename"),
    ),
    "a name of 256 characters": (
        form(PURPOSE, ("file", "n" * 256, b"x")),
        FORM,
        (400, "file", "invalid_form", "has 256 characters"),
    ),
    "another field": (
        form(PURPOSE, ("path", None, b"/etc"), FILE),
        FORM,
        (400, "path", "invalid_form", "not supported"),
    ),
    "cut short": (form(PURPOSE, FILE, end=b""), FORM, (400, None, "invalid_form", "ends before its last boundary")),
    "no form": (b"{}", "application/json", (400, "Content-Type", "invalid_form", "multipart/form-data")),
    "no boundary": (
        form(PURPOSE, FILE),
        "multipart/form-data",
        (400, "Content-Type", "invalid_form", "multipart/form-data"),
    ),
    "one byte too many": (
        form(PURPOSE, ("file", "a", b"x" * (MIB + 1))),
        FORM,
        (413, "file", "file_too_large", f"at most {MIB} bytes"),
    ),
    "far too many bytes": (
        form(PURPOSE, ("file", "a", b"x" * 3 * MIB)),
        FORM,
        (413, "file", "file_too_large", f"at most {MIB} bytes"),
    ),
}

# --- rows of files ---------------------------------------------------------------------------------------------------


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": [*messages, {"role": "assistant", "content": " great"}]}


ROWS: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "broken JSON": (b'{"prompt": "a", ', "not JSON: Expecting property name"),
    "not UTF-8": (b'{"text": "caf\xe9"}', "not JSON: 'utf-8' codec can't decode byte 0xe9"),
    "half of a surrogate pair": (b'{"text": "\\ud800"}', "text is no Unicode text"),
    "no object": (b"[1, 2]", "a JSON object is needed, not list"),
    "not a number": (b'{"text": NaN}', "text=nan must be a non-empty string"),
    "a number of 5000 digits": (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
    "deeply nested": (b'{"text": ' + b"[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    "unknown form": ({"question": "?", "answer": "!"}, "columns ['answer', 'question'] have none of the forms"),
    "a column of ours": ({"__broken__": 5}, "columns ['__broken__'] have none of the forms"),
    "another form in the midst": (
        {"prompt": "all right. It was", "completion": " great"},
        "one option leaves nothing to choose from",
    ),
    "one option": (ROW | {"options": [" great"]}, "one option leaves nothing to choose from"),
    "no options": (ROW | {"options": []}, "options=[]: at least one is needed"),
    "an empty option": (ROW | {"options": [" great", ""]}, "none may be empty"),
    "an option no string": (ROW | {"options": [" great", 5]}, "options=[' great', 5] must be a list of strings"),
    "too many options": (ROW | {"options": [" great"] * 129}, "129 options are too many: at most 128"),
    "100,000 options": (ROW | {"options": [" a"] * 100_000}, "100000 options are too many: at most 128"),
    "options too long together": (
        ROW | {"prompt": "all right. It was", "options": [f" {i}" + " good film" * 25 for i in range(100)]},
        "its 100 options take 10011 tokens in one forward pass, and at most 8192 go into one",
    ),
    "two options the same": (
        ROW | {"options": [" great", " great"]},
        "options[0]=' great' and options[1]=' great' are the same tokens",
    ),
    "label out of range": (ROW | {"label": 2}, "label=2 must be an index of the 2 options"),
    "label negative": (ROW | {"label": -1}, "label=-1 must be an index"),
    "label a boolean": (ROW | {"label": True}, "label=True must be an index"),
    "label a long text": (ROW | {"label": "x" * 500_000}, "label='xxx"),
    "label missing": ({"prompt": "a", "options": [" a", " b"]}, "columns ['options', 'prompt'] have none of the forms"),
    "prompt longer than the context": (
        ROW | {"prompt": "good " * 600 + "It was"},
        "tokens and an option are more than the context of 512",
    ),
    "option longer than the context": (
        ROW | {"options": [" good" * 600, " bad"]},
        "tokens are more than the context of 512",
    ),
    "invocation missing": (ROW | {"prompt": "the plot is thin."}, "the prompt does not hold the invocation tokens"),
    "messages no list": ({"messages": "hello"}, "messages must be a list"),
    "message no object": (chat("hello"), "messages[0]='hello' must be an object with a role and a content"),
    "message without a role": (
        chat({"content": "hello"}),
        "messages[0]={'content': 'hello'} must be an object with a role",
    ),
    "message with a number": (chat({"role": "user", "content": 5}), "messages[0].content=5 must be a string"),
    "no answer": ({"messages": [{"role": "user", "content": "a"}] * 2}, "ends with an assistant message"),
}

# --- jobs ------------------------------------------------------------------------------------------------------------

PLACE = "method.supervised.hyperparameters"


def hyperparameter(name: str, value: Any, allowed: str, code: str = "invalid_value") -> tuple[dict[str, Any], Expected]:
    return {"method": supervised(**JOB | {name: value})}, (400, f"{PLACE}.{name}", code, allowed)


def suffix(value: str, allowed: str, status: int = 400, code: str = "invalid_value") -> tuple[dict[str, Any], Expected]:
    return {"suffix": value}, (status, "suffix", code, allowed)


LETTERS = "1 to 64 letters, digits, '.', '_' or '-', a letter or digit first"
JOBS: dict[str, tuple[dict[str, Any], Expected]] = {
    "model of 500,000 characters": ({"model": "m" * 500_000}, (404, "model", "model_not_found", "does not exist")),
    "model a number": ({"model": 5}, (400, "model", "invalid_value", "model=5 is not allowed: a valid string")),
    "unknown training file": (
        {"training_file": "file-0"},
        (404, "training_file", "not_found", "no such file: 'file-0'"),
    ),
    "unknown validation file": (
        {"validation_file": "file-0"},
        (404, "validation_file", "not_found", "no such file: 'file-0'"),
    ),
    "a path for a file": (
        {"training_file": "../mezo.sqlite"},
        (404, "training_file", "not_found", "no such file: '../mezo.sqlite'"),
    ),
    "an unknown field": ({"epochs": 3}, (400, "epochs", "unknown_parameter", "not supported here: epochs")),
    "many unknown fields": ({f"x{i}": i for i in range(20_000)}, (400, "x0", "unknown_parameter", "x9, ...")),
    "seed negative": ({"seed": -1}, (400, "seed", "invalid_value", "seed=-1 is not allowed")),
    "seed beyond 63 bits": ({"seed": 2**63}, (400, "seed", "invalid_value", "is not allowed")),
    "metadata a list": ({"metadata": []}, (400, "metadata", "invalid_value", "a valid dictionary")),
    "metadata of 17 pairs": (
        {"metadata": {str(i): "v" for i in range(17)}},
        (400, "metadata", "invalid_value", "at most 16 items"),
    ),
    "metadata value too long": (
        {"metadata": {"k": "v" * 513}},
        (400, "metadata.k", "invalid_value", "at most 512 characters"),
    ),
    "metadata value a number": ({"metadata": {"k": 1}}, (400, "metadata.k", "invalid_value", "a valid string")),
    "another method": ({"method": {"type": "dpo"}}, (400, "method.type", "invalid_value", "'supervised'")),
    "method without type": ({"method": {}}, (400, "method.type", "missing_parameter", "method.type is missing")),
    "integrations": ({"integrations": [{"type": "wandb"}]}, (400, "integrations", "unsupported", "are not supported")),
    "n_epochs a string": hyperparameter("n_epochs", "3", "n_epochs='3' is not allowed: a whole number, or \"auto\""),
    "learning_rate a boolean": hyperparameter("learning_rate", True, "learning_rate=True is not allowed: a number"),
    "learning_rate huge": hyperparameter("learning_rate", 1e300, "at most 1000000"),
    "lora_alpha huge": hyperparameter("lora_alpha", 1e300, "at most 1000000"),
    "zo_eps negative": hyperparameter("zo_eps", -1e-3, "a positive number"),
    "zo_eps tiny": hyperparameter("zo_eps", 1e-320, "at least 1e-12"),
    "max_steps huge": hyperparameter("max_steps", 10**12, "from 1 to 1000000000"),
    "n_epochs beyond 63 bits": hyperparameter("n_epochs", 2**63, "from 1 to 1000000000"),
    "eval_steps beyond 64 bits": hyperparameter("eval_steps", 2**64, "a whole number"),
    "batch_size huge": hyperparameter("batch_size", 4097, "from 1 to 4096"),
    "a step of 16,000 examples": hyperparameter(
        "gradient_accumulation_steps", 1000, "from 1 to 256, as a step takes 4096 examples"
    ),
    "a pass of all tokens": hyperparameter("max_tokens_per_batch", 20000, "from 1 to 8192"),
    "r above --max-lora-rank": hyperparameter(
        "r", 17, "r=17 is not allowed: from 1 to 16, the server's --max-lora-rank"
    ),
    "too many directions": hyperparameter("num_perturbations", 65, "at most 64"),
    "invocation for ordinary LoRA": (
        {"method": supervised(**JOB, tuning="lora")},
        (400, f"{PLACE}.invocation", "invalid_value", "null"),
    ),
    "no modules": hyperparameter(
        "target_modules", None, 'target_modules=None is not allowed: a list of strings, or "auto"'
    ),
    "a deep list": hyperparameter("target_modules", json.loads("[" * 200 + "]" * 200), "a list of strings"),
    "unknown hyperparameter": hyperparameter(
        "epsilon", 1, "is not a hyperparameter; there are n_epochs, ", "unknown_parameter"
    ),
    **{
        name: hyperparameter(name, "/x", "is not a hyperparameter", "unknown_parameter")
        for name in ("output_dir", "resume_from_checkpoint", "base_model", "report_to", "../x")
    },
    "suffix empty": suffix("", "at least 1 character"),
    "suffix of 65 characters": suffix("a" * 65, "at most 64 characters"),
}

NAMED_JOBS: dict[str, tuple[dict[str, Any], Expected]] = {
    "unknown module": hyperparameter("target_modules", ["fc1"], "some of k_proj, out_proj, q_proj, v_proj"),
    "unknown model": (
        {"model": "gpt-4"},
        (404, "model", "model_not_found", "'gpt-4' does not exist: this server trains 'reviews-model'"),
    ),
    "no fine-tuned model": ({"model": "reviews-model:nobody"}, (404, "model", "model_not_found", "does not exist")),
    "another rank than the adapter's": (
        {"model": "reviews-model:done", "method": supervised(**JOB, r=2)},
        (400, f"{PLACE}.r", "invalid_value", "8, as the adapter has it"),
    ),
    "another invocation than the adapter's": (
        {"model": "reviews-model:done", "method": supervised(**JOB | {"invocation": " good"})},
        (400, f"{PLACE}.invocation", "invalid_value", "' It was', as the adapter has it"),
    ),
    "suffix of a running job": suffix("running", "suffix='running' is not allowed: job ftjob-", 409, "name_taken"),
    "suffix of a finished job": suffix("done", "suffix='done' is not allowed: job ftjob-", 409, "name_taken"),
    "suffix of a loaded adapter": suffix(
        "foreign", "suffix='foreign' is not allowed: an adapter that is served", 409, "name_taken"
    ),
    "suffix a path": suffix("../../x", LETTERS),
    "suffix with NUL": suffix("a\0b", LETTERS),
}
"""Of a server that serves ``reviews-model``, an OPT, with jobs in each state."""

BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "the body is not JSON"),
    "no JSON": (b"{", 400, "the body is not JSON"),
    "no object": (b"[]", 400, "the body must be a JSON object, not list"),
    "null": (b"null", 400, "the body must be a JSON object, not NoneType"),
    "not UTF-8": (b'{"model": "\xff"}', 400, "the body is not JSON"),
    "half of a surrogate pair": (b'{"model": "\\ud800"}', 400, "the body is not JSON"),
    "NaN": (b'{"model": "m", "training_file": "f", "seed": NaN}', 400, "the body is not JSON"),
    "Infinity": (b'{"hyperparameters": {"learning_rate": Infinity}}', 400, "the body is not JSON"),
    "beyond float64": (b'{"hyperparameters": {"learning_rate": 1e400}}', 400, "the body is not JSON"),
    "100,000 brackets": (b"[" * 100_000, 400, "the body is not JSON"),
    "nested 1000 times": (
        b'{"rows": [{"text": ' + b"[" * 1000 + b"]" * 1000 + b"}]}",
        400,
        "the body is nested too deeply",
    ),
    "longer than a body may be": (b'{"model": "' + b"x" * 5 * MIB + b'"}', 413, f"at most {MIB} bytes are taken"),
}


def check(status: int, error: dict[str, Any], *expected: *Expected) -> None:
    expected_status, param, code, message = expected
    assert (status, error["param"], error["code"]) == (expected_status, param, code), error
    assert error["type"] == "invalid_request_error" and message in error["message"] and len(error["message"]) < 1000


def few(kinds: dict[str, Any]) -> list[str]:
    """Five kinds from all over a table: for a real server, where each other test has all of them."""
    names = list(kinds)
    return names[:: -(-len(names) // 5)]
