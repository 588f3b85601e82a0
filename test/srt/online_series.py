"""The same job in a server and offline, and other requests beside it."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from engine_process import EngineProcess
from live_server import MODEL, LiveServer
from sglang.srt.mezo.adapters.adapter import AdapterSpec
from sglang.srt.mezo.adapters.prefix_adapter import PrefixSpec
from sglang.srt.mezo.core.config import MezoConfig
from sglang.srt.mezo.data.examples import Encoder

SLOTS = 16 - 1 - 1
"""Of the server's pool, that a job may take: not the base model's, nor the one that is left to serve an adapter."""


BREVITY = """
def brevity(completions):
    return [-len(text.split()) for text in completions]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "brevity.py").write_text(BREVITY)
    flags = ("--enable-metrics", "--mezo-rewards", "brevity=brevity:brevity")
    with LiveServer(folder / "mezo", *flags) as server:
        yield server
        assert "Traceback" not in server.log_text()


# --- the same numbers online and offline ------------------------------------------------------------------------------


def offline_series(server, job, rows: list[dict], tmp_path: Path) -> list[tuple]:
    """(step, losses, projected gradients) of every step under the job's settings, on an engine without a server."""
    sent = job.method.supervised.hyperparameters.model_dump()
    names = MezoConfig.__dataclass_fields__.keys() & sent.keys()
    config = MezoConfig(
        **{name: sent[name] for name in names if sent[name] != "auto"},
        per_device_train_batch_size=sent["batch_size"],
        num_train_epochs=sent["n_epochs"],
        seed=job.seed,
        output_dir=str(tmp_path / "offline"),
        disable_tqdm=True,
    )
    process = EngineProcess(
        model_path=str(MODEL),
        r=16,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
        num_slots=SLOTS,
        dtype="float32",
        max_total_tokens=20000,
    )
    try:
        process.call(train_offline, config, rows)
    finally:
        process.close()
    return series(Path(config.output_dir))


def train_offline(engine, config: MezoConfig, rows: list[dict]) -> None:
    from sglang.srt.mezo.training.trainer import MezoTrainer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    invocation = tuple(tokenizer(config.invocation, add_special_tokens=False).input_ids) if config.invocation else ()
    encoder = Encoder(tokenizer, 512, None, invocation)
    examples = [example for row in rows for example in encoder.encode(row)]
    if config.tuning == "prefix":
        spec = PrefixSpec.of(config, str(MODEL), AutoConfig.from_pretrained(MODEL))
    else:
        spec = AdapterSpec.of(config, str(MODEL), invocation)
    MezoTrainer(engine.handle, config, spec, examples).train()


def series(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["loss_plus"] + line["loss_minus"], line["projected_grad"])
        for line in lines
        if "loss_plus" in line
    ]


@contextmanager
def traffic(server, prompts: list[str], clients: int = 3) -> Iterator[list[str]]:
    """Greedy requests to the base model, one after the other from each client; the answers are collected."""
    stop, answers = threading.Event(), []

    def client(index: int) -> None:
        for prompt in cycle(prompts[index::clients]):
            if stop.is_set():
                return
            answers.append((prompt, greedy(server, prompt)))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, index) for index in range(clients)]
        try:
            yield answers
        finally:
            stop.set()
            for future in running:
                future.result()


def greedy(server, prompt: str) -> str:
    answer = server.client.completions.create(
        model=server.model, prompt=prompt, max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
    )
    return answer.choices[0].text
