"""Enrolment when something is in the way: the own user, a replica, a full Redis, a wrong file, an odd directory."""

import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmoe.cli.main import cli
from fedmoe.enrolment import Enrolment
from fedmoe.errors import RedisUnavailableError, RedisUnfitError, SettingsError
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.permissions import AGGREGATOR
from fedmoe.store.probe import check_redis
from fedmoe.store.rights import require
from fedmoe.store.users import Users
from fedmoe.tools.deploy.deployment import Deployment, renew
from tests.errors import raises
from tests.integration.test_enrolment import worker_login
from tests.processes import eventually
from tests.secured import EXPERT, NAME, W1, Secured

pytestmark = pytest.mark.one_server
W2 = ("w2", "--stream", EXPERT)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    with Secured(tmp_path / "deployment") as running:
        yield running


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Secured]:
    """A server that refuses every write of data."""
    with Secured(tmp_path / "deployment", options=["--maxmemory", "1kb"]) as running:
        yield running


@pytest.fixture
def replica(secured: Secured, tmp_path: Path) -> Iterator[Secured]:
    """A replica with a copy of the deployment."""
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", secured.directory, copy], check=True)
    for file in (copy / "enrolments").iterdir():
        file.write_text(file.read_text().replace(str(secured.port), "REPLICA"))
    running = Secured(copy, options=["--replicaof", "localhost", str(secured.port)])
    for file in (copy / "enrolments").iterdir():
        file.write_text(file.read_text().replace("REPLICA", str(running.port)))
    with running:
        master = secured.connection("operator").client
        eventually("the replica", lambda: master.info("replication")["slave0"]["state"] == "online")
        yield running


def rotate_self(secured: Secured) -> None:
    """Give the operator a new password, in its own file."""
    secured.fedmoe("operator", "operator", "enrol", "--rotate", "--out", str(secured.file("operator")))


def test_an_operator_does_not_revoke_itself(secured: Secured) -> None:
    """Its connection would be cut before ACL SAVE, so it would be back after a restart."""
    with raises(SettingsError, about="name"):
        secured.fedmoe("operator", "operator", "revoke", "main")
    assert Party(role="operator") in Users(secured.connection("operator")).parties()


def test_a_full_redis_leaves_the_old_password(full: Secured) -> None:
    """The audit log takes no line, so nothing is changed."""
    before = full.file("operator").read_text()
    with pytest.raises(RedisUnavailableError, match="full"):
        rotate_self(full)
    assert full.file("operator").read_text() == before
    assert Users(full.connection("operator")).own_name()


def test_a_full_redis_leaves_no_file_of_nobody(full: Secured, tmp_path: Path) -> None:
    """Nor a part of one, so that the same command works later."""
    with pytest.raises(RedisUnavailableError, match="full"):
        full.fedmoe("operator", "worker", "enrol", *W2, "--out", str(tmp_path / "w2.toml"))
    assert not list(tmp_path.glob("*w2*"))


def test_a_revocation_without_a_line_in_the_audit_log_says_so(full: Secured) -> None:
    """It is done all the same."""
    with pytest.raises(RedisUnavailableError, match=r"audit log has no line.*full"):
        full.fedmoe("operator", "worker", "revoke", NAME, "--stream", EXPERT)
    assert W1 not in Users(full.connection("operator")).parties()


def test_an_operator_gives_itself_a_new_password_on_every_node(secured: Secured, replica: Secured) -> None:
    """The replicas are asked with the old one, which they still know."""
    rotate_self(secured)
    assert "the same on every master" in secured.fedmoe("operator", "doctor").output


def doctor_of(file: Path) -> str:
    """What doctor tells a worker about its rights, also on the replicas."""
    connection = Connection(RedisSettings(enrolment=file))
    checks, _ = check_redis(connection, stream=EXPERT, worker="w2", role="worker")
    return "\n".join(check.text for check in checks if check.what == "permissions")


