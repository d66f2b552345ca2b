# Functions of the start, stop and status scripts, which source this file.
#
# A daemon has a name (aggregator, worker-sql_expert-alice). The run directory holds NAME.pid (its pid and start time),
# NAME.log (appended to, never rotated) and .NAME.lock.
#
#     FEDMOE_RUN_DIR       the run directory; default: run/ in the root of the repository
#     FEDMOE_BIN           the program; default: .venv/bin/fedmoe in the repository, else fedmoe on PATH
#     FEDMOE_START_WAIT_S  seconds to wait for the first line in the log; default: 30. A daemon has started if it still
#                          runs one second after that line, or after this time without a line
#     FEDMOE_STOP_WAIT_S   seconds that a daemon may take to end before it is killed; default: 100. A worker publishes
#                          its last progress and waits for the decision (--drain, 30 s), then writes its last checkpoint
#                          (60 s at most): with a longer --drain, raise this too
# shellcheck shell=bash
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
run_dir=$(readlink -m "${FEDMOE_RUN_DIR:-$root/run}")
start_wait_s=${FEDMOE_START_WAIT_S:-30}
stop_wait_s=${FEDMOE_STOP_WAIT_S:-100}
# Packages come from .venv only, and the log is written without delay.
unset PYTHONPATH PYTHONHOME
export PYTHONUNBUFFERED=1

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

[[ $start_wait_s$stop_wait_s =~ ^[0-9]+$ ]] || die "FEDMOE_START_WAIT_S and FEDMOE_STOP_WAIT_S must be whole seconds"

fedmoe_bin() {
    local bin=${FEDMOE_BIN:-$root/.venv/bin/fedmoe}
    if [[ -z ${FEDMOE_BIN:-} && ! -x $bin ]]; then
        bin=fedmoe
    fi
    command -v "$bin" || die "there is no program $bin: run 'bash $root/ops/setup.sh' first, or name it in FEDMOE_BIN"
}

help_or_go_on() { # COMMAND SUBCOMMAND ARGUMENTS...: print the answer to --help here, not in a log
    local argument bin
    for argument; do
        if [[ $argument == --help || $argument == -h ]]; then
            bin=$(fedmoe_bin)
            exec "$bin" "$1" "$2" --help
        fi
    done
}

enrolled() { # KEY FILE: the text of a key in an enrolment file, empty if there is none
    [[ ! -r $2 ]] || sed -n "s/^$1 = \"\([A-Za-z0-9_.-]*\)\"\$/\1/p" "$2"
}

worker_name() { # ARGUMENTS of `fedmoe worker run`: worker-STREAM-NAME, without the parts that are not given
    local stream=${FEDMOE_WORKER_RUN_STREAM:-} name=${FEDMOE_WORKER_RUN_NAME:-} enrolment=${FEDMOE_ENROLMENT:-}
    while (($#)); do
        case $1 in
            --stream) stream=${2:-} ;;
            --stream=*) stream=${1#*=} ;;
            --name) name=${2:-} ;;
            --name=*) name=${1#*=} ;;
            --enrolment) enrolment=${2:-} ;;
            --enrolment=*) enrolment=${1#*=} ;;
        esac
        shift
    done
    stream=${stream:-$(enrolled expert "$enrolment")} name=${name:-$(enrolled name "$enrolment")}
    say "worker${stream:+-$stream}${name:+-$name}"
}

# ---- pid files ------------------------------------------------------------------------------------------------------

start_time() { # PID: in clock ticks after boot; pid and start time identify a process. Fails if it has ended.
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return
    # Count fields after the last ')', because the program's name before it may hold spaces and parentheses.
    read -r -a stat <<<"${stat##*) }"
    [[ ${stat[0]} != [ZX] ]] && say "${stat[19]}"
}

is_alive() { # NAME: sets pid. The start time tells whether another process has the pid by now.
    local started=''
    pid=''
    [[ ! -e $run_dir/$1.pid ]] || read -r pid started <"$run_dir/$1.pid" || true
    [[ $pid =~ ^[0-9]+$ && -n $started && $(start_time "$pid") == "$started" ]]
}

names() { # PREFIX: print the names of the daemons with a pid file
    local file
    for file in "$run_dir/$1"*.pid; do
        [[ ! -e $file ]] || basename "$file" .pid
    done
}

lock() { # NAME: until this script ends. Two scripts at once would start two daemons, or kill a draining one early.
    [[ $1 =~ ^[A-Za-z0-9_.-]+$ ]] || die "$1 cannot be a name: take letters, digits, '_', '-', '.'"
    if ! { mkdir -p "$run_dir" && [[ -w $run_dir ]]; } 2>/dev/null; then
        die "cannot write in $run_dir: run this as its owner, or name another directory in FEDMOE_RUN_DIR"
    fi
    exec {lock_fd}>"$run_dir/.$1.lock"
    if ! flock --nonblock "$lock_fd"; then
        say "$1: another script is starting or stopping it; waiting for that"
        flock "$lock_fd"
    fi
}

# ---- start and stop -------------------------------------------------------------------------------------------------

is_error() { # LINE of a log: does the daemon say that it cannot go on?
    [[ $1 == fedmoe:* || $1 == *'"level": "error", "logger": "fedmoe"'* ]]
}

start_daemon() { # NAME ARGUMENTS...: run `fedmoe ARGUMENTS` in the background, in the caller's directory
    local name=$1 log=$run_dir/$1.log bin pid before tick since_words=0
    shift
    bin=$(fedmoe_bin)
    lock "$name"
    if is_alive "$name"; then
        say "$name: already running with pid $pid (log: $log)"
        return
    fi
    before=$(stat -c %s "$log" 2>/dev/null || say 0)
    # In its own session, so that a closed terminal or Ctrl-C does not reach the daemon; and without the lock.
    setsid "$bin" "$@" </dev/null >>"$log" 2>&1 {lock_fd}>&- &
    pid=$!
    say "$pid $(start_time "$pid")" >"$run_dir/$name.pid"
    for ((tick = 0; tick < start_wait_s * 10; tick++)); do
        sleep 0.1
        if ! is_alive "$name"; then
            rm "$run_dir/$name.pid"
            tail -c "+$((before + 1))" "$log" | tail -n 20 >&2
            die "$name ended at once; its output is above, and in $log"
        fi
        # The first line comes after the imports, which take seconds; an error may come before a slow exit.
        if (($(stat -c %s "$log") > before)) && ! is_error "$(tail -n 1 "$log")" && ((++since_words > 10)); then
            break
        fi
    done
    say "$name: started with pid $pid (log: $log)"
}

stop_daemons() { # NAME...: ask all to end, then wait for all together; idempotent
    local name pid tick=0 running=()
    for name; do
        lock "$name"
        if ! is_alive "$name"; then
            rm -f "$run_dir/$name.pid"
            say "$name: not running"
        elif kill -TERM "$pid" 2>/dev/null || ! is_alive "$name"; then
            running+=("$name")
        else
            die "$name: pid $pid is another user's; stop it as that user"
        fi
    done
    for name in "${running[@]}"; do
        while is_alive "$name" && ((tick++ < stop_wait_s * 10)); do
            sleep 0.1
        done
        if is_alive "$name"; then
            kill -KILL -- "-$pid" # with its children: it leads its session
            for _ in {1..50}; do # at most five seconds until the kernel has done it
                is_alive "$name" || break
                sleep 0.1
            done
            say "$name: killed (pid $pid), because it had not ended after $stop_wait_s s"
        else
            say "$name: stopped (pid $pid)"
        fi
        rm "$run_dir/$name.pid"
    done
}
