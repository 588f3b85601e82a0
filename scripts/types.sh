#!/usr/bin/env bash
# Checks types with pyright, in an environment that scripts/setup.sh has made.
set -euo pipefail
cd "$(dirname "$0")/.."
# Our part of SGLang's package lies in another tree, and pyright knows a package from one place: here they are together.
installed=$(.venv/bin/python -c "import importlib.metadata as m; print(m.distribution('sglang').locate_file('sglang'))")
together=build/types/sglang
rm -rf "$together" && mkdir -p "$together/srt"
for path in "$installed"/*; do [ "${path##*/}" = srt ] || ln -s "$path" "$together/"; done
for path in "$installed"/srt/*; do ln -s "$path" "$together/srt/"; done
ln -sfn "$PWD/python/sglang/srt/mezo" "$together/srt/mezo"
.venv/bin/basedpyright
