#!/usr/bin/env bash
# Ends all that was started from here: the workers first, whose last updates the aggregator still has to decide.
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/lib.sh"

(($# == 0)) || die "takes no arguments"
mapfile -t workers < <(names worker)
((${#workers[@]})) || say "no worker is running"
stop_daemons "${workers[@]}"
stop_daemons aggregator