def test_enrolments_reach_every_replica_and_doctor_compares(
    secured: Secured, replica: Secured, tmp_path: Path
) -> None:
    """What a replica has otherwise is named, to a worker as to an operator, and repaired."""
    file = tmp_path / "w2.toml"
    secured.fedmoe("operator", "worker", "enrol", *W2, "--out", str(file))
    there = Users(replica.connection("operator"))
    assert Users(secured.connection("operator")).parties() == there.parties()
    assert "the same on every master" in secured.fedmoe("operator", "doctor").output
    assert "the same on all 2 nodes" in doctor_of(file)
    user = Party(role="worker", expert=EXPERT, name="w2").user("fedmoe")
    acl = there.connection.client.execute_command
    acl("ACL SETUSER", user, "-xadd", "clearselectors")
    assert "this user lacks XADD" in doctor_of(file)
    acl("ACL DELUSER", user)
    assert f"the rights on 127.0.0.1:{replica.port} are not known" in doctor_of(file)
    acl("ACL SETUSER", "default", "-@all")
    doctor = secured.fedmoe("operator", "doctor")
    assert doctor.exit_code == 1
    assert f"differ from the master's (worker w2 of {EXPERT})" in doctor.output
    assert f"on 127.0.0.1:{replica.port} the user default lacks rights" in doctor.output
    secured.fedmoe("operator", "operator", "refresh")
    assert "the same on every master" in secured.fedmoe("operator", "doctor").output


def test_users_are_not_changed_on_a_replica(replica: Secured, tmp_path: Path) -> None:
    """The master would go on with them."""
    for words in (
        ("worker", "enrol", *W2, "--out", str(tmp_path / "w2.toml")),
        ("worker", "revoke", NAME, "--stream", EXPERT), ("operator", "refresh"),
    ):  # fmt: skip
        with raises(RedisUnfitError, about="replica"):
            replica.fedmoe("operator", *words)
    assert not list(tmp_path.glob("*w2*"))
    assert W1 in Users(replica.connection("operator")).parties()


def test_rotate_replaces_only_the_party_s_own_file(secured: Secured, tmp_path: Path) -> None:
    """Not another's, nor a key beside an enrolment."""
    other = secured.file("monitor")
    before = other.read_text()
    key = tmp_path / "w1.key"
    key.write_text("key")
    for out in (other, key):
        with raises(SettingsError, about="out"):
            secured.fedmoe(
                "operator", "worker", "enrol", NAME, "--stream", EXPERT, "--rotate", "--out", str(out)
            )
    assert other.read_text() == before
    assert key.read_text() == "key"
    assert worker_login(secured.file(NAME))


def test_a_deployment_works_in_an_odd_directory(tmp_path: Path) -> None:
    """Redis reads its path from redis.conf, and fedmoe from fedmoe.toml."""
    place = tmp_path / 'my "own" 😀 \\n'
    with Secured(place) as running:
        assert Users(running.connection("operator")).own_name()
    settings = tomllib.loads((place / "fedmoe.toml").read_text())
    assert Path(settings["enrolment"]) == place.resolve() / "enrolments" / "operator.toml"


def test_the_enrolment_of_another_role_is_named(secured: Secured) -> None:
    """Not each of a hundred rights that it lacks."""
    with pytest.raises(RedisUnfitError, match=r"that of a worker, .* one of the role aggregator"):
        require(secured.connection(NAME), AGGREGATOR, [EXPERT])


def test_a_control_sequence_in_an_enrolment_is_not_printed(tmp_path: Path) -> None:
    """A variable's name is the operator's text, too."""
    Deployment(directory=tmp_path / "d", hosts=["localhost"]).write(now=0.0)
    file = tmp_path / "d" / "enrolments" / "monitor.toml"
    text = file.read_text().splitlines()
    file.write_text(
        "\n".join(r'password_env = "\u001b[31mX"' if "password =" in line else line for line in text)
    )
    with pytest.raises(RedisUnfitError) as caught:
        Enrolment.read(file).login()
    assert "\x1b" not in str(caught.value)


def test_a_damaged_ca_is_named(tmp_path: Path) -> None:
    """Not as a server that cannot be reached."""
    Deployment(directory=tmp_path / "d", hosts=["localhost"]).write(now=0.0)
    file = tmp_path / "d" / "enrolments" / "monitor.toml"
    for old, new in (
        ("-----BEGIN", "-----BEGAN"),
        ("-----\nMII", "-----\nMIIX"),
        ("-----\nMII", "-----\n😀"),
    ):
        broken = tmp_path / "broken.toml"
        broken.write_text(file.read_text().replace(old, new))
        broken.chmod(0o600)
        with raises(SettingsError, about="ca"):
            Connection(RedisSettings(enrolment=broken))


