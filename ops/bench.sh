#!/usr/bin/env bash
# Measures FedMoE beside Redis, memory and HTTP on the same machine in the same minutes.
#
#     bash ops/bench.sh --quick --out bench.json     only the measurements with a bar, in at most eight minutes
#     bash ops/bench.sh --out bench.json             all sizes and formats, with and without the append-only file
#     bash ops/bench.sh --only latency wire          only these parts; --help lists all
#     bash ops/bench.sh --only before --before REV   beside the release before, a git revision
#
# Prints a table and writes a JSON list of name, value, unit, min, max, n, bar, met. Compare ratios, and run it on an
# idle machine. The exit code is 0 if everything was measured, whether the bars are met or not.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONHOME
# The working directory stays that of the caller, so that --out is relative to it; the packages come from here.
PYTHONPATH=$root exec "$root/.venv/bin/python" -P -m ops.bench "$@"
