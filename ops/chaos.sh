#!/usr/bin/env bash
# Kills processes again and again, then counts the published updates and their decisions.
#
#     bash ops/chaos.sh --kills 60 --seed 1
#     bash ops/chaos.sh --kills 60 --tls
#     bash ops/chaos.sh --kills 100 --cluster
#     bash ops/chaos.sh --kills 100 --cluster --valkey
#
# It runs a real Redis, three aggregators, which share three experts, and six workers as processes. The faults are
# kill -9, SIGSTOP, cut connections, lost replies, and an append-only file without its last second; with --cluster, on
# three masters and three replicas, they are killed and frozen masters, failovers and moved slots. The last line is the
# ledger. The exit code is 0 only if no update is lost, none is doubled, and a replay of the log gives the weights byte
# for byte.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONPATH PYTHONHOME
cd "$root"
exec .venv/bin/python -m tests.chaos "$@"
