"""Fixtures of the whole suite: real servers, one federation for each test, a tiny model.

Integration tests run once on each server there is: Redis on PATH and the Valkey of the wheel. Those that are marked
`one_server`, or all with `--one-server`, run on one of them. A machine without any fails the suite in CI and skips
these tests elsewhere.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
import torch
from click.testing import CliRunner, Result

from fedmoe.cli.main import cli
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis, wheel_server
from producers.spares import Spares

torch.set_num_threads(1)


def _servers() -> dict[str, str]:
    found = {"redis": shutil.which("redis-server"), "valkey": wheel_server()}
    return {name: path for name, path in found.items() if path}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-server", action="store_true", help="Run every test on one server only.")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `one_server` runs on the first server that there is; all does, if asked for."""
    first = next(iter(_servers()), "redis")
    everything = config.getoption("--one-server")

    def again(item: pytest.Item) -> bool:
        params = getattr(item, "callspec", None)
        return bool(
            (everything or item.get_closest_marker("one_server"))
            and params
            and params.params.get("server", first) != first
        )

    if dropped := [item for item in items if again(item)]:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if not again(item)]


@pytest.fixture(scope="session", params=["redis", "valkey"])
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """A running server, shared by the session."""
    path = _servers().get(request.param)
    if path is None:
        if os.environ.get("CI") and not _servers():
            pytest.fail("CI has no Redis server at all")
        pytest.skip(f"no {request.param} server on this machine")
    with EmbeddedRedis(server=path, options=["--appendonly", "no"]) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_workers_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker of an earlier life is about to write its heartbeat."""
    monkeypatch.setattr("consumers.recovery.creation.HEARD_WITHIN_S", 0.0)


@pytest.fixture(autouse=True)
def _spares_are_spoiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare vectors are filled with NaN when they are given back: code that still reads one fails its test."""
    give, take = Spares.give, Spares.take

    def spoil(self: Spares, tensor: torch.Tensor) -> None:
        give(self, tensor.fill_(math.nan) if tensor.is_floating_point() else tensor)

    monkeypatch.setattr(Spares, "give", spoil)
    monkeypatch.setattr(Spares, "take", lambda self: take(self).fill_(math.nan))


@pytest.fixture
def of_bf16() -> Iterator[None]:
    """The default dtype is bf16, as many a training script sets it."""
    before = torch.get_default_dtype()
    initial_weights.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)
    initial_weights.cache_clear()


@pytest.fixture
def redis_url(server: EmbeddedRedis) -> str:
    """URL of an empty database."""
    client = redis.Redis(unix_socket_path=str(server.socket))
    client.config_set("maxmemory", 0)
    client.flushall()
    client.close()
    return server.url


@pytest.fixture
def connect(redis_url: str) -> Iterator[Callable[[], Connection]]:
    """Make connections to the empty database; all are closed at the end."""
    made: list[Connection] = []

    def make() -> Connection:
        made.append(Connection(RedisSettings(url=redis_url, timeout_s=5.0)))
        return made[-1]

    yield make
    for connection in made:
        connection.close()


@pytest.fixture
def connection(connect: Callable[[], Connection]) -> Connection:
    """One connection to the empty database."""
    return connect()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 with its tokenizer, as a local base model."""
    from tests.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def expert_command(redis_url: str) -> Callable[..., Result]:
    """`fedmoe expert …` on the test's server; an error as the person sees it."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli, ["expert", words[0], "--redis", redis_url, *words[1:]])

    return run


@pytest.fixture
def reach() -> Iterator[Callable[..., Connection]]:
    """Make connections to a URL, with a time-out in seconds; all are closed at the end."""
    with ExitStack() as made:

        def make(url: str, timeout_s: float = 2.0) -> Connection:
            connection = Connection(RedisSettings(url=url, timeout_s=timeout_s))
            made.callback(connection.close)
            return connection

        yield make
