"""Which federations are searched: SMALL in the suite (a second or so each), BIG by `python -m tests.protocol`."""

from tests.protocol.state import Scope

TAIL = "bf16"  # experts of this format have a tail

SMALL = {
    "lost replies": Scope(units=1, faults={"lost": 1, "late": 1}),
    "kills": Scope(faults={"kill_worker": 1, "kill_aggregator": 1}),
    "kills, with a checkpoint in flight": Scope(
        checkpoints=True, units=1, faults={"kill_worker": 1, "lost": 1}
    ),
    "failover": Scope(faults={"failover": 1}),
    "failover and a killed worker": Scope(units=1, lag=2, faults={"failover": 1, "kill_worker": 1}),
    "failover and a killed worker without state directory": Scope(
        units=1, lag=2, disk=False, faults={"failover": 1, "kill_worker": 1}
    ),
    "failover and a killed aggregator": Scope(units=1, lag=3, faults={"failover": 1, "kill_aggregator": 1}),
    "two aggregators, paused past the lease": Scope(aggregators=2, faults={"lease": 1}),
    "two aggregators, refusals": Scope(aggregators=2, units=1, max_norm=0.5, faults={"lease": 1}),
    "expiry and hostile workers": Scope(units=1, faults={"expire": 1, "trim": 1}),
    "forged entries": Scope(units=1, faults={"forge": 2}),
    "two workers, too stale": Scope(workers=2, units=1, max_staleness=0),
    "momentum, two workers": Scope(workers=2, units=1, momentum=0.5),
    "momentum, kills": Scope(momentum=0.5, faults={"kill_worker": 1, "kill_aggregator": 1}),
    "momentum, failover": Scope(units=1, momentum=0.5, faults={"failover": 1}),
    "momentum, emptied": Scope(momentum=0.5, faults={"empty": 1}),
    "momentum, rolled back": Scope(momentum=0.5, faults={"rollback": 1}),
    "momentum, refusals, two aggregators": Scope(
        aggregators=2, units=1, momentum=0.5, max_norm=0.5, faults={"lease": 1}
    ),
    "tail": Scope(wire_format=TAIL, units=3),
    "tail, lost replies": Scope(wire_format=TAIL, units=1, faults={"lost": 1}),
    "tail, a killed aggregator": Scope(wire_format=TAIL, faults={"kill_aggregator": 1}),
    "tail, failover": Scope(wire_format=TAIL, units=1, lag=2, faults={"failover": 1}),
    "tail, emptied": Scope(wire_format=TAIL, units=1, faults={"empty": 1}),
    "tail, changed rules": Scope(wire_format=TAIL, units=1, faults={"rules": 1}),
    "tail, new lineage": Scope(wire_format=TAIL, units=1, faults={"new_lineage": 1}),
    "tail, copies expire": Scope(wire_format=TAIL, units=1, faults={"orphans": 1, "lost": 1}),
    "tail, a worker writes over its part, or removes it": Scope(
        wire_format=TAIL, units=1, faults={"spoil": 2, "expire": 1}
    ),
    "tail, without packed weights": Scope(wire_format=TAIL, units=1, faults={"unpack": 1}),
    "tail, two aggregators, one paused past the lease": Scope(
        wire_format=TAIL, aggregators=2, units=1, paused=True
    ),
    "tail, momentum": Scope(wire_format=TAIL, units=3, momentum=0.5),
    "tail, momentum, rolled back": Scope(wire_format=TAIL, units=1, momentum=0.5, faults={"rollback": 1}),
    "parts": Scope(parts=True),
    "parts, a reader beside a commit": Scope(parts=True, workers=2, units=1),
    "parts, orphans": Scope(parts=True, units=1, faults={"orphans": 1, "kill_aggregator": 1}),
    "parts, emptied": Scope(parts=True, units=1, faults={"empty": 1}),
    "parts, rolled back": Scope(parts=True, units=1, faults={"rollback": 1}),
    "parts, rolled back, orphans": Scope(parts=True, units=1, faults={"rollback": 1, "orphans": 1}),
    "parts, rolled back, lost replies": Scope(parts=True, units=1, faults={"rollback": 1, "lost": 1}),
    "parts, momentum": Scope(parts=True, momentum=0.5, units=1, faults={"kill_aggregator": 1}),
    "parts and tail": Scope(parts=True, wire_format=TAIL, units=1, faults={"kill_aggregator": 1}),
    "new lineage": Scope(faults={"new_lineage": 1}),
    "departure": Scope(units=1, disk=False, faults={"leave": 1, "kill_aggregator": 1}),
    "changed rules": Scope(workers=2, units=1, faults={"rules": 1}),
    "changed rules and a killed aggregator": Scope(faults={"rules": 1, "kill_aggregator": 1}),
    "held": Scope(units=1, faults={"hold": 1}),
    "emptied": Scope(faults={"empty": 1}),
    "emptied twice": Scope(units=1, faults={"empty": 2}),
    "emptied, nobody remembers": Scope(units=1, faults={"empty": 1, "kill_aggregator": 1}),
    "emptied, lost replies": Scope(units=1, faults={"empty": 1, "lost": 1}),
    "emptied, late replies": Scope(units=1, faults={"empty": 1, "late": 1}),
    "emptied, a killed worker": Scope(units=1, faults={"empty": 1, "kill_worker": 1}),
    "emptied, two aggregators": Scope(aggregators=2, units=1, faults={"empty": 1}),
    "emptied, a killed worker without state directory": Scope(
        units=1, disk=False, faults={"empty": 1, "kill_worker": 1}
    ),
    "emptied, departure": Scope(units=1, disk=False, faults={"empty": 1, "leave": 1}),
    "failover, departure": Scope(units=1, disk=False, lag=3, faults={"failover": 1, "leave": 1}),
    "rollback": Scope(faults={"rollback": 1}),
    "rollback, two workers": Scope(workers=2, units=1, faults={"rollback": 1}),
    "rollback and a killed worker": Scope(units=1, faults={"rollback": 1, "kill_worker": 1}),
    "rollback and a killed aggregator": Scope(units=1, faults={"rollback": 1, "kill_aggregator": 1}),
    "rollback and failover": Scope(units=1, lag=1, faults={"rollback": 1, "failover": 1}),
}

