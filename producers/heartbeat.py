"""The heartbeat: a hash that expires, by which others see that a worker lives, and how."""

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
_AGAIN_S = 1.0  # after a heartbeat that Redis did not take

Fields = Mapping[str, Any]  # of a `Beat`


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """What the progress line and the heartbeat tell; replaced whole, so that any thread may read it."""

    version: int = 0
    staleness: int = 0
    published: int = 0
    applied: int = 0
    refused: int = 0
    in_flight: int = 0  # seq of the update in flight, 0 for none
    in_flight_since: float = 0.0
    undecided: int = 0  # how often the update in flight was taken off the stream without a decision
    problem: str = ""

    @property
    def why_undecided(self) -> str:
        """Why nobody decides the update in flight, as far as is known here."""
        if self.problem or not self.undecided:
            return self.problem or "is an aggregator running?"
        return (
            f"an aggregator read it {self.undecided} times, but neither applied nor refused it: see its log"
        )


def this_process(state_id: str, *, since: float) -> dict[str, Any]:
    """What a heartbeat tells of the process that writes it, which began at `since` (seconds since 1970)."""
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
        training_fields: the training's part of it.
        clock: seconds, monotonic.

    Attributes:
        next_at: when the next one is due, on that clock.
        is_refused: Redis did not take the last one, though it may answer all else.
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

    def hasten(self) -> None:
        """Make it due now: there is something to tell."""
        self.next_at = min(self.next_at, self._clock())

    def beat(self, ledger: Ledger, status: SyncStatus) -> None:
        """Write it if it is due.

        Raises:
            RedisUnavailableError: if Redis does not take it.
        """
        now = self._clock()
        if now < self.next_at:
            return
        self._beats += 1
        self.is_refused = True
        self.next_at = now + _AGAIN_S  # a full Redis takes no heartbeat, but answers a poll: go on to that
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
