"""Users, rights and TLS on a Redis Cluster: every node has its own users, and any replica may become a master."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner

from consumers.daemon import Aggregator
from fedmoe.cli.main import cli
from fedmoe.enrolment import Enrolment
from fedmoe.errors import RedisUnfitError
from fedmoe.protocol.parties import Party
from fedmoe.settings import AggregatorSettings, GatewaySettings, RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.nodes import other_nodes
from fedmoe.store.permissions import AGGREGATOR, WORKER, acl_rules
from fedmoe.store.probe import check_redis
from fedmoe.store.rights import require
from fedmoe.store.users import Users
from fedmoe.tools.deploy.enrol import enrolment_for
from fedmoe.tools.deploy.files import enrolment_text, write_private
from fedmoe.util.check import FAIL
from tests.cluster import Cluster
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert
from tests.guarded import EXPERT, KEYS, NAME
from tests.processes import eventually
from tests.self_signed import certificate_for

PARTIES = (
    Party(role="aggregator"), Party(role="operator"), Party(role="monitor"),
    Party(role="worker", expert=EXPERT, name=NAME),
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster(server: EmbeddedRedis, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three masters, each with a replica, with one federation on them."""
    with Cluster(server.server, tmp_path_factory.mktemp("cluster")) as running:
        make_expert(Connection(RedisSettings(url=running.url)), EXPERT)
        yield running


@pytest.fixture
def admin(cluster: Cluster) -> Iterator[Connection]:
    """A connection of a user who may do all."""
    connection = Connection(RedisSettings(url=cluster.url, timeout_s=5.0))
    yield connection
    connection.close()


def as_user(cluster: Cluster, party: Party) -> RedisSettings:
    """The settings of an enrolled party whose password is pw."""
    user = party.user(KEYS.prefix).replace(":", "%3A")
    return RedisSettings(url=f"cluster://{user}:pw@{cluster.hosts}", timeout_s=5.0)


def enrol(admin: Connection) -> Users:
    users = Users(admin)
    for party in PARTIES:
        users.set(party, (f"#{hashlib.sha256(b'pw').hexdigest()}",))
    return users


def denied(cluster: Cluster) -> list[str]:
    """What any node refused."""
    found = [
        f"{entry['username']} {entry['object']}" for node in cluster.nodes for entry in node.client.acl_log()
    ]
    return [text for text in found if not text.endswith("client|setinfo")]