BIG = {
    "changed rules, emptied": Scope(units=1, faults={"rules": 1, "empty": 1}),
    "parts and tail, two aggregators": Scope(
        parts=True, wire_format=TAIL, units=1, aggregators=2, faults={"lease": 1}
    ),
    "parts, failover": Scope(parts=True, units=1, lag=2, faults={"failover": 1}),
    "parts, two aggregators": Scope(parts=True, units=1, aggregators=2, faults={"lease": 1}),
    "parts, lost replies": Scope(parts=True, units=1, faults={"lost": 1, "late": 1}),
    "tail, two workers": Scope(wire_format=TAIL, workers=2, units=1),
    "tail, two aggregators": Scope(wire_format=TAIL, aggregators=2, units=1, faults={"lease": 1}),
    "tail, changed rules": Scope(wire_format=TAIL, faults={"rules": 1}),
    "tail, emptied": Scope(wire_format=TAIL, faults={"empty": 1}),
    "tail, rolled back": Scope(wire_format=TAIL, units=1, faults={"rollback": 1}),
    "tail, two updates, rolled back": Scope(wire_format=TAIL, faults={"rollback": 1}),
    "tail, momentum, rolled back": Scope(wire_format=TAIL, momentum=0.5, faults={"rollback": 1}),
    "tail, two workers of two updates": Scope(wire_format=TAIL, workers=2),
    "tail, two aggregators, two updates": Scope(wire_format=TAIL, aggregators=2, faults={"lease": 1}),
    "tail, kills and failover": Scope(wire_format=TAIL, faults={"kill_aggregator": 1, "failover": 1}),
    "two workers": Scope(workers=2),
    "lost replies": Scope(faults={"lost": 2, "late": 1}),
    "lost replies, two aggregators": Scope(aggregators=2, units=1, faults={"late": 1, "lease": 1}),
    "lost replies and kills": Scope(faults={"lost": 1, "kill_worker": 1, "kill_aggregator": 1}),
    "kills, with checkpoints in flight": Scope(
        checkpoints=True, faults={"kill_worker": 2, "kill_aggregator": 1}
    ),
    "failover and a killed worker": Scope(faults={"failover": 1, "kill_worker": 1}),
    "failover and a lost reply": Scope(lag=9, faults={"failover": 1, "lost": 1}),
    "two aggregators, refusals": Scope(aggregators=2, units=1, max_norm=0.5, faults={"lease": 1, "lost": 1}),
    "two failovers": Scope(units=1, faults={"failover": 2}),
    "failover, two workers": Scope(workers=2, units=1, faults={"failover": 1}),
    "failover, two aggregators": Scope(aggregators=2, units=1, faults={"failover": 1, "lease": 1}),
    "failover, three updates": Scope(units=3, lag=14, faults={"failover": 1}),
    "refusals and failover": Scope(workers=2, units=1, max_staleness=0, faults={"failover": 1}),
    "refusals, two aggregators": Scope(
        workers=2, aggregators=2, units=1, max_staleness=0, faults={"lease": 1}
    ),
    "expiry and hostile workers": Scope(faults={"expire": 1, "trim": 1, "forge": 1}),
    "expiry and failover": Scope(units=1, faults={"expire": 1, "trim": 1, "failover": 1}),
    "departure": Scope(workers=2, units=1, disk=False, faults={"failover": 1, "leave": 1}),
    "changed rules, two aggregators": Scope(aggregators=2, units=1, faults={"rules": 1, "lease": 1}),
    "changed rules and failover": Scope(units=1, faults={"rules": 1, "failover": 1}),
    "changed rules, lost replies": Scope(faults={"rules": 1, "lost": 1}),
    "momentum, lost replies, two aggregators": Scope(
        aggregators=2, units=1, momentum=0.5, faults={"late": 1, "lease": 1}
    ),
    "momentum, changed rules": Scope(units=2, momentum=0.5, faults={"rules": 1}),
    "momentum, emptied, two workers": Scope(workers=2, units=1, momentum=0.5, faults={"empty": 1}),
    "held, two workers": Scope(workers=2, units=1, faults={"hold": 1}),
    "held, and a killed aggregator": Scope(units=1, faults={"hold": 1, "kill_aggregator": 1}),
    "held, and a killed worker": Scope(units=1, faults={"hold": 1, "kill_worker": 1}),
    "held, lost replies": Scope(units=1, faults={"hold": 1, "lost": 1}),
    "held, two aggregators": Scope(aggregators=2, units=1, faults={"hold": 1, "lease": 1}),
    "held twice": Scope(faults={"hold": 2}),
    "held, emptied": Scope(units=1, faults={"hold": 1, "empty": 1}),
    "held, expiry and trimming": Scope(units=1, faults={"hold": 1, "expire": 1, "trim": 1}),
    "new lineage, two workers": Scope(workers=2, units=1, faults={"new_lineage": 1}),
    "rollback, two workers of two updates": Scope(workers=2, faults={"rollback": 1}),
    "rollback, emptied": Scope(units=1, faults={"rollback": 1, "empty": 1}),
    "rollback and a killed worker": Scope(faults={"rollback": 1, "kill_worker": 1}),
    "rollback and failover": Scope(units=1, lag=4, faults={"rollback": 1, "failover": 1}),
    "rollback and failover, two workers": Scope(workers=2, units=1, faults={"rollback": 1, "failover": 1}),
    "rollback, two aggregators": Scope(aggregators=2, faults={"rollback": 1, "lease": 1}),
    "rollback, lost replies": Scope(faults={"rollback": 1, "lost": 1, "late": 1}),
    "two rollbacks": Scope(workers=2, units=1, faults={"rollback": 2}),
    "emptied, two workers": Scope(workers=2, units=1, faults={"empty": 1}),
    "emptied, refusals": Scope(workers=2, units=1, max_staleness=0, faults={"empty": 1}),
    "emptied and failover": Scope(units=1, faults={"empty": 1, "failover": 1}),
    "emptied, paused past the lease": Scope(aggregators=2, units=1, faults={"empty": 1, "lease": 1}),
    "emptied, paused past the lease, from the start": Scope(
        aggregators=2, units=1, paused=True, faults={"empty": 1}
    ),
}
