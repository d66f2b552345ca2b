#!/usr/bin/env bash
# Ends the aggregator that start_aggregator.sh started: SIGTERM, then SIGKILL if it does not end (ops/lib.sh).
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

(($# == 0)) || die "takes no arguments"
stop_daemons aggregator
