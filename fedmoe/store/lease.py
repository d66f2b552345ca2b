"""The lease keeps two aggregators from doing the same work. Safety does not depend on it but on the commit's check."""

import logging

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


class Lease:
    """A key that names its holder and expires by itself.

    Args:
        key: of the lease.
        holder: unique name of this process.
        ttl_ms: the lease expires this long after its last renewal.
    """

    def __init__(self, connection: Connection, key: str, *, holder: str, ttl_ms: int) -> None:
        self._connection = connection.at(key)
        self._key = key
        self._holder = holder
        self._ttl_ms = ttl_ms
        self._hold = self._connection.client.register_script(_HOLD)
        self._release = self._connection.client.register_script(_RELEASE)

    def hold(self) -> bool:
        """Take or renew the lease, unless another aggregator is to have it; False if this process does not hold it."""
        return self.renew()

    def renew(self) -> bool:
        """Take or renew the lease; False while another process holds it."""
        with self._connection.errors():
            return bool(self._hold(keys=[self._key], args=[self._holder, self._ttl_ms]))

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
        with self._connection.errors():
            self._release(keys=[self._key], args=[self._holder])
