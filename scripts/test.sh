#!/usr/bin/env bash
# Lint, type-check and test. --all adds the long studies; other arguments go to pytest (such as -k zero, or -n 0 to
# run the tests in this one process instead of two, each of which takes whole files).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

part() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@"
    printf -- '-- %s: %d.%d min\n' "$name" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60 * 10 / 60))
}

tier=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    tier=()
    shift
fi
part install prepare dev
part lint .venv/bin/ruff check .
part format .venv/bin/ruff format --check .
part types .venv/bin/mypy
part tests .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 "${tier[@]}" "$@"
