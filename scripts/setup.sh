#!/usr/bin/env bash
# Makes .venv ready: system packages that are missing (apt, as root), the virtual environment,
# the package and its development tools. A second run with nothing to do takes milliseconds.
# With the word "cross": also the compiler for the arm64 guests of `make test-vm`.
set -euo pipefail
cd "$(dirname "$0")/.."

# The distribution's interpreter: its bcc (python3-bpfcc) is built for this one, and a machine may
# have another python3 first on PATH. Isolated all the same: bcc is found by path at run time.
python=/usr/bin/python3
venv=.venv
stamp=$venv/.setup-stamp

fail() { # message, hint
    printf 'error: %s\nhint: %s\n' "$1" "$2" >&2
    exit 3
}

cross=${1:-}
has_cross() {
    [ "$cross" != cross ] || [ "$(uname -m)" = aarch64 ] || command -v aarch64-linux-gnu-gcc >/dev/null
}

missing_packages() {
    if ! [ -x "$python" ]; then
        printf '%s\n' python3 python3-venv python3-bpfcc gcc libc6-dev
        return
    fi
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("bcc") is None)' || echo python3-bpfcc
    command -v gcc >/dev/null || echo gcc
    [ -e /usr/include/stdlib.h ] || echo libc6-dev
    has_cross || echo gcc-aarch64-linux-gnu libc6-dev-arm64-cross
}

install_packages() { # package...
    if ! command -v apt-get >/dev/null; then
        fail "missing here: $*" "install them with this distribution's own package manager"
    fi
    echo "installing: $*" >&2
    export DEBIAN_FRONTEND=noninteractive
    # First with the lists at hand: `apt-get update` costs time and is needed once at most.
    apt-get install -y --no-install-recommends "$@" </dev/null >/dev/null 2>&1 && return
    apt-get -qq update </dev/null >&2
    apt-get -qq -o Dpkg::Use-Pty=0 install -y --no-install-recommends "$@" </dev/null >/dev/null
}

# What an environment was made from: another interpreter, place or list of dependencies makes it stale.
origin() {
    printf '%s %s %s\n' "$("$python" -V 2>&1 || true)" "$PWD" "$(sha256sum <pyproject.toml)"
}
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(origin)" ] && [ -x "$venv/bin/vmatrace" ] && has_cross && exit 0

read -r -a missing <<<"$(missing_packages | tr '\n' ' ')"
if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -eq 0 ]; then
        install_packages "${missing[@]}"
    elif [[ " ${missing[*]} " == *" python3"?(-venv)" "* ]]; then
        fail "not root, and missing here: ${missing[*]}" "sudo apt-get install ${missing[*]}"
    else
        echo "note: missing here: ${missing[*]} (sudo apt-get install ${missing[*]}); going on without" >&2
    fi
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    fail "$python: version $("$python" -c 'import platform; print(platform.python_version())'), 3.11 or newer is needed" \
        "use Debian 12, Ubuntu 24.04 or newer"
fi

# A moved checkout or another interpreter leaves a broken environment behind: start afresh.
if [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    echo "making $venv with $("$python" -V) ($python)" >&2
    "$python" -m venv "$venv"
fi
echo "installing vmatrace and its tools into $venv" >&2
"$venv/bin/python" -m pip install -qq --disable-pip-version-check -e '.[dev]' </dev/null
origin >"$stamp"
