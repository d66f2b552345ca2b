"""Redis refuses something while an update is copied or committed: the expert stays whole, and no copy is left."""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedmoe.store.expert
from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from fedmoe.errors import RedisUnavailableError, StaleStateError
from fedmoe.protocol.keys import Keys
from fedmoe.settings import AggregatorSettings, RedisSettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.permissions import AGGREGATOR, NO_COPIED_TAIL, NO_COPIES, acl_rules
from tests.federation import ScriptedWorker, serve
from tests.integration.test_tail import NAME, begin, copies_of, meta_of, train
from tests.protocol.actors import OneTurn, TurnOver

RIGHTS = AGGREGATOR.rights(Keys(), "*", "")
OF_EARLIER_RELEASE = tuple(right for right in RIGHTS if right.without not in (NO_COPIES, NO_COPIED_TAIL))


@pytest.fixture(name="own")
def _own(server: EmbeddedRedis) -> Iterator[Connection]:
    """A server that may get full."""
    with EmbeddedRedis(server=server.server, options=["--appendonly", "no"]) as own:
        connection = Connection(RedisSettings(url=own.url))
        yield connection
        connection.close()


def _heir(expert: Expert) -> Expert:
    """What another aggregator loads."""
    heir = Expert(expert.store, expert.spec, aggregator="heir")
    heir.load()
    return heir


def test_a_copy_expires_before_the_commit_to_a_full_redis(
    own: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script does not go by WATCH, so it looks itself whether what it is to keep is there."""
    expert = begin(own, tmp_path)
    ScriptedWorker(own, expert.spec).push(0.1)
    look, commit = expert.store.check_head, fedmoe.store.expert.transact

    def full_by_now(*what: Any) -> Any:
        own.client.config_set("maxmemory", 1)
        return look(*what)

    def late(*what: Any, **more: Any) -> bool:
        for key in copies_of(expert):
            own.client.delete(key)
        return commit(*what, **more)

    monkeypatch.setattr(expert.store, "check_head", full_by_now)
    monkeypatch.setattr(fedmoe.store.expert, "transact", late)
    with pytest.raises(StaleStateError):
        serve(expert)
    own.client.config_set("maxmemory", 0)
    assert _heir(expert).meta.version == 0


@pytest.mark.parametrize("is_full", [False, True])
def test_the_right_to_copies_is_taken_away_while_an_expert_is_served(
    own: Connection, tmp_path: Path, is_full: bool
) -> None:
    """An operator of an earlier release runs `fedmoe operator refresh`: the commit is refused as a whole."""
    expert = begin(own, tmp_path)
    train(expert, 2)

    def may(rules: list[str]) -> None:
        own.client.execute_command("ACL", "SETUSER", "one", "reset", "on", ">pw", *rules)

    may(acl_rules(RIGHTS))
    path = own.settings.url.removeprefix("unix://")
    of_user = Connection(RedisSettings(url=f"unix://one:pw@{path}"))
    serving = Expert(ExpertStore(of_user, NAME), expert.spec, aggregator="one")
    serving.load()
    may(acl_rules(OF_EARLIER_RELEASE))
    ScriptedWorker(own, expert.spec, "bob").push(0.1)
    own.client.config_set("maxmemory", int(is_full))
    with pytest.raises(RedisUnavailableError):
        serve(serving)
    own.client.config_set("maxmemory", 0)
    assert _heir(expert).meta.version == 2
    of_user.close()


def test_a_batch_that_fails_before_its_commit_leaves_no_copy(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk for kept updates is full: the aggregator tries again and again, and Redis does not fill up too."""

    def keep(*what: Any, **more: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Archive, "keep", keep)
    expert = begin(connection, tmp_path)
    settings = AggregatorSettings(block_ms=1, keep_updates=tmp_path / "kept")
    serving = ExpertServer(connection, NAME, settings, holder="one")
    ScriptedWorker(connection, expert.spec).push(0.1)
    for _ in range(3):
        with pytest.raises(TurnOver):
            serving.run(OneTurn())
    assert meta_of(expert).version == 0
    assert copies_of(expert) == []
