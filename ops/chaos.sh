#!/usr/bin/env bash
# Kills everything again and again, then counts: what was published, and what became of it.
#
#     bash ops/chaos.sh --kills 60 --seed 1
#
# A real Redis, two aggregators and six workers as real processes; kill -9, SIGSTOP, cut connections, lost replies, an
# append-only file whose last second is gone. The last line is the ledger; the exit code is 0 only if nothing is lost
# and nothing doubled, and a replay of the log gives the weights byte for byte.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONPATH PYTHONHOME
cd "$root"
exec .venv/bin/python -m tests.chaos "$@"
