"""MeZO without a trainer: the algorithm, flat, on the same engine as examples/mezo_opt_training.py.

    python examples/mezo_minimal_loop.py [--steps 600] [--learning_rate 3e-3] [--zo_eps 1e-2]

Algorithm 1 of arXiv 2305.17333 with an activated LoRA adapter: it acts from " It was" on, so the KV of every sentence
is computed once, by the base model, and stays right for both signs and all steps.
"""

import argparse
import os
import random
from pathlib import Path

from tqdm import trange
from transformers import AutoTokenizer

from sglang.srt.mezo.adapters.adapter import Adapter, AdapterSpec
from sglang.srt.mezo.core.noise import direction, step_seed
from sglang.srt.mezo.core.passes import drain
from sglang.srt.mezo.data.examples import Encoder
from sglang.srt.mezo.data.rows import read_rows
from sglang.srt.mezo.data.tasks import SST2
from sglang.srt.mezo.engine.handle import MezoEngine
from sglang.srt.mezo.engine.layers import adapted_sites
from sglang.srt.mezo.engine.slots import Slot, SlotLayout
from sglang.srt.mezo.scoring.plan import Planner
from sglang.srt.mezo.scoring.readout import batch_loss, predictions
from sglang.srt.mezo.scoring.scorer import Scorer

ASSETS = Path(__file__).parent / "assets"
MODEL = str(ASSETS / "opt-reviews")
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
RANK, ALPHA, BATCH_SIZE, SEED = 8, 16, 16, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--zo_eps", type=float, default=1e-2)
    arguments = parser.parse_args()

    # Data: sentences to token ids to score plans (which tokens are shared prefix, which are run, what is read).
    task = SST2()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    invocation = tuple(tokenizer(task.invocation, add_special_tokens=False).input_ids)
    encoder = Encoder(tokenizer, max_length=512, task=task, invocation=invocation)
    planner = Planner("alora", invocation)
    train, test = (
        [planner.plan(example) for example in encoder.encode_rows(read_rows(str(ASSETS / "reviews"), split))]
        for split in ("train", "test")
    )

    # Engine: three LoRA slots, for theta + eps z, theta - eps z and theta.
    engine = MezoEngine(MODEL, r=RANK, target_modules=TARGETS, num_slots=3, dtype="float32", log_level="error")
    spec = AdapterSpec(MODEL, RANK, ALPHA, TARGETS, invocation)
    adapter = Adapter.initial(spec, adapted_sites(engine.handle, TARGETS), SEED)
    layout = SlotLayout(engine.handle, adapter)
    plus, minus, current = (Slot(engine.handle, spec, layout, name) for name in ("plus", "minus", "current"))
    scorer = Scorer(engine.handle, planner.scope, max_tokens=4096)
    theta = adapter.theta  # float32 [parameters]

    def accuracy() -> float:
        current.write(theta)
        right = 0
        for start in range(0, len(test), 64):
            plans = test[start : start + 64]
            values = drain(scorer.passes(plans, [(current.point,)], "classification"))
            right += sum(int(p) == plan.label for p, plan in zip(predictions(plans, values)[0], plans))
        return right / len(test)

    print(f"zero-shot accuracy {accuracy():.3f}")
    order = random.Random(SEED)
    for step in (bar := trange(arguments.steps)):
        batch = order.sample(train, BATCH_SIZE)
        zo_random_seed = step_seed(SEED, step)
        z = direction(zo_random_seed, 0, theta.numel())
        plus.write(theta + arguments.zo_eps * z)
        minus.write(theta - arguments.zo_eps * z)
        values = drain(scorer.passes(batch, [(plus.point, minus.point)], "classification"))
        loss_plus, loss_minus = batch_loss(batch, values, "classification").mean.tolist()
        projected_grad = (loss_plus - loss_minus) / (2 * arguments.zo_eps)
        learning_rate = arguments.learning_rate * (1 - step / arguments.steps)
        theta -= learning_rate * projected_grad * z
        bar.set_postfix(loss=f"{(loss_plus + loss_minus) / 2:.4f}", projected_grad=f"{projected_grad:+.3f}")
    print(f"trained accuracy {accuracy():.3f}")


if __name__ == "__main__":
    main()
    os._exit(0)  # the engine's threads are of no further use
