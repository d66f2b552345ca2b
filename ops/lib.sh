# What the start, stop and status scripts share; sourced by them, never run.
#
# A daemon has a name (aggregator, worker-sql_expert-alice). In the run directory lie NAME.pid (its pid and start
# time), NAME.log (appended to, never rotated) and .NAME.lock.
#
#     FEDMOE_RUN_DIR       that directory; default: run/ in the root of the repository
#     FEDMOE_BIN           the program; default: .venv/bin/fedmoe there, else fedmoe on PATH
#     FEDMOE_START_WAIT_S  a daemon has started when it lives one second after its first words in the log, or after
#                          so many seconds without any; default: 30
#     FEDMOE_STOP_WAIT_S   seconds it may take to end before it is killed; default: 60. A worker publishes what it has
#                          trained and waits for the decision: keep this above its --drain.
# shellcheck shell=bash
set -euo pipefail

root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
run_dir=$(readlink -m "${FEDMOE_RUN_DIR:-$root/run}")
start_wait_s=${FEDMOE_START_WAIT_S:-30}
stop_wait_s=${FEDMOE_STOP_WAIT_S:-60}
# .venv alone decides where the packages come from; and a log is of use only if it is up to date.
unset PYTHONPATH PYTHONHOME
export PYTHONUNBUFFERED=1

say() { printf '%s\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

[[ $start_wait_s$stop_wait_s =~ ^[0-9]+$ ]] || die "FEDMOE_START_WAIT_S and FEDMOE_STOP_WAIT_S are whole seconds"

fedmoe_bin() {
    local bin=${FEDMOE_BIN:-$root/.venv/bin/fedmoe}
    if [[ -z ${FEDMOE_BIN:-} && ! -x $bin ]]; then
        bin=fedmoe
    fi
    command -v "$bin" || die "there is no program $bin: run 'bash $root/ops/setup.sh' first, or name it in FEDMOE_BIN"
}

help_or_go_on() { # COMMAND SUBCOMMAND ARGUMENTS...: --help is answered here and now, not in a log
    local argument bin
    for argument; do
        if [[ $argument == --help || $argument == -h ]]; then
            bin=$(fedmoe_bin)
            exec "$bin" "$1" "$2" --help
        fi
    done
}

worker_name() { # ARGUMENTS of `fedmoe worker run`: worker-STREAM-NAME, less what they do not say
    local stream=${FEDMOE_WORKER_RUN_STREAM:-} name=${FEDMOE_WORKER_RUN_NAME:-}
    while (($#)); do
        case $1 in
            --stream) stream=${2:-} ;;
            --stream=*) stream=${1#*=} ;;
            --name) name=${2:-} ;;
            --name=*) name=${1#*=} ;;
        esac
        shift
    done
    say "worker${stream:+-$stream}${name:+-$name}"
}

# ---- pid files ------------------------------------------------------------------------------------------------------

start_time() { # PID: in clock ticks after boot; with the pid it names one process for good. Fails if that has ended.
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return
    # Fields count from behind the last ')': the program's name before it may hold spaces and parentheses.
    read -r -a stat <<<"${stat##*) }"
    [[ ${stat[0]} != [ZX] ]] && say "${stat[19]}"
}

is_alive() { # NAME: sets pid. A pid that belongs to another process by now is not alive: its start time differs.
    local started=''
    pid=''
    [[ ! -e $run_dir/$1.pid ]] || read -r pid started <"$run_dir/$1.pid" || true
    [[ $pid =~ ^[0-9]+$ && -n $started && $(start_time "$pid") == "$started" ]]
}

names() { # PREFIX: of the daemons that have a pid file
    local file
    for file in "$run_dir/$1"*.pid; do
        [[ ! -e $file ]] || basename "$file" .pid
    done
}

lock() { # NAME: until this script ends. Two at once would start two daemons, or hurry one that is draining.
    [[ $1 =~ ^[A-Za-z0-9_.-]+$ ]] || die "$1 is no name: a stream's and a worker's hold letters, digits, '_', '-', '.'"
    if ! { mkdir -p "$run_dir" && [[ -w $run_dir ]]; } 2>/dev/null; then
        die "cannot write in $run_dir: be its owner, or name another directory in FEDMOE_RUN_DIR"
    fi
    exec {lock_fd}>"$run_dir/.$1.lock"
    if ! flock --nonblock "$lock_fd"; then
        say "$1: another script is starting or stopping it; waiting for that"
        flock "$lock_fd"
    fi
}

# ---- start and stop -------------------------------------------------------------------------------------------------

start_daemon() { # NAME ARGUMENTS...: `fedmoe ARGUMENTS` in the background, in the caller's directory
    local name=$1 log=$run_dir/$1.log bin pid before tick since_words=0
    shift
    bin=$(fedmoe_bin)
    lock "$name"
    if is_alive "$name"; then
        say "$name: already running with pid $pid (log: $log)"
        return
    fi
    before=$(stat -c %s "$log" 2>/dev/null || say 0)
    # A session of its own, so that no closed terminal and no Ctrl-C in it reaches the daemon; and without the lock.
    setsid "$bin" "$@" </dev/null >>"$log" 2>&1 {lock_fd}>&- &
    pid=$!
    say "$pid $(start_time "$pid")" >"$run_dir/$name.pid"
    for ((tick = 0; tick < start_wait_s * 10; tick++)); do
        sleep 0.1
        if ! is_alive "$name"; then
            rm "$run_dir/$name.pid"
            tail -c "+$((before + 1))" "$log" | tail -n 20 >&2
            die "$name ended at once; what it said is above, and in $log"
        fi
        # Words come when all is imported, which takes seconds; "fedmoe: …" are its last, but Python is slow to end.
        if (($(stat -c %s "$log") > before)) && [[ $(tail -n 1 "$log") != fedmoe:* ]] && ((++since_words > 10)); then
            break
        fi
    done
    say "$name: started with pid $pid (log: $log)"
}

stop_daemons() { # NAME...: asks all to end, then waits for all together; idempotent
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
            kill -KILL -- "-$pid" # with all that it started: it leads its session
            say "$name: killed (pid $pid), since it had not ended after $stop_wait_s s"
        else
            say "$name: stopped (pid $pid)"
        fi
        rm "$run_dir/$name.pid"
    done
}
