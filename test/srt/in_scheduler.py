"""Requests and adapters through the scheduler of an engine in this process: what a server does, without its other
processes."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

import torch


@dataclass
class Answer:
    """Log-probabilities of the prompt's tokens from the second on, the tokens that follow, and theirs."""

    prompt_log_probs: list[float]
    tokens: list[int]
    log_probs: list[float]


def load_adapter(engine, name: str, path: str) -> str:
    """Load a PEFT folder as ``/load_lora_adapter`` does; returns its id."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput

    request = LoadLoRAAdapterReqInput(lora_name=name, lora_path=path, lora_id=uuid4().hex)
    result = engine.scheduler.load_lora_adapter(request)
    assert result.success, result.error_message
    return request.lora_id


def answers(
    engine, prompts: Sequence[Sequence[int]], lora_ids: Sequence[str | None], max_new_tokens: int
) -> list[Answer]:
    """Greedy answers to requests that come together."""
    scheduler, outputs = engine.scheduler, _Outputs()
    streamer, sender = scheduler.output_streamer, scheduler.output_streamer.send_to_detokenizer
    streamer.send_to_detokenizer = outputs
    try:
        names = [uuid4().hex for _ in prompts]
        for name, prompt, lora_id in zip(names, prompts, lora_ids, strict=True):
            scheduler.handle_generate_request(_request(scheduler, name, prompt, lora_id, max_new_tokens))
        while len(outputs.finished) < len(names):
            with torch.inference_mode():
                _run_once(scheduler)
    finally:
        streamer.send_to_detokenizer = sender
    return [outputs.finished[name] for name in names]


def _request(scheduler, name: str, prompt: Sequence[int], lora_id: str | None, max_new_tokens: int):
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0, ignore_eos=True)
    sampling.normalize(None)
    return TokenizedGenerateReqInput(
        rid=name,
        input_text=None,
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=0,
        token_ids_logprob=None,
        stream=False,
        lora_id=lora_id,
    )


def _run_once(scheduler) -> None:
    """The body of ``Scheduler.event_loop_normal``."""
    plan = scheduler.get_next_batch_to_run(running_batch=scheduler.running_batch, last_batch=scheduler.last_batch)
    scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
    if batch:
        scheduler.process_batch_result(batch, scheduler.run_batch(batch))
    scheduler.last_batch = batch


class _Outputs:
    """Takes what the scheduler sends to the detokenizer."""

    def __init__(self):
        self.finished: dict[str, Answer] = {}

    def send_output(self, output, *_):
        for i, name in enumerate(output.rids):
            if output.finished_reasons[i] is not None:
                assert output.finished_reasons[i]["type"] == "length", output.finished_reasons[i]
                self.finished[name] = Answer(
                    list(output.input_token_logprobs_val[i][1:]),
                    list(output.output_ids[i]),
                    list(output.output_token_logprobs_val[i]),
                )
