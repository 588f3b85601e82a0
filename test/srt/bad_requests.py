"""Requests about jobs, files, models and adapters that cannot be carried out, as ``bad_input`` has the others."""

import shutil
from typing import Any

from bad_input import ROW, Expected
from foreign_adapters import FILES, change_tensors, edit

# --- requests about jobs, files and models ---------------------------------------------------------------------------

STEP = {"zo_random_seed": 1, "projected_grad": [1.0], "learning_rate": 1e-3}
BATCH = {"rows": [ROW], "zo_random_seed": 1}
REQUESTS: list[tuple[str, str, Any, Expected]] = [
    (
        "POST",
        "/v1/fine_tuning/jobs/{cancelled}/cancel",
        None,
        (400, None, "invalid_state", "cannot cancel a job that is cancelled"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/{done}/cancel",
        None,
        (400, None, "invalid_state", "cannot cancel a job that is succeeded"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/{done}/pause",
        None,
        (400, None, "invalid_state", "cannot pause a job that is succeeded"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/{paused}/pause",
        None,
        (400, None, "invalid_state", "cannot pause a job that is paused"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/{running}/resume",
        None,
        (400, None, "invalid_state", "cannot resume a job that is running, only one that is paused"),
    ),
    (
        "POST",
        "/v1/fine_tuning/jobs/ftjob-0/cancel",
        None,
        (404, None, "not_found", "no such fine-tuning job: 'ftjob-0'"),
    ),
    ("GET", "/v1/fine_tuning/jobs/ftjob-0", None, (404, None, "not_found", "no such fine-tuning job: 'ftjob-0'")),
    ("GET", "/v1/fine_tuning/jobs/ftjob-0/events", None, (404, None, "not_found", "no such fine-tuning job")),
    ("GET", "/v1/fine_tuning/jobs/ftjob-0/checkpoints", None, (404, None, "not_found", "no such fine-tuning job")),
    (
        "GET",
        "/v1/fine_tuning/jobs?after=ftjob-0",
        None,
        (404, "after", "not_found", "no such fine-tuning job: 'ftjob-0'"),
    ),
    ("GET", "/v1/fine_tuning/jobs/{done}/events?after={running}", None, (404, "after", "not_found", "no such event")),
    ("GET", "/v1/fine_tuning/jobs?after=%ff%00", None, (404, "after", "not_found", "no such fine-tuning job")),
    (
        "GET",
        "/v1/fine_tuning/jobs?limit=0",
        None,
        (400, "limit", "invalid_value", "limit='0' is not allowed: greater than or equal to 1"),
    ),
    ("GET", "/v1/fine_tuning/jobs?limit=101", None, (400, "limit", "invalid_value", "less than or equal to 100")),
    (
        "GET",
        "/v1/fine_tuning/jobs?limit=ten",
        None,
        (400, "limit", "invalid_value", "limit='ten' is not allowed: a valid integer"),
    ),
    ("GET", f"/v1/fine_tuning/jobs?limit={10**30}", None, (400, "limit", "invalid_value", "less than or equal to 100")),
    ("GET", "/v1/fine_tuning/jobs?metadata=x", None, (400, "metadata", "invalid_value", "metadata='x' is not allowed")),
    (
        "GET",
        "/v1/fine_tuning/jobs?" + "&".join(f"metadata[{i}]=v" for i in range(1200)),
        None,
        (400, "metadata", "invalid_value", "at most 16"),
    ),
    ("GET", "/v1/files?order=up", None, (400, "order", "invalid_value", "'asc' or 'desc'")),
    ("GET", "/v1/files/file-0/content", None, (404, None, "not_found", "no such file: 'file-0'")),
    ("DELETE", "/v1/files/{file}", None, (409, "file_id", "file_in_use", "is in use by job")),
    (
        "DELETE",
        "/v1/models/reviews-model",
        None,
        (404, "model", "model_not_found", "there is no fine-tuned model 'reviews-model'"),
    ),
    (
        "DELETE",
        "/v1/models/reviews-model:deleted",
        None,
        (404, "model", "model_not_found", "there is no fine-tuned model"),
    ),
    (
        "DELETE",
        "/v1/models/reviews-model:foreign",
        None,
        (404, "model", "model_not_found", "there is no fine-tuned model"),
    ),
    (
        "DELETE",
        "/v1/models/reviews-model:done:ckpt-step-1",
        None,
        (400, "model", "invalid_value", "a checkpoint goes with its model"),
    ),
    ("GET", "/v1/models/reviews-model:deleted", None, (404, "model", "model_not_found", "does not exist")),
    (
        "GET",
        f"/mezo/jobs/{{running}}/metrics?after={10**19}",
        None,
        (400, "after", "invalid_value", "less than 2147483648"),
    ),
    ("GET", "/mezo/jobs/ftjob-0/metrics", None, (404, None, "not_found", "no such fine-tuning job")),
    (
        "POST",
        "/mezo/jobs/{done}/examples",
        {"rows": [ROW]},
        (400, None, "invalid_state", "cannot append rows to a job that is succeeded"),
    ),
    ("POST", "/mezo/jobs/{running}/examples", {"rows": []}, (400, "rows", "invalid_value", "at least 1 item")),
    (
        "POST",
        "/mezo/jobs/{running}/examples",
        {"rows": [ROW] * 257},
        (400, "rows", "invalid_value", "at most 256 items"),
    ),
    (
        "POST",
        "/mezo/jobs/{running}/examples",
        {"rows": [1] * 300_000},
        (400, "rows", "invalid_value", "at most 256 items"),
    ),
    ("POST", "/mezo/jobs/{done}/evaluate", BATCH, (409, None, "engine_busy", "job {running} has the engine")),
    ("POST", "/mezo/jobs/{done}/update", STEP, (409, None, "engine_busy", "job {running} has the engine")),
    (
        "POST",
        "/mezo/jobs/{running}/evaluate",
        BATCH,
        (400, None, "invalid_state", "cannot evaluate a job that is running"),
    ),
    ("POST", "/mezo/jobs/{running}/update", STEP, (400, None, "invalid_state", "cannot update a job that is running")),
    (
        "POST",
        "/mezo/jobs/{done}/evaluate",
        BATCH | {"zo_eps": 1e300},
        (400, "zo_eps", "invalid_value", "zo_eps=1e+300 is not allowed"),
    ),
    (
        "POST",
        "/mezo/jobs/{done}/evaluate",
        BATCH | {"zo_random_seed": -1},
        (400, "zo_random_seed", "invalid_value", "greater than or equal to 0"),
    ),
    (
        "POST",
        "/mezo/jobs/{done}/update",
        STEP | {"projected_grad": [1.0, 2.0]},
        (400, "projected_grad", "invalid_value", "num_perturbations=1 needs as many"),
    ),
    (
        "POST",
        "/mezo/jobs/{done}/update",
        STEP | {"projected_grad": [1e308]},
        (400, "projected_grad.0", "invalid_value", "1e+308 is not allowed"),
    ),
    (
        "POST",
        "/mezo/jobs/{done}/update",
        b'{"zo_random_seed": 1, "projected_grad": [NaN], "learning_rate": 1}',
        (400, None, "invalid_json", "not JSON"),
    ),
    (
        "POST",
        "/mezo/jobs/{done}/update",
        STEP | {"learning_rate": 0},
        (400, "learning_rate", "invalid_value", "learning_rate=0 is not allowed: greater than 0"),
    ),
    (
        "POST",
        "/mezo/jobs/{done}/update",
        STEP | {"learning_rate": 1e30},
        (400, "learning_rate", "invalid_value", "less than or equal to"),
    ),
    (
        "POST",
        "/mezo/jobs/{deleted}/publish",
        {},
        (409, None, "model_deleted", "the model of job {deleted} has been deleted"),
    ),
    (
        "POST",
        "/mezo/jobs/{cancelled}/publish",
        {},
        (400, None, "invalid_state", "cannot publish a job that is cancelled"),
    ),
    (
        "POST",
        "/mezo/jobs/{paused}/publish",
        {"checkpoint": "ftckpt_0"},
        (404, "checkpoint", "not_found", "no such checkpoint: 'ftckpt_0'"),
    ),
    (
        "POST",
        "/mezo/jobs/{running}/publish",
        {"directory": "/etc"},
        (400, "directory", "unknown_parameter", "not supported here: directory"),
    ),
]

PATHS = [
    "/v1/files/%2e%2e%2fmezo.sqlite",
    "/v1/files/..%2f..%2fetc%2fpasswd/content",
    "/v1/files/../mezo.sqlite",
    "/v1/files/..",
    "/v1/files/%00",
    "/v1/files/%2e%2e/content",
    "/v1/fine_tuning/jobs/%2e%2e%2f%2e%2e/events",
    "/v1/fine_tuning/jobs/..",
    "/mezo/jobs/%2e%2e/metrics",
    "/mezo/jobs/..%2f..%2f/metrics",
    "/mezo/page.py",
    "/mezo/../mezo.sqlite",
    "/mezo//etc/passwd",
    "/v1/models/..%2f..%2fetc%2fpasswd",
]

READS = [
    "/v1/files",
    "/v1/files/{file}",
    "/v1/files/{file}/content",
    "/v1/fine_tuning/jobs",
    "/v1/fine_tuning/jobs/{running}",
    "/v1/models",
    "/v1/fine_tuning/jobs/{running}/events",
    "/v1/fine_tuning/jobs/{done}/checkpoints",
    "/v1/models/reviews-model:done",
    "/mezo/status",
    "/mezo/jobs/{running}/metrics",
]
CHANGES = [
    ("POST", "/v1/files"),
    ("DELETE", "/v1/files/{file}"),
    ("POST", "/v1/fine_tuning/jobs"),
    ("DELETE", "/v1/models/reviews-model:done"),
    *(("POST", f"/v1/fine_tuning/jobs/{{running}}/{action}") for action in ("cancel", "pause", "resume")),
    *(("POST", f"/mezo/jobs/{{running}}/{action}") for action in ("examples", "publish", "evaluate", "update")),
]


def edited(**changes):
    """A change on purpose, for which one deletes the sums."""

    def damage(folder):
        (edit(folder, **changes) / "SHA256SUMS").unlink()

    return damage


DAMAGES = {
    **{
        name: FILES[name]
        for name in (
            "no configuration",
            "configuration cut",
            "configuration endless",
            "weights cut",
            "weights a pipe",
            "no weights",
        )
    },
    "other numbers": (
        lambda folder: change_tensors(folder, lambda ts: {name: tensor + 1 for name, tensor in ts.items()}),
        "does not agree with SHA256SUMS",
    ),
    "another rank": (edited(r=4), ".lora_A.weight=[8, 256] is not allowed: [4, 256] by the model and r=4"),
    "DoRA": (edited(use_dora=True), "use_dora=True is not allowed"),
    "a layer left out": (edited(exclude_modules=r".*layers\.0\..*"), "none, as target_modules, exclude_modules"),
    "no folder": (shutil.rmtree, "lora_path="),
}
