"""A masked language model's predictions on real rows, in the engine and in Transformers: a small RoBERTa with random
weights and the vocabulary of the real one."""

import json
from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from engine_process import EngineProcess
from sglang.srt.mezo.data.masked import MaskedEncoder
from sglang.srt.mezo.data.tasks import get_task
from sglang.srt.mezo.training.evaluate import EvaluateArguments
from sglang.srt.mezo.training.finetune import ModelArguments

SHARED = Path(__file__).resolve().parents[3] / "shared"
TOKENIZER = SHARED / "golden" / "tokenizer"
ROWS = 200
pytestmark = pytest.mark.skipif(not TOKENIZER.is_dir(), reason="the real vocabulary and real rows are not here")


def measured(engine, model: str, arguments: EvaluateArguments):
    from sglang.srt.mezo.training.evaluate import measure_on, read_evaluation

    return measure_on(engine, model, read_evaluation(ModelArguments(model, "float32"), arguments), arguments)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("roberta")
    tokenizer = RobertaTokenizer(*(str(TOKENIZER / name) for name in ("vocab.json", "merges.txt")))
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=514,
        type_vocab_size=1,
        initializer_range=0.2,
        architectures=["RobertaForMaskedLM"],
    )
    RobertaForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def engine(model):
    process = EngineProcess(
        model_path=model, r=1, target_modules=(), num_slots=1, dtype="float32", max_total_tokens=40000
    )
    yield process
    process.close()


@pytest.mark.parametrize("name", ["sst2", "sst5", "trec", "mnli", "snli", "rte", "mrpc"])
def test_predictions_on_real_rows_are_those_of_transformers(engine, model, name):
    folder = SHARED / "data" / name
    arguments = EvaluateArguments(task=name, dataset=str(folder), split="validation", rows=ROWS)
    metrics, told = engine.call(measured, model, arguments)
    lines = (folder / "validation.jsonl").read_text().splitlines()
    rows = [json.loads(lines[int(one["source"].rpartition(":")[2]) - 1]) for one in told]
    tokenizer = RobertaTokenizer.from_pretrained(model)
    encoder = MaskedEncoder(tokenizer, 512, get_task(name))  # whose ids are the official ones (test_golden_tasks)
    plain = RobertaForMaskedLM.from_pretrained(model).eval()
    found = set()
    for row, one in zip(rows, told, strict=True):
        [example] = encoder.encode(row)
        with torch.no_grad():
            read = plain(torch.tensor([example.prompt])).logits[0, example.mask]
        scores = read[[option[0] for option in example.options]]
        gaps = torch.tensor(one["scores"]) - scores
        assert (gaps - gaps[0]).abs().max() < 1e-4 and one["prediction"] == scores.argmax()
        found.add(one["prediction"])
    assert len(told) == ROWS and len(found) > 1
