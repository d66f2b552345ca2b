"""`fedmoe gateway follow`: each version under a name of its own, never a worse one, whatever is away meanwhile."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedmoe.tools.follow.follower
from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import SettingsError
from fedmoe.protocol.names import GATEWAY
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from fedmoe.tools.export import read_gateway
from fedmoe.tools.follow.directory import VersionDirectory
from tests.adapter_server import stand_in
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.following import Follow, Following, Gateway, config_in, followers

pytestmark = pytest.mark.one_server


@pytest.fixture
def follow(connection: Connection, tmp_path: Path) -> Iterator[Follow]:
    """Make followers of the test's federation."""
    with followers(connection, tmp_path) as make:
        yield make


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_each_version_is_served_under_its_own_name(connection: Connection, follow: Follow, kind: str) -> None:
    """Loaded, then the one before unloaded; no name with other weights; a restart of `follow` repeats nothing."""
    gateway = Gateway(connection)
    gateway.publish()
    with stand_in(kind, key="secret") as server:
        following = follow(server)
        names = []
        for _ in range(3):
            assert following.look()
            names.append(following.directory.current)
            assert names[-1] == read_gateway(GatewayStore(connection)).version_name()  # as `serve` calls it
            assert list(server.adapters) == [names[-1]]
            assert server.adapters[names[-1]] == str(following.directory.path(names[-1]))
            assert following.look()  # nothing new
            gateway.publish()
        assert [name.rpartition("-")[0] for name in names] == ["gateway-v1", "gateway-v2", "gateway-v3"]
        assert server.calls == [
            ("load", names[0]), ("load", names[1]), ("unload", names[0]), ("load", names[2]), ("unload", names[1]),
        ]  # fmt: skip
        again = follow(server)
        again.look()
        assert again.directory.current.startswith("gateway-v4-")
        calls = list(server.calls)
        for _ in range(2):
            again = follow(server)
            assert again.look()
        assert server.calls == calls
        assert list(server.adapters) == [again.directory.current]


def test_a_version_that_is_there_is_loaded_again_after_the_server_restarted(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that is away does not stop the export, and gets what is newest when it is back."""
    gateway = Gateway(connection)
    gateway.publish()
    with stand_in() as server:
        following = follow(server)
        assert following.look()
        first = following.directory.current
        server.stop()
        gateway.publish()
        assert not following.look()
        assert following.directory.current == first  # what is served, as far as anybody knows
        assert len(following.versions) == 2
        gateway.publish()
        assert not following.look()
        assert len([r for r in caplog.records if "cannot be reached" in r.message]) == 1
        server.start()
        assert following.look()
        assert following.directory.current.startswith("gateway-v3-")
        assert list(server.adapters) == [following.directory.current]
        server.stop()
        server.start()
        assert following.look()
        assert list(server.adapters) == [following.directory.current]
        server.broken = True
        gateway.publish()
        assert not following.look()
        server.broken = False
        assert following.look()
        assert following.directory.current.startswith("gateway-v4-")


def test_a_refused_version_leaves_the_one_before(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, and what helps; the next version, or another start of the server, is tried again."""
    gateway = Gateway(connection)
    gateway.publish()
    with stand_in() as server:
        following = follow(server)
        assert following.look()
        first = following.directory.current
        server.max_rank = 1
        gateway.publish()
        for _ in range(3):
            assert not following.look()
        assert [call for call, _ in server.calls] == ["load", "load"]
        (said,) = [r.message for r in caplog.records if "not served" in r.message]
        assert "LoRA rank 2 is greater than max_lora_rank 1." in said
        assert "--max-lora-rank 8" in said
        assert (following.directory.current, list(server.adapters)) == (first, [first])
        server.max_rank = 64
        monkeypatch.setattr(fedmoe.tools.follow.follower, "RETRY_REFUSED_S", 0.0)
        assert following.look()
        assert following.directory.current.startswith("gateway-v2-")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"updating": False}, "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"updating": False, "kind": "sglang"}, "start SGLang with --enable-lora"),
    ],
)
def test_a_server_without_the_endpoints_is_one_sentence(
    connection: Connection,
    follow: Follow,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    said: str,
) -> None:
    """It names the option with which the server must be started."""
    Gateway(connection).publish()
    with stand_in(**options) as server:
        assert not follow(server).look()
    assert said in caplog.text


