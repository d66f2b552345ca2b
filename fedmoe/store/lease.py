"""The lease: keeps two aggregators from doing the same work. Nothing depends on it; safety is the commit's check."""

from fedmoe.store.connection import Connection

_RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"


class Lease:
    """A key that names its holder and expires by itself.

    Args:
        key: of the lease.
        holder: this process, unique.
        ttl_ms: after so long without renewal somebody else may take it.
    """

    def __init__(self, connection: Connection, key: str, *, holder: str, ttl_ms: int) -> None:
        self._connection = connection
        self._key = key
        self._holder = holder
        self._ttl_ms = ttl_ms
        self._renew = connection.client.register_script(_RENEW)
        self._release = connection.client.register_script(_RELEASE)

    def hold(self) -> bool:
        """Take or renew the lease; False while somebody else has it."""
        with self._connection.errors():
            if self._renew(keys=[self._key], args=[self._holder, self._ttl_ms]):
                return True
            return bool(self._connection.client.set(self._key, self._holder, nx=True, px=self._ttl_ms))

    def release(self) -> None:
        """Give it up, so that a standby need not wait for the expiry."""
        with self._connection.errors():
            self._release(keys=[self._key], args=[self._holder])
