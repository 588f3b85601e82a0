#!/usr/bin/env bash
# Makes .venv with this package in it, editable, unless it is there and up to date. Needs Python 3.11 or 3.12.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/.sglang-mezo
if [ -f "$stamp" ] && [ -z "$(find pyproject.toml scripts/setup.sh python/sglang/srt/mezo/*/*.c -newer "$stamp")" ]; then
    exit 0
fi
python=${PYTHON:-python3}
# SGLang has no wheels for 3.14, and a package that it needs none for 3.13.
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
    echo "Python 3.11 or 3.12 is needed, and $python is $("$python" -V 2>&1); set PYTHON to one" >&2
    exit 1
}
.venv/bin/python -m pip --version > /dev/null 2>&1 || "$python" -m venv --clear .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
rm -rf sglang_mezo.egg-info  # of an earlier installation: SGLang would load the entry points that it names
# Half of pip's time; pip itself where an index is set up for it alone.
.venv/bin/uv pip install --quiet --compile-bytecode --reinstall-package sglang-mezo --python .venv/bin/python -e ".[dev,plots]" \
    || .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev,plots]"
# What only linear probing imports lies beside: Transformers imports scikit-learn where it finds it, and every process of an
# engine would begin seconds later.
.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --no-deps --target .venv/scikit-learn \
    "scikit-learn>=1.8" joblib threadpoolctl narwhals \
    || .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv/scikit-learn \
        "scikit-learn>=1.8" joblib threadpoolctl narwhals
touch "$stamp"
