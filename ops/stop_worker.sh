#!/usr/bin/env bash
# Ends workers that start_worker.sh started. After SIGTERM they publish their last progress; after FEDMOE_STOP_WAIT_S
# seconds they get SIGKILL (ops/lib.sh).
#
#     bash ops/stop_worker.sh sql_expert-alice
#     bash ops/stop_worker.sh --stream sql_expert --name alice     the same worker, named as at its start
#     bash ops/stop_worker.sh --all
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

mapfile -t known < <(names worker)
case ${1:-} in
    '' | -h | --help)
        die "name a worker (${known[*]:-none was started here}), or give --stream and --name as at its start, or --all"
        ;;
    --all)
        ((${#known[@]})) || say "no worker is running"
        stop_daemons "${known[@]}"
        ;;
    --*)
        name=$(worker_name "$@")
        stop_daemons "$name"
        ;;
    *)
        [[ " ${known[*]} " == *" $1 "* ]] && name=$1 || name=worker-$1
        stop_daemons "$name"
        ;;
esac
