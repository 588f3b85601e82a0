"""What the main job trains is what the engine serves and what PEFT computes from the saved files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine_process import ServingEngine

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "assets" / "opt-reviews"
TEXTS = [
    "the plot is thin, but the acting is superb. It was great",
    "never again will i eat here. It was terrible",
    "no invocation here",
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, str]:
    """Two adapters after a few steps that are large enough to matter."""
    folders = {}
    for tuning in ("alora", "lora"):
        folder = tmp_path_factory.mktemp(tuning) / "run"
        command = [
            "examples/mezo_opt_training.py",
            "--output_dir",
            str(folder),
            "--tuning",
            tuning,
            "--max_steps",
            "20",
            "--learning_rate",
            "0.05",
            "--num_test",
            "16",
            "--num_dev",
            "16",
            "--no_load_best_model_at_end",
        ]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, timeout=600)
        folders[tuning] = str(folder / "adapter")
    return folders


def peft_log_probs(adapter: str | None, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        log_probs = torch.log_softmax(model.eval()(input_ids=torch.tensor([ids])).logits[0], dim=-1)
    return log_probs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_served_log_probabilities_equal_peft(adapters):
    ids = AutoTokenizer.from_pretrained(MODEL)(TEXTS).input_ids
    engine = ServingEngine(
        model_path=str(MODEL),
        dtype="float32",
        enable_lora=True,
        lora_paths=adapters,
        max_loras_per_batch=4,
        log_level="error",
    )
    try:
        requests = [(name, tokens) for name in (None, "alora", "lora") for tokens in ids]
        served = engine.generate(
            input_ids=[tokens for _, tokens in requests],
            lora_path=[name for name, _ in requests],
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            logprob_start_len=0,
        )
    finally:
        engine.close()
    for (name, tokens), answer in zip(requests, served, strict=True):
        got = torch.tensor([value for value, *_ in answer["meta_info"]["input_token_logprobs"][1:]])
        expected = peft_log_probs(adapters.get(name), tokens)
        assert torch.allclose(got, expected, atol=1e-4, rtol=0)
        if name is not None and TEXTS[2] not in TEXTS[ids.index(tokens)]:
            assert (expected - peft_log_probs(None, tokens)).abs().max() > 1e-2, "the adapter must matter"