def test_the_listed_rights_are_enough(cluster: Cluster, admin: Connection, tmp_path: Path) -> None:
    """Aggregator, worker, monitor and operator, each with its own rights on every node: nothing is refused."""
    enrol(admin)
    aggregator, operator, monitor, worker = (as_user(cluster, party) for party in PARTIES)
    stop = threading.Event()
    daemon = Aggregator(
        aggregator, [], AggregatorSettings(lease_s=1.0), GatewaySettings(interval_s=0.2), holder="one"
    )
    thread = threading.Thread(target=daemon.run, args=(stop,))
    thread.start()

    def fedmoe(who: RedisSettings, *words: str) -> str:
        done = CliRunner().invoke(cli, [*words, "--redis", who.url], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return str(done.output)

    try:
        require(Connection(aggregator), AGGREGATOR, [EXPERT])
        require(Connection(worker), WORKER, [EXPERT], NAME)
        scripted = ScriptedWorker(Connection(worker), make_expert(admin, "another").spec, NAME, EXPERT)
        scripted.push(1.0)
        store = GatewayStore(admin)
        eventually("the update", lambda: store.meta(EXPERT).applied == 1)
        eventually("the gateway", lambda: store.merged().experts[EXPERT].version == 1)
        assert EXPERT in fedmoe(monitor, "status")
        fedmoe(operator, "backup", str(tmp_path / "backup"))
        fedmoe(operator, "expert", "set", EXPERT, "--lr", "0.5")
        fedmoe(operator, "expert", "remove", "another", "--yes")
        fedmoe(operator, "restore", str(tmp_path / "backup"), "--replace")
    finally:
        stop.set()
        thread.join()
    assert denied(cluster) == []


def test_users_are_on_every_node(cluster: Cluster, admin: Connection) -> None:
    """Also on replicas; doctor and refresh find the node that has others; a revoked user is gone everywhere."""
    users = enrol(admin)
    names = {party.user(KEYS.prefix) for party in PARTIES}
    for node in cluster.nodes:
        assert names <= set(node.client.acl_users())
    assert users.differences() == []
    last = cluster.nodes[-1]
    user = PARTIES[0].user(KEYS.prefix)
    last.client.execute_command("ACL SETUSER", user, "-evalsha")
    (difference,) = users.differences()
    assert f"127.0.0.1:{last.port}" in difference.text
    checks, _ = check_redis(
        Connection(as_user(cluster, PARTIES[0])), stream=EXPERT, worker=NAME, role="aggregator"
    )
    wrong = [check.text for check in checks if check.what == "permissions" and check.level == FAIL]
    assert len(wrong) == 1
    assert "EVALSHA" in wrong[0]
    assert f"on 127.0.0.1:{last.port}" in wrong[0]
    users.refresh()
    assert users.differences() == []
    assert users.remove(PARTIES[3])
    login = as_user(cluster, PARTIES[3]).url.removeprefix("cluster://").partition("@")[0]
    for node in cluster.nodes:
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(f"redis://{login}@127.0.0.1:{node.port}").ping()


def test_a_node_that_is_down_is_named(cluster: Cluster, admin: Connection) -> None:
    """A revocation that did not reach it is said."""
    users = enrol(admin)
    replica = next(node for node in cluster.nodes if node.client.role()[0] == b"slave")
    replica.kill()
    try:
        users.remove(PARTIES[3])
        assert any(f"NOT done on 127.0.0.1:{replica.port}" in note for note in users.notes)
    finally:
        replica.start()
    eventually("the replica", cluster.is_whole)


def test_a_user_without_the_rights_of_a_cluster_is_told(cluster: Cluster, admin: Connection) -> None:
    """Its ACL line was made for one server."""
    rules = acl_rules(AGGREGATOR.rights(KEYS, "*", ""))
    for node in cluster.nodes:
        node.client.execute_command("ACL SETUSER", "old", "reset", "on", ">pw", *rules)
    settings = RedisSettings(url=f"cluster://old:pw@{cluster.hosts}")
    with raises(RedisUnfitError, about="rights") as error:
        Connection(settings).ping()
    assert "CLUSTER SLOTS" in str(error.value)
    for node in cluster.nodes:  # nothing is tried outside a transaction
        node.client.execute_command("ACL SETUSER", "old", "+cluster|slots", "-multi")
    key = KEYS.expert(EXPERT).meta
    before = admin.at(key).client.hgetall(key)
    connection = Connection(settings)
    with raises(RedisUnfitError, about="rights") as error:
        require(connection, AGGREGATOR, [EXPERT])
    assert "it lacks MULTI:" in str(error.value)
    assert admin.at(key).client.hgetall(key) == before
    connection.close()
    line = CliRunner().invoke(cli, ["doctor", "--acl", "aggregator", "--redis", cluster.url])
    assert "+cluster|slots" in line.output
    line = CliRunner().invoke(cli, ["doctor", "--acl", "aggregator"])
    assert "cluster" not in line.output


def test_enrolment_files_name_a_cluster(cluster: Cluster, admin: Connection, tmp_path: Path) -> None:
    """The operator's URL goes into them, without its login; a wrong password is said without it."""
    enrol(admin)
    operator = as_user(cluster, PARTIES[1])
    for secret, is_right in (("pw", True), ("wr0ng", False)):
        file = tmp_path / f"{secret}.toml"
        enrolled = replace(enrolment_for(operator, PARTIES[3], None), password=secret)
        assert enrolled.url == cluster.url
        write_private(file, enrolment_text(enrolled, PARTIES[3]))
        assert Enrolment.read(file).url == cluster.url
        connection = Connection(RedisSettings(enrolment=file))
        if is_right:
            at = connection.at(KEYS.expert(EXPERT).meta)
            assert at.client.hgetall(KEYS.expert(EXPERT).meta)
            continue
        with raises(RedisUnfitError, about="login") as error:
            connection.ping()
        assert "wr0ng" not in str(error.value)


def test_init_enrols_on_every_node(cluster: Cluster, tmp_path: Path) -> None:
    """Given the URL of a user who may set users; the operator that it makes goes on from there."""
    place = tmp_path / "third"
    words = ["--prefix", "third", "--beside", cluster.url, "--worker", f"{EXPERT}/{NAME}"]
    done = CliRunner().invoke(cli, ["init", str(place), *words])
    assert done.exit_code == 0
    assert done.stderr.count("no ACL file") == 1  # of these nodes
    for node in cluster.nodes:
        assert {party.user("third") for party in PARTIES} <= set(node.client.acl_users())
    assert f"user third:worker:{EXPERT}:{NAME} reset on #" in (place / "users.acl").read_text()
    config = ["--config", str(place / "fedmoe.toml")]
    audit = CliRunner().invoke(cli, [*config, "operator", "audit"], catch_exceptions=False)
    assert [line.split()[2] for line in audit.output.splitlines()[1:]] == [
        "operator", "aggregator", "monitor", "worker",
    ]  # fmt: skip
    make_expert(Connection(RedisSettings(enrolment=place / "enrolments" / "aggregator.toml")), EXPERT)
    assert EXPERT in CliRunner().invoke(cli, [*config, "status"], catch_exceptions=False).output
    checks, _ = check_redis(
        Connection(RedisSettings(enrolment=place / "enrolments" / "operator.toml")),
        stream=EXPERT, worker=NAME, role="operator",
    )  # fmt: skip
    texts = [check.text for check in checks if check.what in ("users", "permissions", "cluster")]
    assert "4 enrolled, the same on every master and replica" in texts
    assert "the same on all 6 nodes" in texts
    assert any("were not read on" in text for text in texts)
    assert any("anybody who reaches Redis may do everything" in text for text in texts)


@pytest.mark.one_server
def test_tls(server: EmbeddedRedis, tmp_path: Path) -> None:
    """To every node, checked against the given CA."""
    file = certificate_for(server.server, tmp_path)
    with Cluster(server.server, tmp_path / "cluster", certificate=file) as running:
        connection = Connection(RedisSettings(url=f"{running.url}?ssl_ca_certs={file}"))
        key = KEYS.expert(EXPERT).meta
        connection.at(key).client.set(key, "tls")
        assert running.master_of(key).client.get(key) == b"tls"
        assert connection.at(key).certificate_ends is not None
        assert len(other_nodes(connection)) == 5
        with raises(RedisUnfitError, about="certificate"):
            Connection(RedisSettings(url=f"{running.url}?ssl=true")).ping()
        connection.close()
