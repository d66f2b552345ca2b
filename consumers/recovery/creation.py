"""Tells whether an expert that is missing from Redis was never created or is lost; a lost one is not created again.

It is lost if an aggregator marked it so before, or if a worker trains it: every worker writes its lineage to its
heartbeat, also to a Redis that was just emptied.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping

from fedmoe.errors import LostExpertError
from fedmoe.store.expert import ExpertStore

logger = logging.getLogger(__name__)

HEARD_WITHIN_S = 6.5  # enough for a heartbeat of every worker; the interval is 5 s


def without_lost(stores: Iterable[ExpertStore]) -> list[ExpertStore]:
    """The experts of these that are not marked as lost."""
    return [store for store in stores if not _is_lost(store, store.lost())]


def without_trained(
    stores: Iterable[ExpertStore], *, since: float, stop: threading.Event
) -> list[ExpertStore]:
    """The experts of these that no worker trains; the others are marked as lost.

    Returns once every worker has had time for a heartbeat after `since` (monotonic), or `stop` is set.
    """
    stores = list(stores)
    stop.wait(max(0.0, since + HEARD_WITHIN_S - time.monotonic()))
    known = {store.name: store.lineages() for store in stores}
    anybody = next(
        (workers for workers in known.values() if workers), {}
    )  # an emptied Redis has lost all of them
    return [store for store in stores if not _is_lost(store, known[store.name] or anybody)]


def _is_lost(store: ExpertStore, known: Mapping[str, str]) -> bool:
    """True if `known` (worker -> lineage) shows that this expert existed; it is then marked as lost and reported."""
    if not known:
        return False
    store.mark_lost(known)
    logger.warning("%s", _lost(store, known))
    return True


def check_never_there(store: ExpertStore) -> None:
    """Raise LostExpertError if this expert existed before: it is marked as lost, or a worker trains it."""
    if store.lost():
        raise LostExpertError(store.name)
    if known := store.lineages():
        raise _lost(store, known)


def _lost(store: ExpertStore, known: Mapping[str, str]) -> LostExpertError:
    worker, lineage = next(iter(known.items()))
    return LostExpertError(store.name, f", but worker {worker} trains on (lineage {lineage})")
