#!/usr/bin/env bash
# Runs every check: linters, types, import rules, then the tests; sets up .venv first if necessary.
#
#     bash ops/test.sh
#     bash ops/test.sh tests/unit -k codec     arguments are for pytest; the linters always run
#     bash ops/test.sh --fast                  quick checks: within a minute on two cores, once mypy has its cache
#     TEST_PROCESSES=1 bash ops/test.sh        one test after the other; the default is two at a time
#
# --fast runs the unit tests, and each hazard once on one server. It leaves out tests/integration, tests/e2e,
# tests/protocol, the hazards without their rule, and tests marked `slow`. So run all checks before a merge.
#
# Stops at the first check that fails. Paths are relative to the root of the repository.
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
run pytest -n "${TEST_PROCESSES:-2}" "${selection[@]}" "$@" # exit code 5, a failure, if there is no test to run
