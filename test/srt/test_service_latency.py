"""Latency of served requests: the percentiles of two populations, and what SGLang's tokenizer process tells of a
request."""

import multiprocessing
import time
import traceback
import tracemalloc
from types import SimpleNamespace

import pytest

from sglang.srt.mezo.service.http.latency import LatencyRecorder, around_batch_output
from sglang.srt.mezo.service.http.metrics import JobMetrics
from sglang.srt.mezo.service.wire.settings import ENABLE_VARIABLE


class Clock:
    def __init__(self, now: float = 1_000_000.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def recorder(clock):
    return LatencyRecorder(clock)


NOTHING = {"p50": None, "p99": None}


def test_percentiles_are_values_that_occurred(recorder):
    for value in range(100, 0, -1):
        recorder.record(value, value / 10)
    idle = recorder.summary()["idle"]
    assert idle == {"count": 100, "ttft_seconds": {"p50": 50, "p99": 99}, "tpot_seconds": {"p50": 5.0, "p99": 9.9}}
    assert recorder.summary()["training"] == {"count": 0, "ttft_seconds": NOTHING, "tpot_seconds": NOTHING}


def test_a_clock_that_is_set_back_holds_nothing_up(monkeypatch):
    recorder = LatencyRecorder()
    recorder.record(1.0, 0.1)
    before, real = recorder.summary()["series"][-1]["start"], time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    recorder.record(2.0, 0.1)
    assert before <= recorder.summary()["series"][-1]["start"] <= before + 20 and len(recorder.summary()["series"]) < 3


def test_a_request_counts_where_it_finished(recorder):
    recorder.record(1.0, 0.1)
    recorder.set_training(True)
    recorder.record(2.0, 0.2)
    recorder.record(4.0, None)
    recorder.set_training(False)
    recorder.record(3.0, 0.3)
    summary = recorder.summary()
    assert summary["training"] == {
        "count": 2,
        "ttft_seconds": {"p50": 2.0, "p99": 4.0},
        "tpot_seconds": {"p50": 0.2, "p99": 0.2},
    }
    assert summary["idle"]["ttft_seconds"] == {"p50": 1.0, "p99": 3.0}


def test_the_series_has_what_happened_every_ten_seconds(recorder, clock):
    recorder.record(1.0, 0.1)
    recorder.record(3.0, None)
    clock.now += 25
    recorder.set_training(True)
    clock.now += 30
    recorder.set_training(False)
    clock.now += 20
    recorder.record(2.0, 0.2)
    series = recorder.summary()["series"]
    start = 1_000_000
    assert [(bucket["start"] - start, bucket["count"], bucket["training"]) for bucket in series] == [
        (0, 2, False),
        (20, 0, True),
        (30, 0, True),
        (40, 0, True),
        (50, 0, True),
        (70, 1, False),
    ]
    assert series[0]["ttft_seconds"] == {"p50": 1.0, "p99": 3.0} and series[0]["tpot_seconds"] == {
        "p50": 0.1,
        "p99": 0.1,
    }
    assert series[1]["ttft_seconds"] == NOTHING


def test_training_that_goes_on_is_in_the_series(recorder, clock):
    recorder.set_training(True)
    recorder.set_training(True)
    clock.now += 15
    assert [bucket["training"] for bucket in recorder.summary()["series"]] == [True, True]


def test_the_series_is_half_an_hour_long(recorder, clock):
    for _ in range(400):
        recorder.record(1.0, 0.1)
        clock.now += 10
    series = recorder.summary()["series"]
    assert len(series) == 179  # and nothing in the ten seconds that have just begun
    assert series[0]["start"] == clock.now - 1790


def test_memory_is_bounded(recorder, clock):
    def work(requests: int) -> None:
        for number in range(requests):
            recorder.set_training(number % 3 == 0)
            recorder.record(number * 1e-3, number * 1e-4)
            clock.now += 0.05

    work(60_000)
    tracemalloc.start()
    work(60_000)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 1_000_000
    assert recorder.summary()["training"]["count"] == recorder.summary()["idle"]["count"] == 2048


def test_an_error_of_ours_does_not_reach_sglang(caplog):
    import asyncio

    handled = []

    async def original(manager, output):
        handled.append(output)

    manager = SimpleNamespace(mezo_service=SimpleNamespace(latency=None))
    output = SimpleNamespace(rids=["a"], finished_reasons=[{"type": "stop"}], completion_tokens=[3])
    asyncio.run(around_batch_output(original, manager, output))
    assert handled == [output] and "was not recorded" in caplog.text
    manager.mezo_service = None
    asyncio.run(around_batch_output(original, manager, None))
    assert handled == [output, None]


def test_a_batch_in_which_no_request_ends_is_passed_on_without_a_look(caplog):
    import asyncio

    handled = []

    async def original(manager, output):
        handled.append(output)

    class Untouched:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was looked at")

    manager = SimpleNamespace(mezo_service=SimpleNamespace(latency=Untouched()), rid_to_state=Untouched())
    output = SimpleNamespace(rids=["x"] * 64, finished_reasons=[None] * 64, completion_tokens=[1] * 64)
    asyncio.run(around_batch_output(original, manager, output))
    assert handled == [output] and "was not recorded" not in caplog.text


# --- in SGLang --------------------------------------------------------------------------------------------------------


def measure(model: str, pipe) -> None:
    """Serve requests of every kind on an engine without --enable-metrics, in a process of its own."""
    try:
        import os

        os.environ[ENABLE_VARIABLE] = "1"
        import sglang as sgl
        from sglang.srt.mezo.plugin.hooks import Hook, install

        engine = sgl.Engine(model_path=model, skip_tokenizer_init=True, log_level="error", max_running_requests=8)
        manager = engine.tokenizer_manager
        target = ("sglang.srt.managers.tokenizer_manager", "TokenizerManager._handle_batch_output")
        install(Hook(*target, "around", around_batch_output, "as in a server"))
        seen = []
        recorder = SimpleNamespace(record=lambda ttft, tpot: seen.append((ttft, tpot)))
        manager.mezo_service = SimpleNamespace(latency=recorder)
        results = {}

        def note(name: str, call) -> None:
            seen.clear()
            started = time.perf_counter()
            extra = call()
            results[name] = (list(seen), time.perf_counter() - started, extra)

        def ask(tokens: int, stream: bool = False, **sampling):
            sampling = {"max_new_tokens": tokens, "ignore_eos": True, **sampling}
            return engine.generate(input_ids=[5, 6, 7], sampling_params=sampling, stream=stream)

        def stream():
            chunks = iter(ask(64, stream=True))
            started = time.perf_counter()
            next(chunks)
            first = time.perf_counter() - started
            for _ in chunks:
                pass
            return first

        async def abort():
            from sglang.srt.managers.io_struct import GenerateReqInput

            request = GenerateReqInput(
                input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 400, "ignore_eos": True}, stream=True
            )
            async for _ in manager.generate_request(request):
                manager.abort_request(request.rid)

        async def health_check():
            from sglang.srt.managers.io_struct import GenerateReqInput

            request = GenerateReqInput(input_ids=[5], sampling_params={"max_new_tokens": 2}, log_metrics=False)
            async for _ in manager.generate_request(request):
                pass

        ask(4)  # the first request compiles and allocates
        note("whole", lambda: ask(64) and None)
        note("streamed", stream)
        note("one token", lambda: ask(1) and None)
        note("no token", lambda: ask(0) and None)
        note("samples", lambda: ask(4, n=3) and None)
        note("aborted", lambda: engine.loop.run_until_complete(abort()))
        note("health check", lambda: engine.loop.run_until_complete(health_check()))
        pipe.send(results)
        engine.shutdown()
    except BaseException:
        pipe.send(traceback.format_exc())


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = tmp_path_factory.mktemp("model")
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=512, eos_token_id=2, **size)).save_pretrained(
        model
    )
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=measure, args=(str(model), theirs))
    process.start()
    assert ours.poll(300), "the engine did not answer"
    results = ours.recv()
    process.join(30)
    process.kill()
    assert isinstance(results, dict), results
    return results


