"""A job whose client says nothing of an invocation acts from the generation prompt of its chats, or on every token."""

from copy import deepcopy
from pathlib import Path

import pytest

from conversations import TEMPLATES
from service_server import ROW, anyio_backend, runtime_context, serving, tokenizer  # noqa: F401
from sglang.srt.mezo.service.wire.messages import LoadExamples, StartJob
from sglang.srt.mezo.service.wire.packed import unpack

pytestmark = pytest.mark.anyio

TAIL = "[assistant]"


def chat(question: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": " great", **fields}]}


@pytest.fixture
async def server(tmp_path, tokenizer):
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = Path(TEMPLATES["strings"]).read_text()
    async with serving(tmp_path, tokenizer) as server:
        yield server


async def start(server, *rows, **config):
    """A job that leaves its invocation open and has the engine: it, and its command."""
    job = await server.running(*rows, invocation="auto", **config)
    [command] = server.scheduler.sent(StartJob)
    return job, command


async def test_chats_are_activated_by_their_generation_prompt(server):
    rows = [chat("the plot"), chat("why?"), {"messages": [*chat("a")["messages"], *chat("b\n")["messages"]]}]
    job, command = await start(server, *rows, validation=server.upload(chat("c")))
    tokens = server.tokenizer_manager.tokenizer.encode(TAIL, add_special_tokens=False)
    assert command.invocation == tokens and command.config.tuning == "alora"
    assert (job.config["invocation"], job.config["tuning"]) == (TAIL, "alora")
    for command in server.scheduler.sent(LoadExamples):
        assert all(example.prompt[-len(tokens) :] == tuple(tokens) for example in unpack(command.examples))
    assert f"The adapter acts from the chat template's generation prompt on: {TAIL!r}" in server.messages(job)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([ROW], "there are no messages"),
        ([{"prompt": "a", "completion": "b"}], "there are no messages"),
        (
            [chat("a"), {"prompt": "a", "completion": "b"}],
            "not every prompt ends with the generation prompt '[assistant]'",
        ),
    ],
)
async def test_other_rows_make_ordinary_lora_which_says_why(server, rows, reason):
    job, command = await start(server, *rows)
    assert command.invocation == [] and (job.config["tuning"], job.config["invocation"], command.config.tuning) == (
        "lora",
        None,
        "lora",
    )
    assert command.config.target_modules == ["q_proj", "v_proj"]
    [event] = [event for event in server.store.events(job.id, limit=100).data if "ordinary LoRA" in event.message]
    assert event.level == "warn" and reason in event.message


async def test_a_template_without_a_generation_prompt_makes_ordinary_lora(tmp_path, tokenizer):
    async with serving(tmp_path, tokenizer) as server:  # whose own template has none
        job, _ = await start(server, chat("a"))
        assert job.config["tuning"] == "lora"
        assert "appends no generation prompt" in " ".join(server.messages(job))


async def test_appended_chats_must_have_the_invocation_too(server):
    job, command = await start(server, chat("a"))
    assert (await server.manager.append_rows(job.id, [chat("b")]))["examples"] == 1
    with pytest.raises(Exception, match="does not hold the invocation"):
        await server.manager.append_rows(job.id, [{"prompt": "a", "completion": "b"}])


# --- tokens that no text stands for -----------------------------------------------------------------------------------


def test_tokens_that_no_text_stands_for_are_kept_as_tokens():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sglang.srt.mezo.data.invocation import invocation_setting, invocation_tokens

    words = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer, words.decoder = (
        pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
        decoders.Metaspace(prepend_scheme="always"),
    )
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=words)
    assert invocation_setting([1], sentencepiece) == "b" and invocation_tokens("b", sentencepiece) == (1,)
    assert invocation_setting([2], sentencepiece) == [2] and invocation_tokens([2], sentencepiece) == (2,)
