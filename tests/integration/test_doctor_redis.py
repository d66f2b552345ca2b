"""`fedmoe doctor` against a server: permissions are told without changing anything."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmoe.cli.main import cli
from fedmoe.errors import RedisUnfitError, SettingsError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.names import GATEWAY
from fedmoe.settings import RedisSettings
from fedmoe.store.change import change_rules_soon
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.permissions import AGGREGATOR, ANY, MONITOR, ROLES, WORKER, Role, acl_rules, worker_rights
from fedmoe.store.probe import check_redis, eviction_warning
from fedmoe.store.rights import try_transactions
from fedmoe.store.worker import WorkerStore
from fedmoe.util.check import FAIL, OK, WARN
from tests.federation import ScriptedWorker, make_expert, serve, small_spec
from tests.ports import free_port
from tests.processes import eventually, fedmoe, fedmoe_here

MAY_SERVE = "this user may serve experts"
MAY_TRAIN = "this user may train {} as alice"
MAY_OPERATE = "this user may back up, restore, change, roll back, add, remove, verify, fit, export and enrol"
MAY_LOOK = "this user may read the status"


def rules(role: Role, *more: str) -> list[str]:
    """Rules of a user with the rights of a role; as a worker, of alice."""
    return [*acl_rules(role.rights(Keys(), "sql_expert" if role is WORKER else ANY, "alice")), *more]


As = Callable[..., Connection]


@pytest.fixture
def user(connection: Connection) -> Iterator[As]:
    """Connect as a user with these rights."""

    def make(*rights: str) -> Connection:
        connection.client.execute_command("ACL", "SETUSER", "someone", "reset", "on", ">pw", *rights)
        url = connection.settings.url.replace("unix://", "unix://someone:pw@")
        return Connection(RedisSettings(url=url))

    yield make
    connection.client.execute_command("ACL", "DELUSER", "someone")


def told(connection: Connection, role: str = "", worker: str = "alice") -> list[tuple[str, str]]:
    checks, _ = check_redis(connection, stream="", worker=worker, role=role)
    return [(check.level, check.text) for check in checks if check.what == "permissions"]


def test_a_user_without_limits_may_do_everything_and_nothing_is_changed(connection: Connection) -> None:
    """Neither in an empty server nor in a living federation: not a key, not a heartbeat, not an expiry."""
    expected = [(OK, text) for text in (MAY_SERVE, MAY_TRAIN, MAY_OPERATE, MAY_LOOK)]
    assert told(connection) == [(level, text.format("python_expert")) for level, text in expected]
    assert list(connection.client.scan_iter()) == []
    expert = make_expert(connection)
    alice = ScriptedWorker(connection, small_spec())
    alice.push(0.5)
    serve(expert)
    alice.push(0.5)
    WorkerStore(connection, "sql_expert", "alice").beat(Beat(run="1-00000000"), ttl_s=60)
    before = {key: connection.client.dump(key) for key in connection.client.scan_iter()}
    assert len(before) == 12
    assert told(connection) == [(level, text.format("sql_expert")) for level, text in expected]
    assert {key: connection.client.dump(key) for key in connection.client.scan_iter()} == before
    assert 0 < connection.client.ttl("fedmoe:{sql_expert}:worker:alice") <= 60


def test_a_worker_may_train_under_its_own_name_only(connection: Connection, user: As) -> None:
    """And what it lacks under another is listed, key by key."""
    make_expert(connection)
    alice = user(*rules(WORKER))
    assert told(alice, role="worker") == [(OK, "this user may train sql_expert as alice")]
    assert [level for level, _ in told(alice)] == [WARN, OK, WARN, WARN]
    ((level, text),) = told(alice, role="worker", worker="bob")
    assert level == FAIL
    own, payloads = "fedmoe:{sql_expert}:worker:bob", "fedmoe:{sql_expert}:payload:bob:*"
    for command in (f"HSET {own}", f"PEXPIRE {own}", f"DEL {own}", f"SET {payloads}", f"INCRBY {payloads}"):
        assert command in text
    assert "alice" not in text
    assert " XADD" not in text


@pytest.mark.parametrize("role", ROLES.values(), ids=ROLES)
def test_each_missing_right_is_named(connection: Connection, user: As, role: Role) -> None:
    """Take any command away from the rules that are printed, and doctor names it, with its keys; else all is well."""
    make_expert(connection)
    assert {level for level, _ in told(user(*rules(role)), role=role.name)} == {OK}
    rights = role.rights(Keys(), "sql_expert", "alice")
    for command in {right.command for right in rights}:
        level_without = WARN if all(r.without for r in rights if r.command == command) else FAIL
        selectors = [
            rule for rule in rules(role) if not rule.startswith("(") or f"+{command.lower()}" not in rule
        ]
        without = user(*selectors, f"-{command.lower().replace(' ', '|')}")
        level, text = next(
            line for line in told(without, role=role.name) if role.does.split(",")[0] in line[1]
        )
        assert (level, command in text) == (level_without, True), command


def test_a_missing_key_is_named(connection: Connection, user: As) -> None:
    """Though the server does not say which it is."""
    make_expert(connection)
    less = [rule for rule in rules(AGGREGATOR) if not rule.endswith(":lease")]
    ((level, text),) = told(user(*less), role="aggregator")
    assert level == FAIL
    assert "EVALSHA fedmoe:{sql_expert}:lease" in text
    assert ":meta" not in text


def test_a_monitor_may_look(connection: Connection, user: As) -> None:
    """With exit code 0 for that role; the base model is the expert's."""
    make_expert(connection, base_model="org/tiny")
    monitor = user(*rules(MONITOR))
    assert told(monitor, role="monitor") == [(OK, MAY_LOOK)]
    url = connection.settings.url.replace("unix://", "unix://someone:pw@")
    done = fedmoe_here("doctor", "--redis", url, "--role", "monitor")
    assert (done.returncode, done.stderr) == (0, "")
    assert "org/tiny is not in the hub cache" in done.stdout
    looks, compares = told(user(*rules(MONITOR, "-info")), role="monitor")
    assert looks == (WARN, f"{MAY_LOOK} (without INFO, version and memory of the server are not shown)")
    assert compares[0] == WARN
    assert compares[1].startswith("the rights on replicas are not known: ")


