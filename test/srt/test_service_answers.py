"""Which adapter a request gets by its model's name on SGLang's own handlers, and the name of the version that
answered."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.responses import StreamingResponse

from service_doubles import Scheduler, TokenizerManager, without_runtime_context, write_adapter
from sglang.srt.entrypoints.ollama.protocol import OllamaChatRequest, OllamaGenerateRequest
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.protocol import ScoringRequest, TokenizeRequest
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sglang.srt.entrypoints.openai.serving_score import OpenAIServingScore
from sglang.srt.entrypoints.openai.serving_tokenize import OpenAIServingTokenize
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager_score_mixin import ScoreResult
from sglang.srt.mezo.service.http import answers
from sglang.srt.mezo.service.jobs import served_names

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Manager(TokenizerManager):
    """Answers with the weights of the adapter that a request gets; None stands for the base model."""

    server_args = None

    async def generate_request(self, obj, request=None):
        answers.before_generating(self, obj, request)
        if obj.lora_path:
            await answers.around_resolving(TokenizerManager._resolve_lora_path, self, obj)
        self.answered = self.loaded[obj.lora_id][1] if obj.lora_path else None
        yield {"text": self.answered or "", "meta_info": {}}

    async def score_request(self, **arguments):
        await anext(self.generate_request(GenerateReqInput(input_ids=[1])))
        return ScoreResult([[0.5]])

    def _parse(self, name: str):
        return OpenAIServingBase._parse_model_parameter(SimpleNamespace(tokenizer_manager=self), name)


@pytest.fixture
async def manager(monkeypatch, tmp_path):
    without_runtime_context(monkeypatch)
    tokenizer = SimpleNamespace(
        encode=lambda text, **_: [1], apply_chat_template=lambda *_, **__: [1], model_max_length=9
    )
    manager = Manager(Scheduler(), tokenizer)
    manager.request_logger = SimpleNamespace(log_requests=False, log_requests_level=0)
    directory = tmp_path / "jobs" / "ftjob-1" / "adapters" / "v3"
    write_adapter(directory, "trained")
    await served_names.publish(manager, "mine", directory)
    return manager


async def ask(manager, kind: str, model: str):
    """An answer's status, and what answered; on a route that reads no adapter by itself."""
    manager.answered = "nothing"
    if kind == "score":
        request = ScoringRequest(model=model, query="a", items=["b"], label_token_ids=[1])
        response = await answers.around_request(
            OpenAIServingBase.handle_request, OpenAIServingScore(manager), request, None
        )
    elif kind == "tokenize":
        request = TokenizeRequest(model=model, prompt="a")
        response = await answers.around_request(
            OpenAIServingBase.handle_request, OpenAIServingTokenize(manager), request, None
        )
    elif kind == "ollama chat":
        request = OllamaChatRequest(model=model, messages=[{"role": "user", "content": "a"}], stream=False)
        response = await answers.around_ollama(OllamaServing.handle_chat, OllamaServing(manager), request, None)
    else:
        request = OllamaGenerateRequest(model=model, prompt="a", stream=True)
        response = await answers.around_ollama(OllamaServing.handle_generate, OllamaServing(manager), request, None)
        if isinstance(response, StreamingResponse):
            _ = [chunk async for chunk in response.body_iterator]
    return getattr(response, "status_code", 200), manager.answered, response


@pytest.mark.parametrize("kind", ["score", "ollama chat", "ollama generate"])
async def test_routes_that_read_no_adapter_answer_from_the_one_that_the_model_names(manager, kind):
    assert (await ask(manager, kind, "opt"))[:2] == (200, None)
    assert (await ask(manager, kind, "opt:mine"))[:2] == (200, "trained")
    assert (await ask(manager, kind, "opt"))[:2] == (200, None)


@pytest.mark.parametrize("kind", ["score", "tokenize"])
async def test_a_name_that_nothing_has_is_an_error_as_openai_has_it(manager, kind):
    status, answered, response = await ask(manager, kind, "opt:never-existed")
    assert (status, answered) == (404, "nothing")
    error = json.loads(response.body)["error"]
    assert error == {
        "message": "The model 'opt:never-existed' does not exist",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize("kind", ["ollama chat", "ollama generate"])
async def test_ollamas_tag_is_no_adapter_and_its_clients_may_call_the_model_what_they_like(manager, kind):
    for model, expected in (("opt:latest", None), ("llama3:8b", None), ("opt:mine:latest", "trained")):
        assert (await ask(manager, kind, model))[:2] == (200, expected)
    status, answered, response = await ask(manager, kind, "opt:never-existed")
    assert (status, answered, json.loads(response.body)) == (
        404,
        "nothing",
        {"error": "model 'opt:never-existed' not found"},
    )


async def test_an_adapter_that_is_loaded_at_its_first_request_counts(manager, tmp_path):
    directory = tmp_path / "later"
    write_adapter(directory, "later")
    served_names.announce(manager, "later", directory)

    async def load(request):
        await served_names.publish(manager, request.lora_name, Path(request.lora_path))
        return SimpleNamespace(success=True)

    manager.load_lora_adapter = load
    assert (await ask(manager, "score", "opt:later"))[:2] == (200, "later")


def version(path: str, name: str = "mine", lora_id: str = "a") -> LoRARef:
    return LoRARef(lora_name=name, lora_path=path, lora_id=lora_id, pinned=False)


def test_a_fingerprint_stands_for_the_weights():
    first = answers.fingerprint(version("/mezo/jobs/ftjob-1/adapters/v3"))
    assert first.startswith("fp_mine-v3-")
    assert answers.fingerprint(version("/moved/jobs/ftjob-1/adapters/v3", lora_id="b")) == first
    others = [
        version("/mezo/jobs/ftjob-1/adapters/v4"),
        version("/mezo/jobs/ftjob-2/adapters/v3"),
        version("/mezo/jobs/ftjob-1/run/checkpoint-3", "mine:ckpt-step-3"),
        version("/adapters/v3"),
        version("/adapters/v3", lora_id="b"),
    ]
    assert len({first, *map(answers.fingerprint, others)}) == 6
