#!/usr/bin/env bash
# Starts `fedmoe worker run` with the given options in the background; pid file, log and settings: ops/lib.sh.
#
#     bash ops/start_worker.sh --stream sql_expert --data sql.jsonl                   its name: worker-sql_expert
#     bash ops/start_worker.sh --stream sql_expert --data more.jsonl --name alice     its name: worker-sql_expert-alice
#     bash ops/start_worker.sh --enrolment sql-1.toml --data sql.jsonl                its name: worker-sql_expert-sql-1
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

help_or_go_on worker run "$@"
name=$(worker_name "$@")
start_daemon "$name" worker run "$@"
