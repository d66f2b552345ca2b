"""The heartbeat: a hash that expires; it shows that a worker is alive, and its state."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedmoe.protocol import records
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.features import features_text
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.records import HEARTBEAT_TTL_S
from fedmoe.store.worker import WorkerStore
from fedmoe.util.software import software
from producers.ledger import Ledger

HEARTBEAT_INTERVAL_S = 5.0
_AGAIN_S = 1.0  # until a retry, after Redis refused a heartbeat

Fields = Mapping[str, Any]  # of a `Beat`


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """The status in progress line and heartbeat; it is replaced as a whole, so that any thread may read it."""

    version: int = 0
    staleness: int = 0
    published: int = 0
    applied: int = 0
    refused: int = 0
    in_flight: int = 0  # seq of the update in flight, 0 for none
    in_flight_since: float = 0.0
    undecided: int = 0  # how often the entry of the update in flight was removed without a decision
    problem: str = ""

    @property
    def why_undecided(self) -> str:
        """Why the update in flight is not decided, as far as this worker knows."""
        if self.problem or not self.undecided:
            return self.problem or "is an aggregator running?"
        return (
            f"an aggregator read it {self.undecided} times, but neither applied nor refused it: see its log"
        )


def this_process(state_id: str, *, since: float) -> dict[str, Any]:
    """The heartbeat's fields about this process, which began at `since` (seconds since 1970)."""
    return {
        "state_id": state_id,
        "protocol": str(records.PROTOCOL),
        "software": software(),
        "knows": features_text(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": round(since),
        "seen": round(time.time()),
    }


class Heartbeat:
    """Writes a worker's heartbeat when it is due.

    Args:
        identity: of the base model that is trained. state_id: of the state directory, "" without one.
        training_fields: returns the heartbeat's fields about the training.
        clock: seconds, monotonic.

    Attributes:
        next_at: when the next heartbeat is due, on that clock.
        is_refused: True if Redis refused the last heartbeat; it may still answer other commands.
    """

    def __init__(
        self,
        store: WorkerStore,
        identity: BaseIdentity,
        *,
        state_id: str,
        training_fields: Callable[[], Fields],
        clock: Callable[[], float],
    ) -> None:
        self.next_at = 0.0
        self.is_refused = False
        self._store = store
        self._identity = identity
        self._state_id = state_id
        self._training_fields = training_fields
        self._clock = clock
        self._beats = 0
        self._started_at = time.time()

    def hasten(self, in_s: float = 0.0) -> None:
        """Make the next heartbeat due in so many seconds, if it is not due before: now, because the status changed."""
        self.next_at = min(self.next_at, self._clock() + in_s)

    def beat(self, ledger: Ledger, status: SyncStatus) -> None:
        """Write the heartbeat if it is due.

        Raises:
            RedisUnavailableError: if Redis refuses it or cannot be reached.
        """
        now = self._clock()
        if now < self.next_at:
            return
        self._beats += 1
        self.is_refused = True
        self.next_at = (
            now + _AGAIN_S
        )  # a full Redis refuses the heartbeat but answers a poll: do not stay here
        beat = Beat(
            run=ledger.run,
            beat=str(self._beats),
            lineage=ledger.meta.lineage,
            base_version=ledger.meta.version,
            in_flight=status.in_flight,
            staleness=status.staleness,
            published=status.published,
            refused=status.refused,
            problem=status.problem,
            **this_process(self._state_id, since=self._started_at),
            **self._identity.beat_fields(ledger.meta),
            **self._training_fields(),
        )
        self._store.beat(beat, ttl_s=HEARTBEAT_TTL_S)
        self.is_refused = False
        self.next_at = now + HEARTBEAT_INTERVAL_S
