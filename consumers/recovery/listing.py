"""Reconciles the list of experts with the experts in Redis: an emptied Redis has lost the list too."""

import logging

from fedmoe.store.gateway import GatewayStore

logger = logging.getLogger(__name__)


class ExpertList:
    """The federation's list of experts, with all that an aggregator has seen listed since its start."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._known: dict[str, float] = {}  # all experts seen listed, with their last gateway weights

    def reconcile(self) -> dict[str, float]:
        """The experts and their gateway weights, sorted by name.

        A known expert that exists but is not listed (Redis was emptied, or somebody deleted the field) is listed again.
        A listed expert that an operator removed is taken off the list.
        """
        listed = self._store.experts()
        there, removed = self._store.compare(self._known | listed)
        self._known |= listed
        for name in listed.keys() & removed:
            self._store.unregister(name)
            del listed[name]
        for name in sorted((self._known.keys() & there) - listed.keys()):
            logger.warning(
                "expert %s was missing from the list %s, this aggregator added it again (to remove it for "
                "good: fedmoe expert remove)",
                name, self._store.connection.keys.experts,
            )  # fmt: skip
            self._store.register(name, self._known[name])
            listed[name] = self._known[name]
        return dict(sorted(listed.items()))
