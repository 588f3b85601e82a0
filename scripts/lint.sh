#!/usr/bin/env bash
# Sets up .venv and looks at code and docs: format, lint, types, links. `bash scripts/lint.sh --fix` mends what can be mended.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
if [ "${1:-}" = --fix ]; then
    .venv/bin/ruff check --fix .
    .venv/bin/ruff format .
else
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    bash scripts/types.sh
    NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
fi
