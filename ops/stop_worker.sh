#!/usr/bin/env bash
# Ends workers that start_worker.sh started: SIGTERM, upon which they publish what they have trained, and SIGKILL if
# they take longer than FEDMOE_STOP_WAIT_S (ops/lib.sh).
#
#     bash ops/stop_worker.sh sql_expert-alice
#     bash ops/stop_worker.sh --stream sql_expert --name alice     the same, named as it was started
#     bash ops/stop_worker.sh --all
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

mapfile -t known < <(names worker)
case ${1:-} in
    '' | -h | --help)
        die "say which: a name (${known[*]:-there is none here}), --stream and --name as it was started, or --all"
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
