"""Chat through a real server: it asks as training does, and the adapter that a name stands for answers on every
route."""

import json
from collections.abc import Iterator

import pytest
from openai import APIStatusError, NotFoundError
from transformers import AutoTokenizer

from conversations import MODEL, REFUSED, ROWS, TEMPLATES, request_for
from live_server import LiveServer
from sglang.srt.mezo.core.errors import DataError
from sglang.srt.mezo.data.chat import ChatSettings
from sglang.srt.mezo.data.conversation import turns
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.engine.chat import ChatRenderer

CONTEXT = 512
TRAINING = {
    "max_steps": 3,
    "batch_size": 4,
    "num_perturbations": 2,
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "save_steps": 3,
}
ASKED = [{"role": "user", "content": "the plot is thin."}]


def rows(answer: str = " great", count: int = 8) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"the plot is {word}."}, {"role": "assistant", "content": answer}]}
        for word in "abcdefgh"[:count]
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[LiveServer]:
    with LiveServer(tmp_path_factory.mktemp("server") / "mezo", "--chat-template", TEMPLATES["tools"]) as server:
        yield server


@pytest.fixture(scope="module")
def trained(server):
    """A job that its client tells nothing of how the adapter is to act."""
    job = server.create_job(server.upload(rows()), suffix="chat", **TRAINING)
    return server.wait_for(job.id, "succeeded")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return Encoder(
        tokenizer, CONTEXT, chat=ChatRenderer(tokenizer, ChatSettings(str(MODEL), chat_template=TEMPLATES["tools"]))
    )


# --- the prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROWS)
def test_the_server_asks_what_a_row_asks(server, encoder, kind):
    row = ROWS[kind]
    for turn, example in zip(turns(row), encoder.encode(row), strict=True):
        body = {
            **request_for(row, len(turn.asked["messages"])),
            "model": server.model,
            "max_tokens": 1,
            "return_prompt_token_ids": True,
        }
        answer = server.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert tuple(answer.json()["choices"][0]["prompt_token_ids"]) == example.prompt
        assert answer.json()["usage"]["prompt_tokens"] == len(example.prompt)


@pytest.mark.parametrize("kind", REFUSED)
def test_the_server_refuses_what_a_row_is_refused_for(server, encoder, kind):
    row, _ = REFUSED[kind]
    answer = server.http.post(
        "/v1/chat/completions",
        json={**request_for(row, len(row["messages"]) - 1), "model": server.model, "max_tokens": 1},
    )
    assert answer.status_code == 400, answer.text
    with pytest.raises(DataError):
        encoder.encode(row)


def test_a_job_is_told_the_line_that_a_request_would_be_refused_for(server):
    job = server.create_job(server.upload([*rows(count=2), REFUSED["an image"][0]]), **TRAINING)
    failed = server.wait_for(job.id, "failed")
    assert failed.error.message.startswith("rows.jsonl:3: ") and "only supports text" in failed.error.message


def test_a_job_that_says_nothing_of_an_invocation_has_the_generation_prompt(trained):
    sent = trained.method.supervised.hyperparameters
    assert (sent.tuning, sent.invocation) == ("alora", "<|im_start|>assistant\n")


# --- the answers ------------------------------------------------------------------------------------------------------


def chat(server, model: str, **fields):
    return server.client.chat.completions.create(model=model, messages=ASKED, max_tokens=6, temperature=0, **fields)


def responses(server, model: str, **fields):
    return server.client.responses.create(
        model=model, input="the plot is thin.", max_output_tokens=6, temperature=0, **fields
    )


def score(server, model: str) -> list[float]:
    body = {
        "model": model,
        "query": "the plot is thin.<|im_end|>\n<|im_start|>assistant\n",
        "items": [" great"],
        "label_token_ids": [399, 400],
    }
    return server.http.post("/v1/score", json=body).raise_for_status().json()["scores"][0]


def ollama(server, model: str, route: str = "chat") -> str:
    body = {"model": model, "stream": False, "options": {"temperature": 0, "num_predict": 6}}
    asked = {"messages": ASKED} if route == "chat" else {"prompt": "the plot is thin.<|im_start|>assistant\n"}
    return server.http.post(f"/api/{route}", json=body | asked).raise_for_status().text


