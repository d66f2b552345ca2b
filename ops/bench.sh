#!/usr/bin/env bash
# Measures FedMoE beside what Redis, memory and HTTP do on the same machine in the same minutes.
#
#     bash ops/bench.sh --quick --out bench.json     what the bars need, in at most eight minutes
#     bash ops/bench.sh --out bench.json             all sizes and formats, with and without the append-only file
#     bash ops/bench.sh --only latency wire          these alone; --help lists them
#
# Prints a table and writes a JSON list of name, value, unit, min, max, n, bar, met. Compare ratios, and run it on a
# machine that does nothing else. The exit code is 0 if all was measured, whether the bars are met or not.
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONHOME
# The caller stays where they are, so that --out is theirs; the packages come from here.
PYTHONPATH=$root exec "$root/.venv/bin/python" -P -m ops.bench "$@"
