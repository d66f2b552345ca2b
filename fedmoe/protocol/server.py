"""The server optimizer: how the update that was just admitted moves an expert's weights, and what is remembered. Pure.

    sgd        weights += factor × Δ                                    remembers nothing
    nesterov   weights += factor × Δ, and at the end of a round also    the movement of this round and, shrinking, of
               weights += momentum × movement                           the rounds before
    adaptive   weights += factor × Δ / (√square + epsilon)              the mean square of past updates

What is remembered is one fp32 value for each weight: the *server state*. It is part of the same commit as the weights.

A *round* is as many applied updates as there are active workers. Momentum acts once a round, and not at every arrival:
M updates of one round point the same way, so momentum at each of them would count the same movement M times.

Sources: delayed Nesterov, Liu et al., arXiv 2401.09135, algorithm 3 with c = 0; adaptive, FedAdam without its first
moment (β₁ = 0), Reddi et al., arXiv 2003.00295, algorithm 2.
"""

from dataclasses import dataclass

from fedmoe.protocol.rules import ADAPTIVE, SGD, AggregationRules


@dataclass(frozen=True, slots=True)
class ServerStep:
    """The step of one update.

    Args:
        rules: in force.
        factor: of the update.
        ends_round: this update is the last of its round.
    """

    rules: AggregationRules
    factor: float
    ends_round: bool = False


def has_state(rules: AggregationRules) -> bool:
    """True if the server optimizer in force remembers something."""
    return rules.server_optimizer != SGD


def first_value(rules: AggregationRules) -> float:
    """The value with which every element of the server state begins."""
    return rules.server_epsilon**2 if rules.server_optimizer == ADAPTIVE else 0.0


def ends_round(version: int, round_version: int, active: int) -> bool:
    """True if the update applied at `version` is the last of its round.

    Args:
        version: of the expert before the update.
        round_version: of the expert when the round began.
        active: number of active workers (see `fedmoe.protocol.balance`).
    """
    return version + 1 - round_version >= active
