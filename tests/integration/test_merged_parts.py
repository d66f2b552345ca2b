"""A merged gateway that is too long for one Redis string: stored in parts, read whole, replaced without a trace."""

from collections.abc import Callable

import pytest
from redis.client import Pipeline

import fedmoe.store.gateway
from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import StaleStateError
from fedmoe.protocol.merged import MergedMeta
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection, execute
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.processes import eventually

PARTS = "fedmoe:{merged}:weights:*"
META = MergedMeta(built_from='{"a": {"version": 1, "weights_commit": "c"}}')


@pytest.fixture(autouse=True)
def _short_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A string of Redis holds 100 bytes, a part 64."""
    monkeypatch.setattr(fedmoe.store.gateway, "WHOLE_BYTES", 100)
    monkeypatch.setattr(fedmoe.store.gateway, "PART_BYTES", 64)


def build(connection: Connection) -> GatewayStore:
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    return GatewayStore(connection)


def test_parts_are_read_as_one_file_and_leave_nothing_behind(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as in one string; a rebuild drops the old parts, and so does one that needs none any more."""
    expert = make_expert(connection)
    store = build(connection)
    parts = sorted(connection.client.keys(PARTS))
    loaded = store.load_merged()
    assert loaded is not None
    assert len(parts) == loaded[0].parts == -(-len(loaded[1]) // 64) > 1
    assert {connection.client.pttl(key) for key in parts} == {-1}
    assert not connection.client.exists("fedmoe:{merged}:weights")
    assert Inspector(connection).federation().merged.exists

    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    build(connection)
    assert not set(connection.client.keys(PARTS)) & set(parts)
    assert len(connection.client.keys(PARTS)) == len(parts)
    rebuilt = store.load_merged()
    monkeypatch.setattr(fedmoe.store.gateway, "WHOLE_BYTES", 10**6)
    connection.client.delete("fedmoe:{merged}:lease")
    connection.client.hset("fedmoe:{merged}:meta", "settings", "other")
    build(connection)
    whole = store.load_merged()
    assert rebuilt is not None
    assert whole is not None
    assert whole[1] == rebuilt[1] != loaded[1]
    assert whole[0].parts is None
    assert connection.client.keys(PARTS) == []


def test_a_reader_gets_parts_of_one_build(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway is replaced after the reader has read the first part; a part that is gone for good is no gateway."""
    store, rival = GatewayStore(connection), GatewayStore(Connection(connection.settings))
    old, new = bytes([1]) * 200, bytes([2]) * 300
    store.write_merged(META, memoryview(old))
    get, left = connection.client.get, [new]

    def replaced_after(key: str) -> bytes | None:
        found: bytes | None = get(key)
        if left and ":weights:" in key:
            rival.write_merged(META, memoryview(left.pop()))
        return found

    monkeypatch.setattr(connection.client, "get", replaced_after)
    loaded = store.load_merged()
    assert loaded is not None
    assert loaded[1] == new
    connection.client.delete(connection.client.keys(PARTS)[0])
    assert store.load_merged() is None
    rival.connection.close()


@pytest.mark.parametrize("whole_bytes", [100, 10**6])
def test_weights_that_redis_lost_are_built_again(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, whole_bytes: int
) -> None:
    """One part, or the one string, was deleted by hand or evicted, and no expert changes meanwhile."""
    monkeypatch.setattr(fedmoe.store.gateway, "WHOLE_BYTES", whole_bytes)
    make_expert(connection)
    builder = GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0)
    store = GatewayStore(connection)
    assert builder.refresh()
    before = store.load_merged()
    assert before is not None
    assert not builder.refresh()
    connection.client.delete(connection.client.keys("fedmoe:{merged}:weights*")[0])
    assert store.load_merged() is None
    assert builder.refresh()
    loaded = store.load_merged()
    assert loaded is not None
    assert loaded[1] == before[1]


def test_a_late_builder_gives_way_and_its_parts_expire(
    connection: Connection, connect: Callable[[], Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the parts of one of the two would stay in Redis for ever."""
    late, present = GatewayStore(connection), GatewayStore(connect())
    late.write_merged(META, memoryview(bytes(200)))
    merged = late.merged

    def then_replaced() -> MergedMeta | None:
        found = merged()
        present.write_merged(META, memoryview(bytes([2]) * 200))
        return found

    monkeypatch.setattr(late, "merged", then_replaced)
    with raises(StaleStateError, about="gateway"):
        late.write_merged(META, memoryview(bytes([3]) * 200))
    loaded = present.load_merged()
    assert loaded is not None
    assert loaded[1] == bytes([2]) * 200
    assert len(connection.client.keys(PARTS)) == 4


def test_a_builder_that_is_killed_before_the_switch_leaves_the_old_gateway(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parts expire by themselves."""
    store = GatewayStore(connection)
    store.write_merged(META, memoryview(bytes([1]) * 200))

    def killed(pipe: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fedmoe.store.gateway, "execute", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write_merged(META, memoryview(bytes([2]) * 200))
    loaded = store.load_merged()
    assert loaded is not None
    assert loaded[1] == bytes([1]) * 200
    lives = sorted(connection.client.pttl(key) for key in connection.client.keys(PARTS))
    assert len(lives) == 8
    assert lives[:4] == [-1] * 4
    assert min(lives[4:]) > 0


@pytest.mark.parametrize("late", ["multi", "execute"])
def test_parts_that_expire_before_the_switch_are_not_switched_to(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """A builder is paused before its transaction: meta would name a gateway that nobody can read."""
    store, rival = GatewayStore(connection), Connection(connection.settings)
    store.write_merged(META, memoryview(bytes([1]) * 200))
    before = set(connection.client.keys(PARTS))

    def expire() -> None:
        (part, *_) = set(rival.client.keys(PARTS)) - before
        rival.client.pexpire(part, 1)
        eventually("its end", lambda: not rival.client.exists(part))

    if late == "execute":

        def then_execute(pipe: object) -> object:
            expire()
            return execute(pipe)

        monkeypatch.setattr(fedmoe.store.gateway, "execute", then_execute)
    else:
        set_to = Pipeline.set

        def then_expire(pipe: Pipeline, name: str, value: memoryview, px: int) -> object:
            done = set_to(pipe, name, value, px=px)
            if name.endswith(":3"):  # the last one
                expire()
            return done

        monkeypatch.setattr(Pipeline, "set", then_expire)
    with raises(StaleStateError, about="gateway"):
        store.write_merged(META, memoryview(bytes([2]) * 200))
    loaded = store.load_merged()
    assert loaded is not None
    assert loaded[1] == bytes([1]) * 200
    rival.close()
