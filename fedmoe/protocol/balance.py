"""Balance: how much each worker of an expert counts beside the others. Pure.

Each worker counts the same, or each domain does: then ten workers of one domain do not outweigh one of another. With M
active workers of D domains, n of them of this worker's domain, its updates weigh M / (D · n). So the weights of all
active workers have the mean 1, and a round of updates counts as much as without balance.

A worker is active if its last update was decided within the last `active_versions` versions. So the weight depends only
on the expert's committed state, not on clocks. On the gateway a worker's name tells its domain (`sql_expert.alice`); on
any other expert all workers are of one domain.
"""

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from fedmoe.protocol.names import GATEWAY, domain_of
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rules import BY_DOMAIN, NESTEROV, AggregationRules

LEAST_ACTIVE_VERSIONS = 64
ROUNDS = 4  # a round: every worker publishes once


class Peers(NamedTuple):
    """The workers beside which an update counts.

    Args:
        known: number of workers that ever had an update decided.
        weight: of the update's worker.
        active: number of active workers, 1 if no rule in force asks for it.
    """

    known: int
    weight: float = 1.0
    active: int = 1


def active_versions(known: int) -> int:
    """For how many versions after its last decision a worker counts as active, of `known` workers."""
    return max(LEAST_ACTIVE_VERSIONS, ROUNDS * known)


def active_of(decided: Mapping[str, Decided], version: int) -> dict[str, Decided]:
    """The last decided updates of the workers that are active at a version of the expert."""
    since = version - active_versions(len(decided))
    return {name: last for name, last in decided.items() if last.version >= since}


def peers_of(
    expert: str, worker: str, decided: Mapping[str, Decided], version: int, rules: AggregationRules
) -> Peers:
    """The peers of a worker (itself one of them) at a version, under the rules in force.

    Args:
        expert: its name; only the gateway has workers of several domains.
        worker: whose update is to be decided.
        decided: the last decided update of each worker.
        version: of the expert, before the update.
        rules: in force.
    """
    is_balanced = rules.balance == BY_DOMAIN and expert == GATEWAY
    if not is_balanced and rules.server_optimizer != NESTEROV:
        return Peers(len(decided))
    active = {*active_of(decided, version), worker}
    if not is_balanced:
        return Peers(len(decided), active=len(active))
    domains = Counter(map(domain_of, active))
    weight = len(active) / (len(domains) * domains[domain_of(worker)])
    return Peers(len(decided), weight, len(active))
