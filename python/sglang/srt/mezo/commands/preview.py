"""``sglang-mezo preview``: what the model sees of a data set's rows.

sglang-mezo preview --model facebook/opt-125m --task sst2
sglang-mezo preview --model facebook/opt-125m --dataset rows.jsonl --invocation " It was" --rows 10 --json
"""

import json
import sys
from collections.abc import Sequence

from sglang.srt.mezo.training.arguments import build, read, status_of
from sglang.srt.mezo.training.finetune import ModelArguments
from sglang.srt.mezo.training.preview import PreviewArguments, page, preview

KINDS = (ModelArguments, PreviewArguments)


def main(arguments: Sequence[str]) -> None:
    def show() -> None:
        model, wanted = build(KINDS, read(arguments, KINDS, __doc__))
        for example in preview(model, wanted):
            print(json.dumps(example, ensure_ascii=False) if wanted.json else page(example))

    sys.exit(status_of(show))
