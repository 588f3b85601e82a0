"""The commands of README and of the page on servers, in a server; those of the quickstart run in test_packaging."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from docs_blocks import ROOT, of_group, run
from live_server import free_port, reviews

UNTIL_IT_HAS_SUCCEEDED = """
import time
while (job := client.fine_tuning.jobs.retrieve(job.id)).status != "succeeded":
    assert job.status not in ("failed", "cancelled"), job.error
    time.sleep(0.5)
"""
TEXT = "the plot is thin, but the acting is superb. It was"


@contextmanager
def served(command: str, folder: Path, environment: dict[str, str], port: int):
    """What the command starts, from when it answers until it is ended."""
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 600
        while not _answers(port):
            assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()[-4000:]
            time.sleep(0.5)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/mezo/status", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where a reader stands: a checkout, and a file of rows."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reviews("train", 64)))
    return tmp_path


def test_the_pages_say_the_same():
    assert [block.code for block in of_group("server", "README.md")][1] == of_group("server", "server.md")[1].code


def test_a_job_in_a_server_by_the_commands_of_the_readme(folder):
    commands, client = of_group("server", "README.md")
    serve, example = (line.split("  ")[0] for line in commands.code.splitlines())
    port = free_port()
    python = Path(sys.executable)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with served(f"{serve} --port {port}", folder, environment, port):
        short = f"""{example} --base-url http://127.0.0.1:{port}/v1 --hyperparameters '{{"max_steps": 20}}'"""
        run([commands._replace(code=short)], folder, python)
        checks = "\nassert job.status == 'succeeded' and job.fine_tuned_model.endswith(':reviews-2'), job"
        code = client.code.replace("30000", str(port)).replace('suffix="reviews"', 'suffix="reviews-2"')
        run([client._replace(code=code + checks)], folder, python)


@pytest.mark.slow
def test_other_tunings_and_their_weights_in_a_server(folder):
    python, port = Path(sys.executable), free_port()
    run(of_group("tunings"), folder, python)
    assert (folder / "runs" / "prefix" / "adapter" / "adapter_model.safetensors").is_file()
    [update] = of_group("weights in a server")
    serve = f"sglang-mezo serve --model-path examples/assets/opt-reviews --dtype float32 --port {port}"
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    job, load = of_group("prefix in a server")
    with served(serve, folder, environment, port):
        for block, check in ((job, UNTIL_IT_HAS_SUCCEEDED), (load, "")):
            run([block._replace(code=block.code.replace("30000", str(port)) + check)], folder, python)
        assert first_logprobs(port, lora_path="mine") != first_logprobs(port, lora_path="a-prefix")
        before = first_logprobs(port)
        run([update._replace(code=update.code.replace("30000", str(port)))], folder, python)
        after = first_logprobs(port)
    tokenizer, model = (
        kind.from_pretrained(folder / "runs/full/model") for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    ids = tokenizer(TEXT).input_ids
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    expected = log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert after == pytest.approx(expected, abs=1e-4) and after != pytest.approx(before, abs=1e-4)


def first_logprobs(port: int, **fields) -> list[float]:
    """Of the tokens of a prompt, as a server has them."""
    sampling = {"max_new_tokens": 1}
    body = {"text": TEXT, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0, **fields}
    answer = httpx.post(f"http://127.0.0.1:{port}/generate", json=body, timeout=60).raise_for_status().json()
    return [logprob for logprob, *_ in answer["meta_info"]["input_token_logprobs"][1:]]


@pytest.mark.slow
def test_the_two_commands_of_the_readme_on_a_fresh_clone(tmp_path):
    """The second with the fewest tests: it makes the same environment, and what it runs is this."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tmp_path / "clone")], check=True)
    [block] = of_group("two commands")
    demo, test = block.code.splitlines()
    some = f"{test.partition('#')[0].strip()} test/srt/test_config.py"
    run([block._replace(code=demo), block._replace(code=some)], tmp_path / "clone", Path("/usr/bin/python3"))
