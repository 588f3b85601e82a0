"""``sglang-mezo evaluate``: loss and accuracy of an adapter, or of the base model, as a JSON object.

sglang-mezo evaluate --model facebook/opt-125m --task sst2
sglang-mezo evaluate --model facebook/opt-125m --adapter runs/mine/adapter --dataset rows.jsonl
"""

import json
from collections.abc import Sequence

from sglang.srt.mezo.commands.train import end
from sglang.srt.mezo.training.arguments import build, read
from sglang.srt.mezo.training.evaluate import EvaluateArguments, evaluate
from sglang.srt.mezo.training.finetune import ModelArguments

KINDS = (ModelArguments, EvaluateArguments)


def main(arguments: Sequence[str]) -> None:
    end(lambda: print(json.dumps(evaluate(*build(KINDS, read(arguments, KINDS, __doc__))))))
