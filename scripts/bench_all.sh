#!/usr/bin/env bash
# Make docs/benchmarks.md's figures: every part of scripts/bench_all.yaml whose result is not there yet, about six
# hours on two idle cores. In a virtual environment that is active, else in .venv, which it makes.
#   scripts/bench_all.sh [--out docs/benchmarks] [--only NAME ...] [--list]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    prepare dev
    PATH=$PWD/.venv/bin:$PATH
fi
PYTHONPATH=$PWD exec python scripts/bench_all.py "$@"
