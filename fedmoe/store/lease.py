"""The lease keeps two aggregators from doing the same work. Safety does not depend on it but on the commit's check."""

import logging
import math
import time
from collections.abc import Callable

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.connection import Connection

logger = logging.getLogger(__name__)

# The script also works on a full Redis: only the lease holder can free memory. A lease without an expiry was set by
# hand, and a too long expiry means that the server's clock was set back: in both cases the expiry is set again.
_HOLD = """#!lua flags=allow-oom
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 or left > 10 * ARGV[2] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
  return 0
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


_FRESH = 0.25  # of its time, after a renewal


class Lease:
    """A key that names its holder and expires by itself.

    Args:
        key: of the lease.
        holder: unique name of this process.
        ttl_ms: the lease expires this long after its last renewal.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        connection: Connection,
        key: str,
        *,
        holder: str,
        ttl_ms: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection.at(key)
        self._key = key
        self._holder = holder
        self._ttl_ms = ttl_ms
        self._clock = clock
        self._renewed_at = -math.inf
        self._hold = self._connection.client.register_script(_HOLD)
        self._release = self._connection.client.register_script(_RELEASE)

    def hold(self) -> bool:
        """Take or keep the lease, unless another aggregator is to have it; False if this process does not hold it."""
        return self.keep()

    def keep(self) -> bool:
        """Take the lease, or renew it if a quarter of its time is over; False while another process holds it.

        So a lease that was lost meanwhile is noticed late: two aggregators may do the same work, and one commits it.
        """
        return self._clock() - self._renewed_at < _FRESH * self._ttl_ms / 1000 or self.renew()

    def renew(self) -> bool:
        """Take or renew the lease; False while another process holds it."""
        now, self._renewed_at = self._clock(), -math.inf
        with self._connection.errors():
            is_held = bool(self._hold(keys=[self._key], args=[self._holder, self._ttl_ms]))
        if is_held:
            self._renewed_at = now
        return is_held

    def doubt(self) -> None:
        """Ask Redis at the next `hold` or `keep`, however fresh the lease is."""
        self._renewed_at = -math.inf

    def give_up(self) -> None:
        """Release the lease if Redis can be reached; otherwise it expires."""
        try:
            self.release()
        except RedisUnavailableError:
            logger.debug("the lease %s could not be released; it expires", self._key)

    def cannot(self) -> None:
        """Release the lease, because this process cannot serve the expert."""
        self.give_up()

    def release(self) -> None:
        """Release the lease, so that a standby need not wait for its expiry."""
        self.doubt()
        with self._connection.errors():
            self._release(keys=[self._key], args=[self._holder])
