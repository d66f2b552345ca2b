#!/usr/bin/env bash
# The whole of FedMoE on this machine: sets .venv up if need be, then `fedmoe demo` with what follows here.
#
#     bash ops/demo.sh
#     bash ops/demo.sh --help
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONPATH PYTHONHOME
exec "$root/.venv/bin/fedmoe" demo "$@"
