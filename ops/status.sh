#!/usr/bin/env bash
# Lists the daemons that were started from here, then runs `fedmoe status` with the given options.
#
#     bash ops/status.sh --enrolment federation/enrolments/monitor.toml
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

started_here() {
    local name pid known
    mapfile -t known < <(names '')
    ((${#known[@]})) || say "nothing was started from here (pid files would be in $run_dir)"
    for name in "${known[@]}"; do
        if is_alive "$name"; then
            say "$name: running with pid $pid since $(date -r "$run_dir/$name.pid" '+%F %T') (log: $run_dir/$name.log)"
        else
            say "$name: died; it had pid $pid (log: $run_dir/$name.log)"
        fi
    done
}

if [[ " $* " == *' --json '* ]]; then
    started_here >&2 # standard output is JSON only
else
    started_here
fi
bin=$(fedmoe_bin)
exec "$bin" status "$@"
