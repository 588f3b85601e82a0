"""Tenants who do what they like, on one server: base model and other adapters answer as PEFT does, throughout."""

import json
import os
import platform
from collections.abc import Iterator
from datetime import date

import pytest

from isolation_sequences import ACTIONS, TOLERANCE, run_sequences
from live_server import ROOT, LiveServer

SEQUENCES = 200
RESULT = ROOT / "benchmarks" / "results" / "isolation.json"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("isolation") / "mezo") as server:
        yield server
        assert "Traceback" not in server.log_text()


@pytest.mark.slow
def test_two_hundred_random_sequences_leave_every_answer_right(server, tmp_path):
    answers = run_sequences(server, tmp_path, range(SEQUENCES))
    result = {
        "sequences": SEQUENCES,
        "actions of each": ACTIONS,
        "answers held against PEFT": answers,
        "tolerance": TOLERANCE,
        "wrong answers": 0,
        "date": date.today().isoformat(),
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