@pytest.mark.parametrize("key", ["", "garbage", "another's"])
def test_a_renewal_needs_the_authority_s_own_key(tmp_path: Path, key: str) -> None:
    """Nobody would trust a certificate of another one."""
    for name in ("d", "other"):
        Deployment(directory=tmp_path / name, hosts=["h"]).write(now=0.0)
    other = (tmp_path / "other" / "tls" / "ca.key").read_text()
    (tmp_path / "d" / "tls" / "ca.key").write_text(other if key == "another's" else key)
    before = (tmp_path / "d" / "tls" / "redis.crt").read_text()
    with raises(SettingsError, about="deployment"):
        renew(tmp_path / "d", [])
    assert (tmp_path / "d" / "tls" / "redis.crt").read_text() == before


def test_a_renewal_does_not_forget_hosts(tmp_path: Path) -> None:
    """They stand in the old certificate only."""
    Deployment(directory=tmp_path / "d", hosts=["h"]).write(now=0.0)
    (tmp_path / "d" / "tls" / "redis.crt").write_text("garbage")
    with raises(SettingsError, about="host"):
        renew(tmp_path / "d", [])
    assert "h2" in renew(tmp_path / "d", ["h2"])


def test_a_key_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Not as a server that cannot be reached, for which a process would wait for ever."""
    Deployment(directory=tmp_path / "d", hosts=["localhost"]).write(now=0.0)
    file = tmp_path / "d" / "enrolments" / "monitor.toml"
    file.write_text(f'certificate_file = "m.crt"\nkey_file = "m.key"\n{file.read_text()}')
    with raises(SettingsError, about="key_file"):
        Connection(RedisSettings(enrolment=file))


@pytest.mark.parametrize("host", ["redis.example.org:6379", ":", "..", "a" * 300, "a b"])
def test_a_host_is_a_name_or_an_address(tmp_path: Path, host: str) -> None:
    """A port would make it an IPv6 address in the URL."""
    with raises(SettingsError, about="host"):
        Deployment(directory=tmp_path / "d", hosts=[host])
    with raises(SettingsError, about="host"):
        renew(tmp_path / "d", [host])


@pytest.mark.parametrize("name", [NAME, "monitor", "aggregator"])
def test_only_an_operator_enrols(secured: Secured, tmp_path: Path, name: str) -> None:
    """Others have no right to; a file with a password that nobody knows would only confuse."""
    out = tmp_path / "w2.toml"
    with raises(SettingsError, about="enrolment"):
        secured.fedmoe(name, "worker", "enrol", *W2, "--out", str(out))
    assert not out.exists()


def test_renewing_enrols_nobody(secured: Secured) -> None:
    with raises(SettingsError, about="worker"):
        CliRunner().invoke(
            cli, ["init", str(secured.directory), "--renew", "--worker", "a/b"], catch_exceptions=False
        )


def test_a_worker_that_cannot_train_the_gateway_is_told(secured: Secured, tmp_path: Path) -> None:
    """On the gateway it would be named after its expert, too, and that is too long."""
    for name, is_told in (("w" * 60, True), ("w2", False)):
        out = tmp_path / f"{name[:2]}-{len(name)}.toml"
        done = secured.fedmoe("operator", "worker", "enrol", name, "--stream", EXPERT, "--out", str(out))
        assert ("cannot train the gateway" in done.output) == is_told


def test_an_enrolment_names_redis_as_its_party_reaches_it(secured: Secured, tmp_path: Path) -> None:
    """The operator's own URL is of this machine only: it is named, another is taken, and a rotation keeps it."""

    def enrol(name: str, *more: str) -> str:
        words = ("worker", "enrol", name, "--stream", EXPERT, "--out", str(tmp_path / f"{name}.toml"), *more)
        return secured.fedmoe("operator", *words).stderr

    def url(name: str) -> str:
        return Enrolment.read(tmp_path / f"{name}.toml").url

    warning = enrol("w2")
    assert warning.startswith(f"warning: rediss://localhost:{secured.port}/0")
    assert "--url" in warning
    there = f"rediss://redis.example.org:{secured.port}/0"
    assert enrol("w3", "--url", there) == ""
    assert url("w3") == there
    assert enrol("w3", "--rotate") == ""
    assert url("w3") == there
    for wrong, about in (
        ("rediss://u:p@there/0", "url"),
        ("redis://there/0", "insecure"),
        ("there", "scheme"),
    ):
        with raises(SettingsError, about=about):
            enrol("w4", "--url", wrong)
    assert not (tmp_path / "w4.toml").exists()
    assert (
        Party(role="worker", expert=EXPERT, name="w4") not in Users(secured.connection("operator")).parties()
    )
