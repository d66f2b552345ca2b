"""Redis behind Sentinel: whichever server is the master now, asked anew for every connection.

A failover loses what the old master had acknowledged and not replicated yet; the two chains of the protocol
(`meta.commit`, `decided`) turn that into work done again. Here only the master is found.
"""

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from fedmoe.store.client import Client
from fedmoe.store.url import SentinelURL

# Also for a sentinel whose machine is gone, mostly the master's own: the next one must be asked soon.
QUESTION_TIMEOUT_S = 2.0


def master_client(url: SentinelURL, arguments: dict[str, Any]) -> Client:
    """A client of the master, whichever it is; `arguments` are redis-py's for its connections."""
    asking = {
        "protocol": 2,
        "socket_timeout": QUESTION_TIMEOUT_S,
        "socket_connect_timeout": QUESTION_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
    }
    sentinels: Any = Sentinels(url.sentinels, sentinel_kwargs=asking | url.sentinel)  # type: ignore[no-untyped-call]  # redis-py's
    client: Client = sentinels.master_for(url.master, Client, **arguments, **url.server)
    return client


class Sentinels(Sentinel):
    """redis-py's, but it says in a sentence why there is no master, and keeps no connection between two questions."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Host and port of the master that a sentinel names, the last one that answered first.

        Raises:
            MasterNotFoundError: none does; the message is for people.
        """
        silent: list[str] = []
        known = False
        sentinel: Any
        for place, sentinel in enumerate(self.sentinels):
            try:
                with sentinel:
                    state = sentinel.sentinel_masters().get(service_name)
            except (redis.RedisError, OSError) as error:
                silent.append(f"{_address(sentinel)}: {str(error).rstrip('.')}")
                continue
            if state and self.check_master_state(state, service_name):  # type: ignore[no-untyped-call]  # redis-py's
                self.sentinels.insert(0, self.sentinels.pop(place))
                return state["ip"], state["port"]
            known = known or state is not None
        if known:
            raise MasterNotFoundError(
                f"the master {service_name!r} is down and Sentinel has not promoted another one yet"
            )
        if len(silent) < len(self.sentinels):
            asked = " and ".join(_address(sentinel) for sentinel in self.sentinels)
            raise MasterNotFoundError(
                f"Sentinel at {asked} knows no master {service_name!r}: "
                "take the name from `redis-cli -p 26379 SENTINEL MASTERS`"
            )
        raise MasterNotFoundError(f"no sentinel can be asked for the master ({'; '.join(silent)})")


def _address(sentinel: Any) -> str:
    where = sentinel.connection_pool.connection_kwargs
    host = f"[{where['host']}]" if ":" in where["host"] else where["host"]
    return f"{host}:{where['port']}"
