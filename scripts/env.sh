# Sourced by quickstart.sh and test.sh: makes or reuses .venv with the extras asked for. Not to be run by itself.
#   prepare EXTRAS      EXTRAS as pip takes them, such as pretrain,wandb
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    echo "shardopt: $*" >&2
    exit 1
}

what_is_installed() {
    cat pyproject.toml constraints.txt && pwd
}

is_installed() {
    what_is_installed | cmp -s - "$1"
}

prepare() {
    local extras=$1 python=${PYTHON:-python3} stamp log
    if [ ! -x .venv/bin/python ]; then
        command -v "$python" >/dev/null || fail "no $python here: install Python 3.11 or newer (or set PYTHON)"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "$("$python" --version) is too old: shardopt needs 3.11 or newer (or set PYTHON)"
        "$python" -m venv .venv 2>/dev/null ||
            fail "$python cannot make a virtual environment: install its venv module (Debian: python3-venv)"
    fi
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        fail "no C compiler here: install gcc or clang (or set CC); the optimizer's CPU kernel is compiled at first use"
    stamp=.venv/installed-$(echo "$extras" | tr ',' '-')
    if ! is_installed "$stamp" && ! is_installed .venv/installed-dev; then # dev has all the other extras in it
        echo "Installing shardopt[$extras] into .venv"
        log=.venv/install.log
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]" \
            >"$log" 2>&1 || {
            grep -m1 -E '^ERROR|No space|error:' "$log" >&2 || true
            fail "installing failed; pip's whole output is in $log"
        }
        what_is_installed >"$stamp"
    fi
}
