#!/usr/bin/env bash
# Every check there is: linters, types, the rooms' walls, then the tests; sets .venv up if need be.
#
#     bash ops/test.sh
#     bash ops/test.sh tests/unit -k codec     what follows is for pytest; the linters always run, they are quick
#     TEST_PROCESSES=1 bash ops/test.sh        one test after the other; else two at a time
#
# Stops at the first that fails. Paths are relative to the root of the repository.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONPATH PYTHONHOME
cd "$root"

run() {
    printf '\n== %s\n' "$*"
    ".venv/bin/$1" "${@:2}"
}

run shellcheck -x -P SCRIPTDIR .ci/run ops/*.sh
run ruff check
run ruff format --check
run mypy
run mypy --config-file ops/mypy-tests.ini tests ops/bench
run lint-imports --no-logo
run pytest -n "${TEST_PROCESSES:-2}" "$@" # exits with 5, which is a failure, if it finds no test to run
