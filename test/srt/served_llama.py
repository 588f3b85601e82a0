"""A small Llama that is served, and what Transformers and PEFT answer."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

INVOCATION = [7, 8, 9]
DOCUMENT = list(range(100, 164))
SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def small_llama(context: int = 512) -> LlamaConfig:
    torch.manual_seed(0)
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        eos_token_id=2,
    )


def base_model(root: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(root / "base", dtype=torch.float32)


def ask(engine, prompts, adapters, logprobs_from=-1, **settings):
    return engine.generate(
        input_ids=prompts,
        lora_path=adapters,
        sampling_params={**SAMPLING, **settings},
        return_logprob=True,
        logprob_start_len=logprobs_from,
    )


def peft_answer(root: Path, prompt: list[int], adapter, **settings) -> tuple[list[int], torch.Tensor]:
    """Eight greedy tokens, and the log-probabilities of all tokens of the prompt but the first."""
    model = base_model(root)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, root / adapter)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        logprobs = torch.log_softmax(model.eval()(input_ids=ids).logits[0].float(), -1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **settings,
        )
    return out[0, len(prompt) :].tolist(), logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
