"""An adapter whose numbers overflow, beside others in one engine: they answer as PEFT does, and nothing of it is
left behind."""

import asyncio
import math
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from engine_process import ServingEngine
from served_llama import DOCUMENT, INVOCATION, SAMPLING, base_model, small_llama
from sglang.srt.mezo.engine.kv_pool import erase
from sglang.srt.mezo.plugin import isolation

SPARK = 210
"""A token at which the adapters "spark" overflow; at others they are ordinary ones."""
CHUNK = 48


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a base model and of adapters, ordinary ones and such as overflow: at every token, or at one of
    them."""
    root = tmp_path_factory.mktemp("models")
    base = LlamaForCausalLM(small_llama())
    with torch.no_grad():  # what "spark" looks at
        base.model.embed_tokens.weight[:, 0] = 0
        base.model.embed_tokens.weight[SPARK, 0] = 1
    base.save_pretrained(root / "base")
    alora = {"alora_invocation_tokens": INVOCATION}
    for name, settings in {
        "lora": {},
        "alora": alora,
        "huge": alora,
        "huge_lora": {},
        "spark": alora,
        "spark_lora": {},
    }.items():
        targets = ["v_proj"] if name.startswith("spark") else ["q_proj", "v_proj", "o_proj", "down_proj"]
        layers = {"layers_to_transform": [0]} if name.startswith("spark") else {}
        adapter = LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=targets,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **layers,
            **settings,
        )
        model = get_peft_model(base_model(root), adapter)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_" in key and name.startswith("huge"):
                    weight.copy_(torch.randn_like(weight).sign() * 1e30)
                if "lora_" in key and name.startswith("spark"):
                    weight.zero_()
                    weight[:, 0] = 1e25 if "lora_A" in key else 1e25
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def engine(models):
    names = ("lora", "alora", "huge", "huge_lora", "spark", "spark_lora")
    engine = ServingEngine(
        model_path=str(models / "base"),
        lora_paths=[f"{name}={models / name}" for name in names],
        max_lora_rank=4,
        lora_target_modules=["q_proj", "v_proj", "o_proj", "down_proj"],
        skip_tokenizer_init=True,
        log_level="error",
        chunked_prefill_size=CHUNK,
        max_loras_per_batch=8,
    )
    yield engine
    engine.close()


def ask(engine, *requests, **sampling):
    """Answers, or the errors in their place, to (prompt, adapter) that come at once."""
    return engine.call(answers, requests, {**SAMPLING, **sampling})


def answers(engine, requests, sampling):
    async def one(prompt, adapter):
        return await engine.async_generate(
            input_ids=prompt, lora_path=adapter, sampling_params=sampling, return_logprob=True
        )

    async def every():
        return await asyncio.gather(*(one(*request) for request in requests), return_exceptions=True)

    return engine.loop.run_until_complete(every())


def peft_answer(root, prompt, adapter) -> tuple[list[int], list[float]]:
    """Eight greedy tokens and their log-probabilities."""
    model = base_model(root)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, root / adapter)
    ids = torch.tensor([prompt])
    settings = dict(
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        out = model.eval().generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    tokens = out.sequences[0, len(prompt) :].tolist()
    return tokens, [torch.log_softmax(logits[0], -1)[token].item() for logits, token in zip(out.logits, tokens)]


def assert_answers_as_peft(root, request, answer):
    tokens, log_probs = peft_answer(root, *request)
    assert not isinstance(answer, Exception), answer
    assert answer["output_ids"] == tokens, request
    assert [value for value, *_ in answer["meta_info"]["output_token_logprobs"]] == pytest.approx(log_probs, abs=1e-4)


def assert_names_the_adapter(answer, name):
    assert isinstance(answer, ValueError), answer
    assert f"adapter '{name}' does not give finite numbers" in str(answer)


def test_others_answer_as_peft_beside_an_adapter_that_overflows(engine, models):
    suffix = INVOCATION + [20, 21]
    good = [
        (DOCUMENT[:30], None),
        (DOCUMENT[:30] + suffix, "alora"),
        (DOCUMENT[:20] + suffix, "lora"),
        (DOCUMENT[:30] + suffix, None),
        ([60] + DOCUMENT[:30], None),
    ]
    bad = [
        (DOCUMENT[:30] + suffix, "huge"),
        (DOCUMENT[:29] + suffix, "huge"),
        ([60] + DOCUMENT[:30] + suffix, "huge"),
        (DOCUMENT[:20] + suffix, "huge_lora"),
    ]
    for _ in range(2):  # the second time from the cache
        mixed = [request for pair in zip(bad, good) for request in pair] + good[len(bad) :]
        for request, answer in zip(mixed, ask(engine, *mixed), strict=True):
            if request in bad:
                assert_names_the_adapter(answer, request[1])
            else:
                assert_answers_as_peft(models, request, answer)
    for request in good:
        assert_answers_as_peft(models, request, ask(engine, request)[0])


def test_what_ran_beside_it_is_not_kept(engine, models):
    engine.flush_cache()
    document = DOCUMENT[10:40]
    (answer,) = ask(engine, (document + INVOCATION + [20], "huge"))
    assert_names_the_adapter(answer, "huge")
    (answer,) = ask(engine, (document, None))
    assert answer["meta_info"]["cached_tokens"] == 0
    assert_answers_as_peft(models, (document, None), answer)
    (answer,) = ask(engine, (document + INVOCATION + [20], "huge"))
    assert_names_the_adapter(answer, "huge")
    (answer,) = ask(engine, (document + [5], None))
    assert answer["meta_info"]["cached_tokens"] == len(document), "what was there already stays"
    assert_answers_as_peft(models, (document + [5], None), answer)


def test_of_a_long_prompt_chunks_of_the_base_model_alone_are_kept(engine, models):
    engine.flush_cache()
    prompt = DOCUMENT + INVOCATION + DOCUMENT[:40]
    (answer,) = ask(engine, (prompt, "huge"))
    assert_names_the_adapter(answer, "huge")
    (answer,) = ask(engine, (DOCUMENT, None))
    assert answer["meta_info"]["cached_tokens"] in (0, CHUNK)
    assert_answers_as_peft(models, (DOCUMENT, None), answer)
    assert_answers_as_peft(models, (prompt, "alora"), ask(engine, (prompt, "alora"))[0])
    (again,) = ask(engine, (prompt, "alora"))
    assert again["meta_info"]["cached_tokens"] == len(prompt) - 1, "a prompt that is finite is kept as a whole"


@pytest.mark.parametrize("adapter", ["spark", "spark_lora"])
def test_an_adapter_that_overflows_in_the_middle_of_an_answer_ends_it_there(engine, models, adapter):
    engine.flush_cache()
    prompt = DOCUMENT[:20] + INVOCATION + [20]
    assert_answers_as_peft(models, (prompt, adapter), ask(engine, (prompt, adapter))[0])
    engine.flush_cache()
    bias = {"logit_bias": {str(SPARK): 1000.0}}  # the first token of the answer is the one
    good, bad = ask(engine, (prompt, None)), ask(engine, (prompt, adapter), **bias)
    assert_names_the_adapter(bad[0], adapter)
    assert_answers_as_peft(models, (prompt, None), good[0])
    (finite,) = ask(engine, (prompt, adapter), **bias, max_new_tokens=1)
    assert finite["output_ids"] == [SPARK], "before it is looked at, it gives numbers"
    for request in ((prompt, None), (prompt, "alora"), (prompt + [SPARK, 21], None), (prompt, adapter)):
        assert_answers_as_peft(models, request, ask(engine, request)[0])


@pytest.mark.parametrize("position", [24, 40, 60])
def test_an_adapter_that_overflows_in_a_prompt_ends_it_wherever_that_is(engine, models, position):
    engine.flush_cache()
    prompt = DOCUMENT[:20] + INVOCATION + DOCUMENT[:45]
    prompt[position] = SPARK
    good, bad = ask(engine, (prompt, "alora"), (prompt, "spark"))
    assert_names_the_adapter(bad, "spark")
    assert_answers_as_peft(models, (prompt, "alora"), good)
    before = [SPARK, *prompt[:20], *INVOCATION, 30]
    assert_answers_as_peft(models, (before, "spark"), ask(engine, (before, "spark"))[0])  # where it is the base model's


@pytest.mark.parametrize("sampling", [{"top_p": 0.5}, {"top_k": 5, "min_p": 0.1}, {}], ids=str)
def test_what_is_sampled_from_an_adapter_that_overflows_ends_it_alone(engine, models, sampling):
    good, bad = (DOCUMENT[:20], None), (DOCUMENT[:20] + INVOCATION + [20], "huge")
    assert_names_the_adapter(ask(engine, bad, temperature=1, **sampling)[0], "huge")
    assert_answers_as_peft(models, good, ask(engine, good)[0])


def test_a_stream_ends_with_the_error(engine):
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True, "logit_bias": {str(SPARK): 1000.0}}
    last = engine.call(chunks, DOCUMENT[:20] + INVOCATION + [20], sampling)[-1]["meta_info"]["finish_reason"]
    assert (last["type"], last["status_code"]) == ("abort", 400) and "adapter 'spark'" in last["message"]


def chunks(engine, prompt, sampling):
    async def collect():
        stream = await engine.async_generate(input_ids=prompt, lora_path="spark", sampling_params=sampling, stream=True)
        return [chunk async for chunk in stream]

    return engine.loop.run_until_complete(collect())


def test_many_at_once_leave_the_engine_whole(engine, models):
    """More than the pool has rows for at a time, in chunks, with and without overflow, of random lengths."""
    generator = torch.Generator().manual_seed(0)
    adapters = [None, "alora", "lora", "huge", "huge_lora", "spark"]
    requests = []
    for i in range(60):
        length = int(torch.randint(5, 120, (), generator=generator))
        words = torch.randint(10, 200, (length,), generator=generator).tolist()
        requests.append(
            (
                [*DOCUMENT[: i % 40], *words[: length // 2], *INVOCATION, *words[length // 2 :]],
                adapters[i % len(adapters)],
            )
        )
    for request, answer in zip(requests, ask(engine, *requests), strict=True):
        if request[1] in ("huge", "huge_lora"):
            assert_names_the_adapter(answer, request[1])
        else:
            assert_answers_as_peft(models, request, answer)
    engine.flush_cache()
    assert engine.get_server_info()["internal_states"][0]["memory_usage"]["token_capacity"] > 0


# --- without an engine ------------------------------------------------------------------------------------------------


def extend_batch(lengths, lora_ids):
    mode = SimpleNamespace(is_extend=lambda: True)
    return SimpleNamespace(
        lora_ids=lora_ids,
        extend_seq_lens=torch.tensor(lengths),
        extend_num_tokens=sum(lengths),
        forward_mode=mode,
        batch_size=len(lengths),
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
    )


def look(batch, hidden, logits):
    isolation._before_logits(None, None, hidden, None, batch)
    runner, output = (
        SimpleNamespace(pp_group=SimpleNamespace(world_size=1)),
        SimpleNamespace(logits_output=SimpleNamespace(next_token_logits=logits)),
    )
    isolation._after_forward(output, runner, batch)
    return runner.mezo_finite


def test_a_token_in_the_middle_of_a_prompt_is_enough():
    """As an attention kernel leaves it that multiplies what a token does not see by 0."""
    for token, expected in (
        (0, [False, True, True]),
        (3, [True, False, True]),
        (6, [True, False, True]),
        (9, [True, True, False]),
    ):
        hidden, logits = torch.zeros(12, 8), torch.zeros(3, 50)
        hidden[token, 5] = math.nan
        assert look(extend_batch([3, 4, 3], [None, "a", None]), hidden, logits).tolist() == expected


def test_logits_that_are_not_finite_are_replaced_before_they_are_sampled():
    for value in (math.nan, math.inf):
        logits = torch.randn(3, 50)
        before = logits.clone()
        logits[1, 7] = value
        assert look(extend_batch([1, 1, 1], [None, "a", "b"]), torch.zeros(3, 8), logits).tolist() == [
            True,
            False,
            True,
        ]
        assert logits.isfinite().all() and torch.equal(logits[[0, 2]], before[[0, 2]])
    masked = torch.randn(1, 50)
    masked[0, 3:] = -math.inf  # as some models do with what is no token
    assert look(extend_batch([1], ["a"]), torch.zeros(1, 8), masked).tolist() == [True]


@pytest.mark.parametrize(("device", "overlap"), [("cpu", True), ("cuda", True), ("cuda", False)])
def test_kv_is_erased_on_the_stream_that_writes_it(device, overlap, monkeypatch):
    monkeypatch.setattr(isolation, "_streams", [])
    isolation._after_overlap(None, SimpleNamespace(device=device, enable_overlap=overlap, forward_stream="forwards"))
    assert isolation._streams == (["forwards"] if device == "cuda" and overlap else [])


def test_a_batch_of_the_base_model_alone_is_left_alone():
    assert look(extend_batch([2], [None]), torch.full((2, 8), math.nan), torch.full((1, 50), math.nan)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_places_are_erased_in_every_layer_and_no_others(dtype):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(
        size=40, page_size=1, dtype=dtype, head_num=2, head_dim=16, layer_num=3, device="cpu", enable_memory_saver=False
    )
    for layer in range(3):
        for buffer in pool.get_kv_buffer(layer):
            buffer.fill_(math.nan)
    places = torch.tensor([3, 8, 9, 40])
    erase(pool, places)
    for layer in range(3):
        for buffer in pool.get_kv_buffer(layer):
            assert buffer[places].eq(0).all() and buffer.isnan().all(-1).all(-1).sum() == len(buffer) - len(places)
