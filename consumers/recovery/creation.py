"""An expert that is not in Redis: was it never created, or is it lost? Only the first is created unasked.

It is lost if somebody found it so before, or if a worker trains it: every worker writes its lineage to its heartbeat,
also to a Redis that has just been emptied.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping

from fedmoe.errors import LostExpertError
from fedmoe.store.expert import ExpertStore

logger = logging.getLogger(__name__)

HEARD_WITHIN_S = 6.5  # in which every worker writes a heartbeat; they do every 5 s


def without_lost(stores: Iterable[ExpertStore]) -> list[ExpertStore]:
    """Those of these experts that nobody has found to be lost before."""
    return [store for store in stores if not _is_lost(store, store.lost())]


def without_trained(
    stores: Iterable[ExpertStore], *, since: float, stop: threading.Event
) -> list[ExpertStore]:
    """Those of these experts that no worker trains; the others are lost, and marked so.

    Returns when every worker has had the time for a heartbeat after `since` (monotonic), or `stop` is set.
    """
    stores = list(stores)
    stop.wait(max(0.0, since + HEARD_WITHIN_S - time.monotonic()))
    known = {store.name: store.lineages() for store in stores}
    anybody = next(
        (workers for workers in known.values() if workers), {}
    )  # an emptied Redis has lost all of them
    return [store for store in stores if not _is_lost(store, known[store.name] or anybody)]


def _is_lost(store: ExpertStore, known: Mapping[str, str]) -> bool:
    """True, and marked and said, if `known` (worker -> lineage) tells that this expert was there before."""
    if not known:
        return False
    store.mark_lost(known)
    logger.warning("%s", _lost(store, known))
    return True


def check_never_there(store: ExpertStore) -> None:
    """Raise LostExpertError if this expert was there before: it was found to be lost, or a worker trains it."""
    if store.lost():
        raise LostExpertError(store.name)
    if known := store.lineages():
        raise _lost(store, known)


def _lost(store: ExpertStore, known: Mapping[str, str]) -> LostExpertError:
    worker, lineage = next(iter(known.items()))
    return LostExpertError(store.name, f", but worker {worker} trains on (lineage {lineage})")
