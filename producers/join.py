"""How a worker joins an expert: find the expert, check the base model, claim the name.

All this happens before the first step, and is retried while Redis cannot be reached.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from fedmoe.errors import BaseModelError, RedisUnavailableError, RedisUnfitError, StoppedError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.permissions import WORKER
from fedmoe.store.rights import require
from fedmoe.store.worker import NoExpertsError, WorkerStore
from fedmoe.util.backoff import Backoff
from producers.claim import JOIN_TTL_S, JOINING
from producers.heartbeat import this_process

logger = logging.getLogger(__name__)

T = TypeVar("T")
PIN_WAIT_S = 5.0


class Joining:
    """The steps by which a worker joins.

    Args:
        store: of this worker.
        wait: retry while Redis cannot be reached or has no experts at all, instead of failing.
        stop: ends the waiting.
    """

    def __init__(self, store: WorkerStore, *, wait: bool, stop: threading.Event) -> None:
        self._store = store
        self._wait = wait
        self._stop = stop

    def patiently(self, call: Callable[[], T]) -> T:
        """Retry `call` until Redis answers; return its result.

        Raises:
            StoppedError: if told to stop meanwhile.
            RedisUnfitError: if Redis refuses the command for a reason that waiting does not change.
            RedisUnavailableError, NoExpertsError: if Redis cannot be reached or has no experts, and `wait` is off.
        """
        backoff = Backoff("worker", logger)
        while not self._stop.is_set():
            try:
                result = call()
            except (RedisUnavailableError, NoExpertsError) as error:
                is_final = not self._wait or isinstance(error, RedisUnfitError)
                if is_final and not self._stop.is_set():
                    raise
                self._stop.wait(backoff.failed(error))
            else:
                backoff.ok()
                return result
        raise StoppedError("stopped before the training began", about="training")

    def check_rights(self) -> None:
        """Raise RedisUnfitError, naming the missing rights, unless this user may train the expert under this name."""
        store = self._store
        self.patiently(lambda: require(store.connection, WORKER, [store.expert], store.worker))

    def spec(self) -> Spec:
        """The expert's spec; raises UnknownExpertError, which lists the experts, if this one does not exist."""
        return self.patiently(self._store.spec)

    def meta(self) -> Meta:
        """The expert's meta; raises ProtocolError, which says which side to upgrade, for another protocol."""
        return self.patiently(self._store.meta)

    def check_base(self, identity: BaseIdentity) -> None:
        """Raise BaseModelError if somebody pinned another base model."""
        self._compare(identity, self.meta())

    def _compare(self, identity: BaseIdentity, meta: Meta) -> None:
        if refusal := identity.refusal(meta, self._store.expert):
            raise BaseModelError(refusal, about=identity.differing(meta)[0])

    def pin_base(self, identity: BaseIdentity, *, state_id: str) -> None:
        """If a component of the base model is not pinned yet, ask an aggregator to pin this worker's; then compare."""
        beat = _first_beat(state_id, identity)
        self.patiently(lambda: self._store.beat(beat, ttl_s=JOIN_TTL_S))
        if identity.is_pinned(self.meta()):
            return
        self.patiently(self._store.join)
        until = time.monotonic() + PIN_WAIT_S
        while time.monotonic() < until and not self._stop.wait(0.1):
            meta = self.meta()
            if identity.is_pinned(meta):
                self._compare(identity, meta)
                return
        logger.warning("no aggregator has pinned the base model yet; the training begins all the same")


def _first_beat(state_id: str, identity: BaseIdentity) -> Beat:
    process = this_process(state_id, since=time.time())
    return Beat(run=JOINING, beat=secrets.token_hex(4), **process, **identity.beat_fields())
