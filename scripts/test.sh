#!/usr/bin/env bash
# Sets up .venv and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
# Quick tests start no server and no engine, so two processes of them do not stand in each other's way.
case " $* " in *" --quick "*) set -- -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 "$@" ;; esac
exec .venv/bin/python -m pytest "$@"