def test_every_route_answers_from_the_adapter(server, trained):
    base, tuned = server.model, trained.fine_tuned_model
    expected, untuned = (chat(server, model).choices[0].message.content for model in (tuned, base))
    first, second = (
        responses(server, model).output_text for model in (tuned, base)
    )  # a token or two shorter than a chat's
    assert expected.startswith(first) and untuned.startswith(second)
    assert first != second, "the adapter must matter"
    events = list(responses(server, tuned, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == first
    assert score(server, tuned) != score(server, base)
    assert json.loads(ollama(server, tuned))["message"]["content"] == expected
    assert json.loads(ollama(server, base))["message"]["content"] != expected
    generated = json.loads(ollama(server, tuned, "generate"))["response"]
    assert generated != json.loads(ollama(server, base, "generate"))["response"]
    message = (
        server.http.post("/v1/messages", json={"model": tuned, "messages": ASKED, "max_tokens": 6, "temperature": 0})
        .raise_for_status()
        .json()
    )
    assert message["content"][0]["text"] == expected


def test_a_model_that_does_not_exist_is_an_error_on_every_route(server):
    missing = f"{server.model}:never-existed"
    for ask in (chat, responses):
        for fields in ({}, {"stream": True}):
            with pytest.raises(NotFoundError) as caught:
                ask(server, missing, **fields)
            assert caught.value.code == "model_not_found" and missing in str(caught.value)
    with pytest.raises(NotFoundError):
        server.client.completions.create(model=missing, prompt="a", max_tokens=1)
    for path, body in {
        "/v1/score": {"query": "a", "items": ["b"], "label_token_ids": [399]},
        "/v1/tokenize": {"prompt": "a"},
        "/v1/embeddings": {"input": "a"},
        "/v1/classify": {"input": "a"},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
        "/v1/messages": {"messages": ASKED, "max_tokens": 1},
        "/invocations": {"messages": ASKED, "max_tokens": 1},
        "/api/chat": {"messages": ASKED},
        "/api/generate": {"prompt": "a"},
    }.items():
        answer = server.http.post(path, json={"model": missing, **body})
        assert answer.status_code in (400, 404), (path, answer.text)
    assert server.http.post("/generate", json={"text": "a", "lora_path": "never-existed"}).status_code == 400
    for field, value, message in (
        ("lora_id", "never-existed", "named by lora_path"),
        ("lora_id", ["never-existed"], "named by lora_path"),
        ("lora_id", [None], "named by lora_path"),
        ("lora_path", [None], "a string, as there is one text"),
    ):
        answer = server.http.post("/generate", json={"text": "a", field: value})
        assert answer.status_code == 400 and message in answer.text
    assert server.http.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}}).is_success


# --- the version ------------------------------------------------------------------------------------------------------


def fingerprints(server, model: str) -> set[str]:
    """Of a chat, a completion, and every chunk of both where they are streamed."""
    prompt = {"model": model, "prompt": "a", "max_tokens": 3, "temperature": 0}
    answers = [
        chat(server, model),
        *chat(server, model, stream=True, stream_options={"include_usage": True}),
        server.client.completions.create(**prompt),
        *server.client.completions.create(**prompt, stream=True),
    ]
    assert len(answers) > 6
    return {answer.system_fingerprint for answer in answers}


def test_answers_name_the_version_that_made_them(server, trained):
    assert fingerprints(server, server.model) == {None}
    [first] = fingerprints(server, trained.fine_tuned_model)
    assert first.startswith("fp_chat-v1-")
    step = {"zo_random_seed": 7, "projected_grad": [1.0, -1.0], "learning_rate": 0.1}
    server.http.post(f"/mezo/jobs/{trained.id}/update", json=step).raise_for_status()
    [second] = fingerprints(server, trained.fine_tuned_model)
    assert second.startswith("fp_chat-v2-") and second != first
    checkpoint = next(iter(server.client.fine_tuning.jobs.checkpoints.list(trained.id))).fine_tuned_model_checkpoint
    [third] = fingerprints(server, checkpoint)
    assert third.startswith("fp_chat:ckpt-step-3-")


def test_other_errors_are_as_they_were(server, trained):
    with pytest.raises(APIStatusError) as caught:
        server.client.chat.completions.create(model=trained.fine_tuned_model, messages=ASKED, max_tokens=100_000)
    assert caught.value.status_code == 400
