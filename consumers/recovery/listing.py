"""The list of experts, brought in line with the experts there are: an emptied Redis has lost it, too."""

import logging

from fedmoe.store.gateway import GatewayStore

logger = logging.getLogger(__name__)


class ExpertList:
    """The federation's list of experts, as an aggregator has known it since its start."""

    def __init__(self, store: GatewayStore) -> None:
        self._store = store
        self._known: dict[
            str, float
        ] = {}  # the experts that were ever listed, and their last gateway weights

    def reconcile(self) -> dict[str, float]:
        """The experts and their gateway weights, sorted by name.

        One that is there and not listed (Redis was emptied, or somebody took it off) is listed again. One that an
        operator removed is taken off, if somebody has listed it meanwhile.
        """
        listed = self._store.experts()
        there, removed = self._store.compare(self._known | listed)
        self._known |= listed
        for name in listed.keys() & removed:
            self._store.unregister(name)
            del listed[name]
        for name in sorted((self._known.keys() & there) - listed.keys()):
            logger.warning(
                "gateway: expert %s was missing from the list %s, this aggregator added it again (to remove it for "
                "good: fedmoe expert remove)",
                name, self._store.connection.keys.experts,
            )  # fmt: skip
            self._store.register(name, self._known[name])
            listed[name] = self._known[name]
        return dict(sorted(listed.items()))
