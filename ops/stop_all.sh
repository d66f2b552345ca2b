#!/usr/bin/env bash
# Ends all daemons that were started from here: workers first, because the aggregator must decide their last updates.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

(($# == 0)) || die "takes no arguments"
mapfile -t workers < <(names worker)
((${#workers[@]})) || say "no worker is running"
stop_daemons "${workers[@]}"
stop_daemons aggregator