def test_a_user_who_may_nothing_fails(connection: Connection, user: As) -> None:
    """Without asking for a role."""
    make_expert(connection)
    assert {level for level, _ in told(user("-@all"))} == {FAIL}


@pytest.mark.parametrize("role", [AGGREGATOR, WORKER], ids=["aggregator", "worker"])
@pytest.mark.parametrize("commands", [("EVAL", "EVALSHA", "SCRIPT"), ("WATCH",), ("XADD",)])
def test_a_command_that_was_renamed_away_is_found_before_anything_begins(
    server: EmbeddedRedis, tmp_path: Path, role: Role, commands: tuple[str, ...]
) -> None:
    """By doctor; and aggregator and worker end with exit code 2 before they have created or trained anything."""
    (tmp_path / "rows").write_text('{"prompt": "a", "completion": "b"}')
    options = [word for command in commands for word in ("--rename-command", command, "")]
    run = {"aggregator": ["run"], "worker": ["run", "--stream", "a", "--data", str(tmp_path / "rows")]}
    needs = any(right.command.split()[0] in commands for right in role.rights(Keys(), "a", "alice"))
    with EmbeddedRedis(server=server.server, options=options) as own:
        connection = Connection(RedisSettings(url=own.url))
        level, text = next(line for line in told(connection, role=role.name) if role.does in line[1])
        assert level == (FAIL if needs else OK)
        if needs:
            assert all(command in text for command in commands)
            assert "(this server does not know it)" in text
            done = CliRunner().invoke(cli, [role.name, *run[role.name], "--redis", own.url])
            assert isinstance(done.exception, RedisUnfitError)
            assert done.exception.exit_code == 2
            assert f"has no {commands[0]}" in str(done.exception)
            assert "take it out of rename-command" in str(done.exception)
        assert list(connection.client.scan_iter()) == []


def test_without_info_all_works_and_it_is_said(server: EmbeddedRedis) -> None:
    """A managed server may have renamed it: a warning, and an update is published and applied."""
    with EmbeddedRedis(server=server.server, options=["--rename-command", "INFO", ""]) as own:
        connection = Connection(RedisSettings(url=own.url))
        expert = make_expert(connection)
        checks, _ = check_redis(Connection(connection.settings), stream="", worker="alice", role="")
        assert {check.level for check in checks} == {OK, WARN}
        assert "does not answer INFO" in checks[0].text
        ScriptedWorker(connection, small_spec()).push(1.0)
        assert serve(expert) == ["applied"]


