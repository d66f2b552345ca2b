"""The weights of an expert's last load or commit, for other threads of the aggregator."""

import threading

from consumers.held import Held
from fedmoe.protocol.layout import AdapterBuffer


class Settled:
    """The expert's thread names values here that it will not change until it names others; other threads copy them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commit = ""
        self._held: Held | None = None

    def name(self, commit: str, held: Held | None) -> None:
        """The weights of this weights commit are in `held` now; no copy of those named before is made any more.

        A copy that has begun is waited for.
        """
        with self._lock:
            self._commit, self._held = commit, held

    def copy(self, commit: str) -> AdapterBuffer | None:
        """A copy of the weights of this weights commit, None if they are not here; any thread may ask."""
        with self._lock:
            if self._held is None or self._commit != commit:
                return None
            copy = AdapterBuffer(self._held.weights.layout)
            copy.flat.copy_(self._held.weights.flat)
            return copy
