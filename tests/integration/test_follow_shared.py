"""`fedmoe gateway follow`, several of them with one server: none unloads what it has not loaded itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.gateway.builder import GatewayBuilder
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.tools.follow.directory import LOADED
from fedmoe.tools.follow.servers import AdapterServer
from tests.adapter_server import stand_in
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.following import Follow, Gateway, followers

pytestmark = pytest.mark.one_server


@pytest.fixture
def follow(connection: Connection, tmp_path: Path) -> Iterator[Follow]:
    """Make followers of the test's federation."""
    with followers(connection, tmp_path) as make:
        yield make


class Merged:
    """A merged gateway; `publish` makes its next version."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._expert = connection, make_expert(connection, "a")
        self._worker = ScriptedWorker(connection, small_spec(), expert="a")

    def publish(self) -> None:
        self._worker.push(0.5)
        serve(self._expert)
        self._worker.pull()
        GatewayBuilder(self._connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_two_that_follow_different_gateways_leave_each_other_s_versions(
    connection: Connection, follow: Follow, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each has one version loaded, also after a restart of each and of the server; each says once whose it leaves."""
    trained, merged = Gateway(connection), Merged(connection)
    with stand_in(kind) as server:
        for restart in (False, False, True):
            trained.publish()
            merged.publish()
            if restart:
                server.stop()
                server.start()
            both = [follow(server, kind=kind, out=tmp_path / kind) for kind in ("trained", "merged")]
            caplog.clear()
            for _ in range(3):
                assert [following.look() for following in both] == [True, True]
                assert sorted(server.adapters) == sorted(one.directory.current for one in both)
            assert caplog.text.count("give each a --name of its own") == 2
        assert sorted(name.split("-")[1] for name in server.adapters) == ["v3", "v3"]
    calls = [name for call, name in server.calls if call == "unload"]
    assert len(calls) == len(set(calls)) == 2


def test_the_same_version_belongs_to_who_loaded_it(
    connection: Connection, follow: Follow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that follow one gateway; the second one loads each version at the same moment, and nothing is refused."""
    gateway = Gateway(connection)
    with stand_in() as server:
        first, second = (follow(server, out=tmp_path / name) for name in ("first", "second"))
        load = AdapterServer.load

        def late(adapters: AdapterServer, name: str, path: Path) -> None:
            monkeypatch.undo()
            assert second.look()
            load(adapters, name, path)

        for _ in range(3):
            gateway.publish()
            monkeypatch.setattr(AdapterServer, "load", late)
            assert first.look()
            assert list(server.adapters) == [first.directory.current] == [second.directory.current]
        assert first.directory.loaded == set()
        assert second.directory.loaded == set(server.adapters)


def test_what_an_earlier_release_has_loaded_is_unloaded(connection: Connection, follow: Follow) -> None:
    """It noted nothing; the current version was the one that it had loaded."""
    gateway = Gateway(connection)
    gateway.publish()
    with stand_in() as server:
        following = follow(server)
        assert following.look()
        (following.directory.root / LOADED).unlink()
        gateway.publish()
        assert follow(server).look()
        assert [name.split("-")[1] for name in server.adapters] == ["v2"]


def test_a_version_whose_load_was_cut_off_is_unloaded_later(
    connection: Connection, follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`follow` is killed after the server has loaded it, and before it could write anything down."""
    gateway = Gateway(connection)
    gateway.publish()
    with stand_in() as server:
        load = AdapterServer.load

        def killed(adapters: AdapterServer, name: str, path: Path) -> None:
            load(adapters, name, path)
            raise KeyboardInterrupt

        monkeypatch.setattr(AdapterServer, "load", killed)
        with pytest.raises(KeyboardInterrupt):
            follow(server).look()
        monkeypatch.undo()
        gateway.publish()
        assert follow(server).look()
        assert [name.split("-")[1] for name in server.adapters] == ["v2"]
