"""The proxy of the tests does to real connections what it says."""

import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.redis_private import socket_of
from tests.processes import eventually
from tests.proxy import Action, Direction, Proxy

pytestmark = pytest.mark.one_server

LOST = (redis.ConnectionError, redis.TimeoutError)


@pytest.fixture
def proxy(server: EmbeddedRedis, redis_url: str) -> Iterator[Proxy]:
    """A proxy before an empty database."""
    with Proxy(server.socket) as running:
        yield running


def client(url: str, timeout_s: float = 5.0) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=timeout_s, retry=Retry(NoBackoff(), 0))


def test_carries_large_values_of_many_clients(proxy: Proxy) -> None:
    """Four clients move 9 MB each, both ways, at the same time."""
    blobs = [bytes([n]) * 9_000_000 for n in range(4)]
    equal = []

    def move(n: int) -> None:
        mine = client(proxy.url)
        mine.set(f"k{n}", blobs[n])
        equal.append(mine.get(f"k{n}") == blobs[n])

    threads = [threading.Thread(target=move, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 4


@pytest.mark.parametrize(
    ("action", "at_once", "at_last"),
    [("cut_before", 1, 1), ("cut_in_middle", 1, 1), ("cut_after", 2, 2), ("late", 1, 2)],
)
def test_command_is_broken(
    proxy: Proxy, connection: object, redis_url: str, action: Action, at_once: int, at_last: int
) -> None:
    """The client loses its connection at the second INCRBY, and the server executed it, or did not, or does later."""
    mine, direct = client(proxy.url), redis.Redis.from_url(redis_url)
    fired = proxy.on(b"INCRBY", action, skip=1)
    assert mine.incr("n") == 1
    assert not fired.is_set()
    with pytest.raises(LOST):
        mine.incr("n")
    assert fired.wait(5)
    assert proxy.hits[action] == 1
    assert direct.get("n") == b"%d" % at_once
    eventually("the late one", lambda: direct.get("n") == b"%d" % at_last, timeout_s=5)
    assert mine.incr("n") == at_last + 1  # once only


def test_needle_that_spans_two_chunks_is_found(proxy: Proxy) -> None:
    """A command that arrives byte by byte."""
    mine = client(proxy.url)
    fired = proxy.on(b"INCR", "cut_before")
    mine.ping()
    used = socket_of(mine.connection_pool.get_connection())
    assert used is not None
    for byte in b"*2\r\n$4\r\nINCR\r\n$1\r\nn\r\n":
        try:
            used.sendall(bytes([byte]))
        except OSError:
            break
        time.sleep(0.002)
    assert fired.wait(1)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_cut_after_bytes(proxy: Proxy, redis_url: str, direction: Direction) -> None:
    """In the middle of a large value, there and back; the next attempt gets it whole."""
    mine, direct = client(proxy.url), redis.Redis.from_url(redis_url)
    blob = b"x" * 1_000_000
    direct.set("there", blob)
    fired = proxy.cut_after(500_000, direction)
    with pytest.raises(LOST):
        mine.set("k", blob) if direction == "up" else mine.get("there")
    assert fired.wait(5)
    assert direct.get("k") is None
    mine.set("k", blob)
    assert mine.get("k") == blob


def test_cut_resets_blocked_clients_at_once(proxy: Proxy) -> None:
    """A client in a blocking read learns of it now, not at its timeout."""
    mine = client(proxy.url)
    cutting = threading.Timer(0.2, proxy.cut)
    cutting.start()
    began = time.monotonic()
    with pytest.raises(redis.ConnectionError, match="reset"):
        mine.blpop("nothing", 4)
    assert time.monotonic() - began < 2
    cutting.join()
    assert proxy.hits["cut"] == 1


def test_freeze_holds_all_bytes_until_thaw(proxy: Proxy, redis_url: str) -> None:
    """What a client sent before it gave up arrives after all."""
    mine, direct = client(proxy.url, 0.3), redis.Redis.from_url(redis_url)
    mine.ping()
    proxy.freeze()
    with pytest.raises(redis.TimeoutError):
        mine.incr("n")
    assert direct.get("n") is None
    assert proxy.hits["frozen"] == 1
    proxy.thaw()
    eventually("the held command", lambda: direct.get("n") == b"1", timeout_s=5)
    assert mine.incr("n") == 2


def test_delay_refusal_and_idle_connections(proxy: Proxy) -> None:
    """The three attributes, one after the other, and back."""
    mine = client(proxy.url)
    mine.ping()
    proxy.delay_s = 0.2
    began = time.monotonic()
    mine.ping()
    assert time.monotonic() - began >= 0.2
    proxy.delay_s = 0.0

    proxy.idle_timeout_s = 0.1
    eventually("the connection to be forgotten", lambda: proxy.hits["idle"] == 1, timeout_s=5)
    proxy.idle_timeout_s = 0
    with pytest.raises(LOST):
        mine.ping()
    assert mine.ping()

    proxy.refuse = True
    with pytest.raises(LOST):
        client(proxy.url).ping()
    assert proxy.hits["refused"] == 1
    assert mine.ping()  # an old connection lives on
    proxy.refuse = False
    assert client(proxy.url).ping()


def test_upstream_by_host_and_port(proxy: Proxy) -> None:
    """A proxy before a proxy."""
    with Proxy(("127.0.0.1", urlsplit(proxy.url).port or 0)) as outer:
        mine = client(outer.url)
        mine.set("k", b"x" * 1_000_000)
        assert mine.get("k") == b"x" * 1_000_000
        proxy.cut()
        eventually("the end of both", lambda: outer.hits["closed"] == 1, timeout_s=5)
        eventually("a new connection", mine.ping, timeout_s=5)


def test_upstream_that_restarts() -> None:
    """While the server is away clients are closed at once; afterwards the same proxy carries again."""
    with EmbeddedRedis() as server, Proxy(server.socket) as proxy:
        mine = client(proxy.url)
        mine.set("k", 1)
        server.kill()
        for _ in range(2):
            with pytest.raises(redis.ConnectionError):
                mine.ping()
        assert proxy.hits["unreachable"] >= 1
        server.start()
        assert mine.ping()


def test_closes_at_once_whatever_is_open(server: EmbeddedRedis, redis_url: str) -> None:
    """With a blocked, a frozen and a forgotten connection; its thread ends."""

    def lose(name: str, *arguments: object) -> None:
        with pytest.raises(LOST):
            client(here.url).execute_command(name, *arguments)

    with Proxy(server.socket) as here:
        blocked = threading.Thread(target=lose, args=("BLPOP", "nothing", 4))
        blocked.start()
        eventually("the client", lambda: here.connections == 1, timeout_s=5)
        here.freeze()
        frozen = threading.Thread(target=lose, args=("PING",))
        frozen.start()
        eventually("the second client", lambda: here.connections == 2 and here.hits["frozen"], timeout_s=5)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    assert not here._thread.is_alive()
    for thread in (blocked, frozen):
        thread.join(5)
        assert not thread.is_alive()
