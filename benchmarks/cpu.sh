#!/usr/bin/env bash
# Every table of the README but accuracy, the study's runs and the soak, on a machine without a GPU and with nothing else running.
# A command adds to its file in benchmarks/results/, or makes it anew: each can be run alone. SmolLM2's need models/smollm2-135m.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
python=.venv/bin/python
out=benchmarks/results
model=models/smollm2-135m

$python benchmarks/step_time.py --workload sst2 --loops strong official --json $out/step_time.json
$python benchmarks/step_time.py --workload sst2 --tuning alora --loops strong_bfloat16 official_bfloat16 --repeats 5 --json $out/step_time_bfloat16.json
$python benchmarks/step_time.py --workload boolq multirc --tuning alora --loops strong --repeats 5 --json $out/step_time.json
$python benchmarks/step_time.py --workload copa multirc icl16 --tuning lora --loops official --repeats 5 --json $out/step_time.json
$python benchmarks/step_time.py --workload sst2 boolq --loops --repeats 7 --json $out/limit_share.json
$python benchmarks/directions.py --repeats 9 --json $out/directions.json
$python benchmarks/growth.py --tuning alora --repeats 15 --json $out/growth.json
$python benchmarks/growth.py --tuning lora --repeats 5 --json $out/growth.json
$python benchmarks/growth.py --tuning lora --quantity r --repeats 15 --json $out/growth.json
$python benchmarks/growth.py --tuning lora --quantity workload --repeats 9 --json $out/growth.json
$python benchmarks/small_pool.py --turns 7 --json $out/small_pool.json
$python benchmarks/memory.py --json $out/memory.json
$python benchmarks/startup.py --turns 8 --json $out/startup.json
OMP_NUM_THREADS=1 $python benchmarks/serve_while_train.py --json $out/serve_while_train.json
OMP_NUM_THREADS=1 $python benchmarks/serve_while_train.py --curve --pairs 8 --json $out/serve_while_train_curve.json

[ -d $model ] || exit 0
OMP_NUM_THREADS=1 $python benchmarks/streaming.py --model $model --dtype float32 --learning-rate 5e-3 --json $out/streaming.json
$python benchmarks/precision.py --model $model --json $out/precision.json
$python benchmarks/study.py time --model $model --variants plain two-sided default --json $out/study.json
OMP_NUM_THREADS=1 $python benchmarks/serve_while_train.py --model $model --load-seconds 60 --pairs 6 --json $out/serve_while_train_smollm2.json