def test_a_request_that_does_not_stream_has_its_first_token_before_its_answer(measured):
    [(ttft, tpot)], seconds, _ = measured["whole"]
    assert ttft > 0 and tpot > 0  # what comes with the answer is the last of its 64 tokens
    assert ttft + 63 * tpot <= seconds


def test_a_request_that_streams_is_measured_as_its_client_sees_it(measured):
    [(ttft, tpot)], seconds, first = measured["streamed"]
    assert 0 < ttft <= first and tpot > 0
    assert ttft + 63 * tpot <= seconds


def test_requests_without_such_a_time_do_not_count(measured):
    [(ttft, tpot)], _, _ = measured["one token"]
    assert ttft > 0 and tpot is None
    assert measured["no token"][0] == measured["aborted"][0] == measured["health check"][0] == []
    assert len(measured["samples"][0]) == 3


# --- job states -------------------------------------------------------------------------------------------------------


def test_prometheus_sees_every_state():
    from prometheus_client import REGISTRY

    store = SimpleNamespace(job_counts=dict)
    metrics = JobMetrics(store)
    try:
        for counts in ({"running": 1, "succeeded": 3}, {"succeeded": 4}):
            store.job_counts = counts.copy
            metrics.update()
            for status in ("running", "succeeded", "failed"):
                assert REGISTRY.get_sample_value("sglang:mezo_jobs", {"status": status}) == counts.get(status, 0)
    finally:
        REGISTRY.unregister(metrics._jobs)


def test_the_store_tells_when_a_job_changes_its_state(tmp_path):
    from service_app import make_service
    from test_service_page import add_job

    service = make_service(tmp_path)
    told = []
    service.store.listener = lambda: told.append(service.store.job_counts())
    job = add_job(service, "queued")
    service.store.update_job(job.id, step=3)
    service.store.update_job(job.id, status="running")
    assert told == [{"queued": 1}, {"running": 1}]
    service.store.close()
