#!/usr/bin/env bash
# Lint, type-check and test. --all adds the long studies. --oldest only tests, with the lowest versions that pyproject.toml
# allows, in .venv-oldest (6 GB, unless pip finds torch's CPU build). Other arguments go to pytest (such as -k zero, or
# -n 0 to run the tests in this one process instead of two, each of which takes whole files).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

part() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@"
    printf -- '-- %s: %d.%d min\n' "$name" $(((SECONDS - began) / 60)) $(((SECONDS - began) % 60 * 10 / 60))
}

tests() {
    local python=$1
    shift
    part tests "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 15 "$@"
}

if [ "${1:-}" = "--oldest" ]; then
    shift
    part install prepare test -oldest
    # These need what the extra dev brings, or install into .venv; hosts of recipes have minimums of their own.
    tests .venv-oldest/bin/python -m "not slow" --ignore tests/recipes --ignore tests/test_readme.py \
        --ignore tests/test_wheels.py "$@"
    exit
fi
tier=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    tier=()
    shift
fi
part install prepare dev
part lint .venv/bin/ruff check .
part format .venv/bin/ruff format --check .
part types .venv/bin/mypy -n 2
tests .venv/bin/python "${tier[@]}" "$@"
