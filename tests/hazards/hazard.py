"""A hazard: what goes wrong without its rule, the rule, the scenario, and how the rule is taken out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import consumers.aggregator as aggregator
import producers.membership as membership
from tests.hazards.world import World

Patch = tuple[Any, str, Any]  # what to replace: object, attribute, replacement


@dataclass(frozen=True)
class Hazard:
    """One way in which a looser protocol fails.

    Args:
        wrong: what goes wrong without the rule.
        rule: the rule of the protocol that prevents it.
        scenario: plays it on a real server and asserts the outcome.
        without: takes exactly this rule out of the project's code.
        symptom: part of the message with which the assertion of the scenario fails without the rule.
        errors: unexpected errors that a process raises without the rule, if that is the failure.
    """

    wrong: str
    rule: str
    scenario: Callable[[World], None]
    without: tuple[Patch, ...]
    symptom: str
    errors: frozenset[str] = frozenset()


def of_store(kind: type) -> tuple[Patch, ...]:
    return ((aggregator, "ExpertStore", kind),)


def of_expert(kind: type) -> tuple[Patch, ...]:
    return ((aggregator, "Expert", kind),)


def of_worker_store(kind: type) -> tuple[Patch, ...]:
    return ((membership, "WorkerStore", kind),)
