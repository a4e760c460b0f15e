# Sourced by quickstart.sh and test.sh: makes or reuses .venv with the extras asked for. Not to be run by itself.
#   prepare EXTRAS [-KIND]      EXTRAS as pip takes them, such as pretrain,wandb; with -oldest the environment is
#                               .venv-oldest, with the versions of constraints-oldest.txt
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

fail() {
    echo "shardopt: $*" >&2
    exit 1
}

# Those who call these have $venv, the environment's folder, and $pins, the file with its versions.
what_is_installed() {
    cat pyproject.toml "$pins" && pwd
}

is_installed() {
    what_is_installed | cmp -s - "$1"
}

install_by_pip() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$pins" "$@"
}

# The same packages in less time. What pip is told on this machine (where packages lie, what they may be) is told to uv,
# which does not read it; fails at a setting that has no counterpart here.
install_by_uv() {
    local key value
    local -x UV_FIND_LINKS UV_INDEX UV_DEFAULT_INDEX UV_CONSTRAINT UV_INDEX_STRATEGY=unsafe-best-match
    while IFS== read -r key value; do
        value=${value:1:-1} # 'quoted'
        value=${value//\\n/ }
        case ${key##*.} in
            find-links) : "${UV_FIND_LINKS:=${value// /,}}" ;;
            extra-index-url) : "${UV_INDEX:=$value}" ;;
            index-url) : "${UV_DEFAULT_INDEX:=$value}" ;;
            constraint) : "${UV_CONSTRAINT:=$value}" ;;
            cert) local -x SSL_CERT_FILE=${SSL_CERT_FILE:-$value} ;;
            disable-pip-version-check | default-timeout | timeout | no-cache-dir | cache-dir | no-color) ;;
            *) return 1 ;;
        esac
    done < <("$venv/bin/python" -m pip config list)
    # torch by pip: of a build in a folder and one of an index, uv takes another.
    install_by_pip uv torch &&
        "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --compile-bytecode -c "$pins" -e ".[$1]"
}

prepare() {
    local extras=$1 venv=.venv${2:-} pins=constraints${2:-}.txt python=${PYTHON:-python3} stamp log
    if [ ! -x "$venv/bin/python" ]; then
        command -v "$python" >/dev/null || fail "no $python here: install Python 3.11 or newer (or set PYTHON)"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "$("$python" --version) is too old: shardopt needs 3.11 or newer (or set PYTHON)"
        "$python" -m venv "$venv" 2>/dev/null ||
            fail "$python cannot make a virtual environment: install its venv module (Debian: python3-venv)"
    fi
    command -v "${CC:-cc}" >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        fail "no C compiler here: install gcc or clang (or set CC); the optimizer's CPU kernel is compiled at first use"
    stamp=$venv/installed-$(echo "$extras" | tr ',' '-')
    if ! is_installed "$stamp" && ! is_installed "$venv/installed-dev"; then # dev has all the other extras in it
        echo "Installing shardopt[$extras] into $venv"
        log=$venv/install.log
        install_by_uv "$extras" >"$log" 2>&1 || install_by_pip -e ".[$extras]" >>"$log" 2>&1 || {
            grep -m1 -E '^ERROR|No space|error:' "$log" >&2 || true
            fail "installing failed; pip's whole output is in $log"
        }
        what_is_installed >"$stamp"
    fi
}
