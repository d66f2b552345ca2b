"""Take a whole federation out of Redis; for a demo that was a guest on somebody's server."""

import redis

from fedmoe.store.connection import Connection


def remove_federation(connection: Connection) -> None:
    """Remove every key of the connection's prefix; if Redis is gone already, nothing."""
    keys = connection.keys
    try:
        for pattern in (keys.experts, keys.expert("*").root + ":*"):
            for key in connection.client.scan_iter(match=pattern, count=1000):
                connection.client.unlink(key)
    except (redis.RedisError, OSError):
        return
