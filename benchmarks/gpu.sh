#!/usr/bin/env bash
# Every table on a machine with a GPU: from a checkout, with nothing else running. Results go to benchmarks/results/gpu/.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
python=.venv/bin/python
out=benchmarks/results/gpu
mkdir -p "$out"
$python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no GPU")'

# The oracles first: a fast step that is wrong is of no use.
$python -m pytest test/srt/test_trainer_oracle.py test/srt/test_opt_model.py

for model in opt-125m opt-1.3b opt-13b; do
    $python benchmarks/step_time.py --model $model --dtype bfloat16 --json "$out/step_time-$model.json"
done
for model in opt-125m opt-1.3b; do  # six engines hold the model at a time
    $python benchmarks/directions.py --model $model --dtype bfloat16 --json "$out/directions-$model.json"
done
$python benchmarks/growth.py --json "$out/growth.json"
$python benchmarks/small_pool.py --json "$out/small_pool.json"
$python benchmarks/serve_while_train.py --json "$out/serve_while_train.json"
$python benchmarks/serve_while_train.py --curve --json "$out/serve_while_train_curve.json"
$python benchmarks/startup.py --json "$out/startup.json"