@pytest.mark.parametrize("role", [AGGREGATOR, WORKER], ids=["aggregator", "worker"])
def test_transactions_that_do_not_hold_are_found(
    connection: Connection, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that takes WATCH and forgets it, one that never executes, scripts that do not compare."""
    assert try_transactions(connection, role, "sql_expert", "alice") == ""
    assert list(connection.client.scan_iter()) == []
    pipeline = type(connection.client.pipeline())
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "watch", lambda self, *keys: None)
        assert "though the key that it watched had changed" in try_transactions(connection, role, "a", "b")
    with monkeypatch.context() as patch:
        patch.setattr("fedmoe.store.rights.execute", lambda pipe: pipe.reset())
        assert "though nobody had changed" in try_transactions(connection, role, "a", "b")
    with monkeypatch.context() as patch:
        patch.setattr("fedmoe.store.rights.Lease.hold", lambda self: True)
        wrong = try_transactions(connection, role, "a", "b")
        assert wrong == ("two connections could take one lease" if role is AGGREGATOR else "")
    with monkeypatch.context() as patch:
        patch.setattr("fedmoe.store.rights.transact", lambda *_: True)
        wrong = try_transactions(connection, role, "a", "b")
        assert wrong == ("two connections could commit on top of one commit" if role is AGGREGATOR else "")
        checks, _ = check_redis(connection, stream="", worker="alice", role="aggregator")
        assert [check.level for check in checks if check.what == "transactions"] == [FAIL]


def test_the_acl_line_makes_that_user(connection: Connection) -> None:
    """As an ACL file or ACL SETUSER takes it; another database than 0 needs SELECT."""
    done = CliRunner().invoke(cli, ["doctor", "--acl", "worker", "--stream", "sql_expert", "--name", "alice"])
    assert done.exit_code == 0
    _, name, on, password, *found = done.output.replace("(", " (").split(" ")
    assert (name, on, password) == ("alice", "on", ">PASSWORD")
    assert "+select" not in done.output
    both = acl_rules(worker_rights(Keys(), "sql_expert", "alice", trains_gateway=True))
    assert " ".join(both) in done.output
    assert "~fedmoe:{gateway}:payload:sql_expert.alice:*" in both
    done = CliRunner().invoke(cli, ["doctor", "--acl", "worker", "--stream", "a.b", "--name", "alice"])
    assert "gateway" not in done.output  # its workers cannot train it
    done = CliRunner().invoke(
        cli, ["doctor", "--acl", "monitor", "--redis", "redis://nowhere/3", "--insecure"]
    )
    assert done.output.startswith("user monitor on >PASSWORD ")
    assert " +select " in done.output
    done = CliRunner().invoke(cli, ["doctor", "--acl", "worker"])
    assert isinstance(done.exception, SettingsError)
    assert found


def test_worker_that_trains_the_gateway_needs_its_rights_too(connection: Connection, user: As) -> None:
    """As soon as the rules of its expert say so."""
    make_expert(connection, "sql_expert")
    mine = user(*rules(WORKER), "(+hgetall ~*)", "+scan", "+info")

    def said() -> str:
        checks, _ = check_redis(mine, stream="sql_expert", worker="alice", role="worker")
        return next(check.text for check in checks if check.what == "permissions")

    assert said() == "this user may train sql_expert as alice"
    make_expert(connection, GATEWAY)
    change_rules_soon(ExpertStore(connection, "sql_expert"), {"train": "both"})
    assert said().startswith("this user may not train sql_expert and the gateway as alice: it lacks ")
    assert "XADD fedmoe:{gateway}:updates" in said()


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-lru"])
@pytest.mark.parametrize("refused", ["", "-info"])
def test_eviction_is_told_at_the_start(connection: Connection, user: As, policy: str, refused: str) -> None:
    """By INFO, else by CONFIG GET; nothing if neither is allowed."""
    connection.client.config_set("maxmemory-policy", policy)
    try:
        told = eviction_warning(user("~*", "+@all", *([refused] if refused else [])))
        assert eviction_warning(user("~*", "+@all", "-info", "-config")) == ""
    finally:
        connection.client.config_set("maxmemory-policy", "noeviction")
    assert (
        f"(maxmemory-policy {policy}): set maxmemory-policy to noeviction with `redis-cli CONFIG SET" in told
    )
    assert eviction_warning(connection) == ""


def test_the_command_prints_a_line_each_and_its_exit_code() -> None:
    """0 without Redis, 1 with one that is not there, 2 for an impossible name; never a traceback."""
    done = fedmoe("doctor", "--no-redis")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()[:4]] == [OK] * 4
    assert "Qwen/Qwen2.5-0.5B-Instruct" in done.stdout
    done = fedmoe_here("doctor", "--redis", "redis://me:secret@127.0.0.1:1")
    assert (done.returncode, done.stderr) == (1, "")
    (failed,) = (line for line in done.stdout.splitlines() if line.startswith(FAIL))
    assert "cannot be reached" in failed
    assert "secret" not in done.stdout
    assert fedmoe_here("doctor", "--no-redis", "--name", "a:b").returncode == 2


def test_a_replica_to_which_the_password_would_go_as_plain_text_is_a_warning(server: EmbeddedRedis) -> None:
    """The master is on this machine and the replica on another one, which may be as it should be."""
    quiet = ["--appendonly", "no", "--port"]
    ports = [str(free_port()) for _ in range(2)]
    away = "0.0.0.0"  # noqa: S104  # reaches this machine on Linux, and is no address of loopback
    announced = ["--replicaof", f"127.0.0.1 {ports[0]}", "--replica-announce-ip", away]
    with (
        EmbeddedRedis(server=server.server, options=[*quiet, ports[0]]) as master,
        EmbeddedRedis(server=server.server, options=[*quiet, ports[1], *announced]),
    ):
        admin = Connection(RedisSettings(url=master.url))
        eventually("the replica", lambda: "slave0" in admin.client.info("replication"))
        admin.client.execute_command("ACL", "SETUSER", "super", "on", ">pw", "~*", "&*", "+@all")
        url = f"redis://super:pw@localhost:{ports[0]}"
        checks, _ = check_redis(Connection(RedisSettings(url=url)), stream="", worker="", role="")
        admin.close()
    found = {check.what: check for check in checks if "are not known" in check.text}
    assert {what: check.level for what, check in found.items()} == {"permissions": WARN, "users": WARN}
    assert "say --insecure if the network itself is encrypted" in found["users"].text
    assert not [check.text for check in checks if check.level == FAIL]
