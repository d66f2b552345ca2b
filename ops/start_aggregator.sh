#!/usr/bin/env bash
# Starts `fedmoe aggregator run` with the given options in the background; pid file, log and settings: ops/lib.sh.
#
#     bash ops/start_aggregator.sh --enrolment federation/enrolments/aggregator.toml
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

help_or_go_on aggregator run "$@"
start_daemon aggregator aggregator run "$@"
