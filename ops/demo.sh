#!/usr/bin/env bash
# Runs `fedmoe demo` with the given options on this machine; sets up .venv first if necessary.
#
#     bash ops/demo.sh
#     bash ops/demo.sh --help
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
bash "$root/ops/setup.sh"
unset PYTHONPATH PYTHONHOME
exec "$root/.venv/bin/fedmoe" demo "$@"
