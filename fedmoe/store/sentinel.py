"""Redis behind Sentinel: every new connection asks Sentinel for the present master.

A failover loses writes that the old master acknowledged but did not replicate; the protocol's two chains
(`meta.commit`, `decided`) make sure that lost work is repeated. This module only finds the master.
"""

from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import MasterNotFoundError, Sentinel

from fedmoe.store.client import Client
from fedmoe.store.tls import hint_of_silence, tls_problem
from fedmoe.store.url import SentinelURL

# Short, because a sentinel may be down together with the master's machine: then the next one is asked.
QUESTION_TIMEOUT_S = 2.0


def master_client(url: SentinelURL, arguments: dict[str, Any]) -> Client:
    """A client of the present master; `arguments` are redis-py's connection arguments."""
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
    """redis-py's Sentinel, with a readable reason if no master is found, and without connections kept open."""

    def discover_master(self, service_name: str) -> tuple[str, int]:
        """Host and port of the master; the sentinel that answered last is asked first.

        Raises:
            MasterNotFoundError: if no sentinel names a master; the message is for people.
        """
        silent: list[str] = []
        known = False
        sentinel: Any
        for place, sentinel in enumerate(self.sentinels):
            try:
                with sentinel:
                    state = sentinel.sentinel_masters().get(service_name)
            except (redis.RedisError, OSError) as error:
                silent.append(f"{_address(sentinel)}: {_reason(error, _address(sentinel))}")
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


def _reason(error: Exception, where: str) -> str:
    found = tls_problem(str(error), where)
    return found[1] if found else f"{str(error).rstrip('.')}{hint_of_silence(error)}"


def _address(sentinel: Any) -> str:
    where = sentinel.connection_pool.connection_kwargs
    host = f"[{where['host']}]" if ":" in where["host"] else where["host"]
    return f"{host}:{where['port']}"
