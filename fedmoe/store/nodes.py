"""The other servers that have this one's keys: its replicas, those that Sentinel knows, the nodes of a Redis Cluster.

Users are each server's own, so a check or a change of users goes to all of them.
"""

import re
from typing import Any

import redis

from fedmoe.store.cluster import slot_of
from fedmoe.store.connection import Connection
from fedmoe.store.url import Address, SentinelURL


def other_nodes(connection: Connection) -> list[Address]:
    """The other nodes that the master, Sentinel or the cluster knows, those among them that are down, too.

    Raises:
        RedisUnavailableError: if the master cannot be asked, or this user may not run INFO.
    """
    if connection.cluster:
        with connection.errors():
            return connection.cluster.others(slot_of(connection.keys.experts))
    with connection.errors():
        info = connection.client.info("replication")
    found = [value for name, value in info.items() if re.fullmatch(r"slave\d+", name)]
    places = [(str(one["ip"]), int(one["port"])) for one in found if isinstance(one, dict)]
    if (url := connection.settings.url).startswith("sentinel://"):
        places += _of_sentinel(connection, SentinelURL.parse(url).master)
    return list(dict.fromkeys(places))


def _of_sentinel(connection: Connection, master: str) -> list[Address]:
    manager: Any = connection.client.connection_pool.sentinel_manager
    for sentinel in manager.sentinels:
        try:
            return [(str(one["ip"]), int(one["port"])) for one in sentinel.sentinel_slaves(master)]
        except (redis.RedisError, OSError):  # a sentinel that is down, or does not answer this user
            continue
    return []
