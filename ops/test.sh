#!/usr/bin/env bash
# Every check there is: linters, types, the rooms' walls, then the tests; sets .venv up if need be.
#
#     bash ops/test.sh
#     bash ops/test.sh tests/unit -k codec     what follows is for pytest; the linters always run, they are quick
#     bash ops/test.sh --fast                  while you work: within a minute on two cores, once mypy has its cache
#     TEST_PROCESSES=1 bash ops/test.sh        one test after the other; else two at a time
#
# --fast runs the unit tests and each hazard once, on one server. It leaves out tests/integration, tests/e2e and
# tests/protocol, that each hazard is found without its rule, and what is marked `slow`. So run all before a merge.
#
# Stops at the first that fails. Paths are relative to the root of the repository.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
selection=()
if [[ ${1:-} == --fast ]]; then
    shift
    selection=(-m "not slow" --one-server tests/unit tests/hazards/test_hazards.py::test_holds)
fi
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
run pytest -n "${TEST_PROCESSES:-2}" "${selection[@]}" "$@" # exits with 5, which is a failure, if it finds no test to run
