#!/usr/bin/env bash
# Sets up .venv and runs the main job; arguments go to the example.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
exec .venv/bin/python examples/mezo_opt_training.py "$@"
