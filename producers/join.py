"""How a worker joins an expert: find it, check that the base model is the right one, claim the name.

All of it happens before the first step, and is tried again while Redis is away.
"""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from fedmoe.backoff import Backoff
from fedmoe.errors import BaseModelError, RedisUnavailableError, StoppedError
from fedmoe.records import Meta
from fedmoe.spec import Spec
from fedmoe.store.worker import NoExpertsError, WorkerStore
from producers.claim import JOIN_TTL_S, JOINING

logger = logging.getLogger(__name__)

T = TypeVar("T")
PIN_WAIT_S = 5.0


class Joining:
    """The steps of joining.

    Args:
        store: of this worker.
        wait: try again while Redis cannot be reached or has no experts at all, instead of failing.
        stop: ends the waiting.
    """

    def __init__(self, store: WorkerStore, *, wait: bool, stop: threading.Event) -> None:
        self._store = store
        self._wait = wait
        self._stop = stop

    def patiently(self, call: Callable[[], T]) -> T:
        """What `call` returns, however long Redis is away.

        Raises:
            StoppedError: if told to stop meanwhile.
        """
        backoff = Backoff("worker", logger)
        while not self._stop.is_set():
            try:
                result = call()
            except (RedisUnavailableError, NoExpertsError) as error:
                if not self._wait and not self._stop.is_set():
                    raise
                self._stop.wait(backoff.failed(error))
            else:
                backoff.ok()
                return result
        raise StoppedError("stopped before it had joined")

    def spec(self) -> Spec:
        """The expert's spec; UnknownExpertError, naming those there are, if there are others but not this one."""
        return self.patiently(self._store.spec)

    def check_base(self, fingerprint: str, spec: Spec) -> None:
        """Raise BaseModelError if somebody pinned another base model's fingerprint."""
        meta = self.patiently(self._store.meta)
        if meta.base_fingerprint and meta.base_fingerprint != fingerprint:
            raise BaseModelError(
                f"the base model here is not the one that {self._store.expert!r} is trained on: the weights' "
                f"fingerprint is {fingerprint}, the expert's is {meta.base_fingerprint} (pinned by "
                f"{meta.base_fingerprint_by}): use {spec.base_model}, for example not its Base for its Instruct"
            )

    def pin_base(self, fingerprint: str, spec: Spec, *, state_id: str) -> None:
        """If nobody has pinned a fingerprint yet, have the aggregator pin this one, and look again."""
        beat = _first_beat(fingerprint, state_id)
        self.patiently(lambda: self._store.beat(beat, ttl_s=JOIN_TTL_S))
        if self.patiently(self._store.meta).base_fingerprint:
            return
        self.patiently(self._store.join)
        until = time.monotonic() + PIN_WAIT_S
        while time.monotonic() < until and not self._stop.wait(0.1):
            meta: Meta = self.patiently(self._store.meta)
            if meta.base_fingerprint:
                self.check_base(fingerprint, spec)
                return
        logger.warning("no aggregator has pinned the base model yet; training on without")


def _first_beat(fingerprint: str, state_id: str) -> dict[str, str | int | float]:
    return {
        "run": JOINING,
        "state_id": state_id,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": f"{time.time():.0f}",
        "seen": f"{time.time():.0f}",
        "beat": secrets.token_hex(4),
        "base_fingerprint": fingerprint,
    }