def test_a_wrong_key_is_one_sentence(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that wants another key."""
    Gateway(connection).publish()
    with stand_in(key="secret") as server:
        following = follow(server)
        server.key = "another"
        assert not following.look()
        assert "refuses the key (401): set the right one (--api-key)" in caplog.text


def test_the_last_versions_stay(connection: Connection, follow: Follow) -> None:
    """`keep` of them, complete, beside the link; nothing else in the directory is touched."""
    gateway = Gateway(connection)
    following = follow(keep=2)
    (following.directory.root / "notes").mkdir()
    for _ in range(4):
        gateway.publish()
        following.look()
    assert [name.split("-")[1] for name in following.versions] == ["v3", "v4"]
    link = following.directory.root / "current"
    assert os.readlink(link) == following.versions[-1]
    assert config_in(link)["r"] == 2
    assert (following.directory.root / "notes").is_dir()
    assert [path.name for path in following.directory.root.glob(".new-*")] == []


@pytest.mark.parametrize("away", [True, False])
def test_versions_do_not_pile_up_while_none_is_served(
    connection: Connection, follow: Follow, away: bool
) -> None:
    """The server is away for long, or refuses each: the served version stays, and the last ones."""
    gateway = Gateway(connection)
    gateway.publish()
    with stand_in() as server:
        following = follow(server, keep=2)
        assert following.look()
        served = following.directory.current
        server.max_rank = 1
        if away:
            server.stop()
        for _ in range(5):
            gateway.publish()
            assert not following.look()
    assert following.directory.current == served
    assert [name.split("-")[1] for name in following.versions] == ["v1", "v5", "v6"]


def build(connection: Connection) -> None:
    """The merged gateway, as an aggregator builds it."""
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()


def kind_of(following: Following) -> str:
    """What is served."""
    return str(following.directory.info(following.directory.current)["kind"])


def test_the_merged_gateway_is_followed(connection: Connection, follow: Follow) -> None:
    """As soon as it is built."""
    expert = make_expert(connection, "a")
    worker = ScriptedWorker(connection, small_spec(), expert="a")
    following = follow()
    assert not following.look()  # no gateway yet
    build(connection)
    following.look()
    first = following.directory.current
    assert first.startswith("gateway-v0-")
    worker.push(0.5)
    serve(expert)
    build(connection)
    following.look()
    assert following.directory.current.startswith("gateway-v1-")


def test_the_other_kind_is_not_served_unasked(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, not for each version; the merged one is followed on; `--kind` or a measured loss lets it pass."""
    caplog.set_level("INFO")
    expert = make_expert(connection, "a")
    worker = ScriptedWorker(connection, small_spec(), expert="a")
    build(connection)
    assert follow().look()
    gateway, following = Gateway(connection), follow()
    for _ in range(3):
        gateway.publish()
        assert following.look()
        assert following.look()
        assert kind_of(following) == "merged"
    assert caplog.text.count("it is the trained gateway, gateway-v0-") == 1
    assert "(--data), or take it without a measurement (--kind trained)" in caplog.text
    for version, one in ((1, following), (2, follow())):
        worker.push(0.5)
        serve(expert)
        build(connection)
        assert one.look()
        assert one.directory.current.startswith(f"gateway-v{version}-")
        assert kind_of(one) == "merged"
    following = follow(kind="trained")
    assert following.look()
    assert kind_of(following) == "trained"
    remove_expert(connection, GATEWAY)
    following = follow()
    assert following.look()
    assert kind_of(following) == "trained"
    assert "it is the merged gateway, gateway-v3-" in caplog.text
    losses = iter((2.1, 2.0))  # the new one, then the served one
    following = follow(judge=lambda *_: next(losses))
    assert following.look()
    assert kind_of(following) == "trained"
    following = follow(judge=lambda *_: 2.0)
    assert following.look()
    assert kind_of(following) == "merged"


@pytest.mark.parametrize("kind", ["trained", "merged"])
def test_a_gateway_that_was_created_again_is_not_served_unasked(
    connection: Connection, follow: Follow, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Nor is a merge of experts that were; a new directory takes it, and so does a loss that is no worse."""
    caplog.set_level("INFO")
    name = GATEWAY if kind == "trained" else "a"

    def create(updates: int) -> None:
        expert = make_expert(connection, name)
        worker = ScriptedWorker(connection, small_spec(), f"{name}.alice", name)
        for _ in range(updates):
            worker.push(0.5)
            serve(expert)
            worker.pull()
        build(connection)

    make_expert(connection, "b")
    create(3)
    following = follow(kind=kind)
    assert following.look()
    served = following.directory.current
    remove_expert(connection, name)
    connection.client.delete(connection.keys.expert(name).meta)
    create(1)
    for _ in range(2):
        assert following.look()
        assert following.directory.current == served
    assert caplog.text.count(f"created again since {served}, which is served") == 1
    assert "(--data), or take it without a measurement (in a new --dir)" in caplog.text
    elsewhere = follow(kind=kind, out=tmp_path / "new")
    assert elsewhere.look()
    assert elsewhere.directory.current.startswith("gateway-v1-")
    following = follow(kind=kind, judge=lambda *_: 2.0)
    assert following.look()
    assert following.directory.current == elsewhere.directory.current


@pytest.mark.parametrize("lost", ["meta", "spec", "weights"])
def test_a_trained_gateway_that_redis_lost_is_waited_for(
    connection: Connection, follow: Follow, caplog: pytest.LogCaptureFixture, lost: str
) -> None:
    """Its place is not taken by the merged one, also where the directory is empty; `--kind merged` follows that."""
    make_expert(connection, "a")
    gateway = Gateway(connection)
    gateway.publish()
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    key = getattr(connection.keys.expert(GATEWAY), lost)
    connection.client.rename(key, "elsewhere")
    following = follow()
    for _ in range(2):
        assert not following.look()
        assert following.directory.current == ""
    assert len([record for record in caplog.records if "expert 'gateway' " in record.message]) == 1
    connection.client.rename("elsewhere", key)
    assert following.look()
    assert following.directory.current.startswith("gateway-v1-")
    assert following.directory.info(following.directory.current)["kind"] == "trained"


def test_a_command_serves_it(
    connection: Connection, follow: Follow, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told name and directory; if it fails, the version before stays."""
    gateway = Gateway(connection)
    gateway.publish()
    log = tmp_path / "log"
    following = follow(
        command=f'echo "$FEDMOE_NAME $FEDMOE_DIR after $FEDMOE_BEFORE" >> {log}; test ! -e {tmp_path}/broken'
    )
    assert following.look()
    assert following.look()
    first = following.directory.current
    gateway.publish()
    (tmp_path / "broken").touch()
    assert not following.look()
    assert following.directory.current == first
    assert "ended with exit code 1; trying again in a minute, and with the next version" in caplog.text
    (tmp_path / "broken").unlink()
    gateway.publish()
    assert following.look()
    third = following.directory.current
    lines = log.read_text().splitlines()
    assert lines[0] == f"{first} {following.directory.path(first)} after "
    assert lines[-1] == f"{third} {following.directory.path(third)} after {first}"
    assert len(lines) == 3


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    """A base model, an export, a real directory `current`, a file, one that another process has."""
    for file in ("config.json", "model.safetensors", "adapter_config.json"):
        (tmp_path / file).touch()
        with raises(SettingsError, about=file):
            VersionDirectory(tmp_path, GATEWAY)
        (tmp_path / file).unlink()
    (tmp_path / "a" / "current").mkdir(parents=True)
    with raises(SettingsError, about="current"):
        VersionDirectory(tmp_path / "a", GATEWAY)
    (tmp_path / "file").touch()
    with raises(SettingsError, about="disk"):
        VersionDirectory(tmp_path / "file", GATEWAY)
    first = VersionDirectory(tmp_path / "b", GATEWAY)
    with raises(SettingsError, about="lock"):
        VersionDirectory(tmp_path / "b", GATEWAY)
    first.close()
    VersionDirectory(tmp_path / "b", GATEWAY).close()
