"""Each role over TLS with nothing but its enrolment file; enrolment and revocation while all runs."""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from consumers.expert import Expert
from fedmoe.cli.main import cli
from fedmoe.errors import (
    FedMoEError,
    RedisUnavailableError,
    RedisUnfitError,
    SettingsError,
    UnknownExpertError,
)
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.settings import WorkerSettings
from fedmoe.store.audit import read_lines
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.permissions import DEFAULT_USER, party_rules
from fedmoe.store.users import Users
from fedmoe.tools.deploy.deployment import Deployment
from fedmoe.tools.deploy.enrol import certificate_for
from fedmoe.util.stopping import Stop
from producers.worker import Worker
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serve, serving, small_spec
from tests.processes import eventually
from tests.secured import EXPERT, NAME, W1, Secured, tls_server

pytestmark = pytest.mark.one_server


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    with Secured(tmp_path / "deployment") as running:
        yield running


def enrol(secured: Secured, out: Path, *more: str, name: str = "w2") -> Path:
    """Enrol a second worker; its enrolment file."""
    secured.fedmoe("operator", "worker", "enrol", name, "--stream", EXPERT, "--out", str(out), *more)
    return out


def worker_login(file: Path) -> bool:
    """True if this enrolment lets a worker in; an error if not."""
    connection = Connection(RedisSettings(enrolment=file))
    with connection.errors():
        return connection.client.hmget(connection.keys.expert(EXPERT).meta, "version") is not None


def worker_of(file: Path) -> ScriptedWorker:
    """A scripted worker with nothing but its enrolment file."""
    settings = RedisSettings(enrolment=file, timeout_s=5.0)
    assert settings.enrolled is not None
    return ScriptedWorker(Connection(settings), small_spec(), settings.enrolled.name)


def test_each_role_works_with_its_enrolment_alone(secured: Secured) -> None:
    """Over TLS: the aggregator creates and decides, a worker trains, a monitor looks, an operator changes a rule."""
    expert = make_expert(secured.connection("aggregator"))
    worker = worker_of(secured.file(NAME))
    worker.push(0.5)
    assert serve(expert) == ["applied"]
    assert worker.pull().correction is not None
    assert EXPERT in secured.fedmoe("monitor", "status").output
    secured.fedmoe("operator", "expert", "set", EXPERT, "--lr", "0.5")
    assert GatewayStore(secured.connection("monitor")).meta(EXPERT).rules.aggregation.lr == 0.5
    assert "certificate" in secured.fedmoe("operator", "doctor").output


def test_a_revoked_worker_is_cut_off_and_what_it_published_is_decided(
    secured: Secured, tmp_path: Path
) -> None:
    """In mid-update: one entry waits when the operator revokes its worker."""
    expert = make_expert(secured.connection("aggregator"))
    worker = worker_of(enrol(secured, tmp_path / "w2.toml"))
    worker.push(0.5)
    assert "revoked" in secured.fedmoe("operator", "worker", "revoke", "w2", "--stream", EXPERT).output
    with pytest.raises(RedisUnavailableError):
        worker.store.meta()  # on the connection that stood
    with raises(RedisUnfitError, about="login"):
        worker.store.meta()
    assert serve(expert) == ["applied"]
    assert "w2" not in secured.fedmoe("operator", "worker", "list").output
    with raises(SettingsError, about="name"):
        secured.fedmoe("operator", "worker", "revoke", "w2", "--stream", EXPERT)
    said = [(line.what, line.party, line.by) for line in read_lines(secured.connection("operator"))]
    party = f"worker w2 of {EXPERT}"
    assert said[4:] == [
        ("enrolled", party, "fedmoe:operator:main"),
        ("revoked", party, "fedmoe:operator:main"),
    ]
    assert party in secured.fedmoe("operator", "operator", "audit").output


def test_the_audit_log_begins_with_who_was_enrolled_by_init(secured: Secured, tmp_path: Path) -> None:
    """Before Redis ran; once, for every operator, and also if Redis was emptied. Who has no line is named."""
    first = ["aggregator main", "monitor main", "operator main", str(W1)]
    secured.fedmoe("operator", "operator", "enrol", "second", "--out", str(tmp_path / "second.toml"))
    for _ in range(2):
        lines = read_lines(Connection(RedisSettings(enrolment=tmp_path / "second.toml")))
        assert [line.party for line in lines] == [*first, "operator second"]
        assert {(line.what, line.by, line.at) for line in lines[:4]} == {
            ("enrolled", "fedmoe init", "1970-01-01T00:00:00Z")
        }
        assert "warning" not in secured.fedmoe("operator", "operator", "audit").stderr
    admin, odd = secured.connection("operator"), Party(role="monitor", name="odd")
    admin.client.execute_command("ACL SETUSER", odd.user("fedmoe"), "on", "nopass", "+ping")
    warning = secured.fedmoe("operator", "operator", "audit").stderr
    assert "no line says who enrolled monitor odd:" in warning


def test_a_new_password_needs_no_restart(secured: Secured, tmp_path: Path) -> None:
    """The worker that runs reads its file again when it connects again; the old password is refused."""
    make_expert(secured.connection("aggregator"))
    worker = worker_of(file := enrol(secured, tmp_path / "w2.toml"))
    old = tmp_path / "old.toml"
    old.write_text(file.read_text())
    old.chmod(0o600)
    with raises(SettingsError, about="out"):
        enrol(secured, file)
    with raises(SettingsError, about="name"):
        enrol(secured, tmp_path / "other.toml")
    enrol(secured, file, "--rotate")
    assert file.read_text() != old.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    worker.store.connection.close()
    assert worker.store.meta().version == 0
    with raises(RedisUnfitError, about="login"):
        Connection(RedisSettings(enrolment=old)).ping()


def test_users_and_rights_survive_a_restart(secured: Secured, tmp_path: Path) -> None:
    """ACL SAVE wrote the ACL file, and the append-only file is read with its transactions."""
    make_expert(secured.connection("aggregator"))
    worker_of(secured.file(NAME)).push(0.5)
    file = enrol(secured, tmp_path / "w2.toml")
    before = Users(secured.connection("operator")).parties()
    secured.kill()
    secured.start()
    assert worker_login(file)
    assert Users(secured.connection("operator")).parties() == before
    expert = Expert(ExpertStore(secured.connection("aggregator"), EXPERT), small_spec(), aggregator="test")
    expert.load()
    assert serve(expert) == ["applied"]
    ca = secured.directory / "tls" / "ca.crt"
    for login in ("", "default:any@"):  # nobody is the default user
        url = f"rediss://{login}localhost:{secured.port}?ssl_ca_certs={ca}"
        with pytest.raises(RedisUnavailableError):
            Connection(RedisSettings(url=url)).ping()


def test_doctor_tells_of_a_default_user_without_rights(secured: Secured) -> None:
    """With it, a restart would lose every expert."""
    assert secured.fedmoe("operator", "doctor", "--role", "operator").exit_code == 0
    secured.connection("operator").client.execute_command(
        "ACL SETUSER", "default", "off", "resetkeys", "-@all"
    )
    done = secured.fedmoe("operator", "doctor", "--role", "operator")
    assert done.exit_code == 1
    assert DEFAULT_USER in done.output


def test_doctor_tells_of_an_acl_file_that_others_can_read(secured: Secured) -> None:
    """Redis writes it for everybody to read; that does no harm while the directory is closed."""
    users = secured.directory / "users.acl"
    users.chmod(0o644)  # as ACL SAVE leaves it
    assert "others on this machine" not in secured.fedmoe("operator", "doctor").output
    secured.directory.chmod(0o755)
    assert f"can read {users}" in secured.fedmoe("operator", "doctor").output
    users.chmod(0o600)
    assert "others on this machine" not in secured.fedmoe("operator", "doctor").output


def test_a_refresh_gives_the_rights_of_this_release(secured: Secured) -> None:
    """And keeps the passwords."""
    users, monitor = Users(secured.connection("operator")), Party(role="monitor")
    whole = users.parties()[monitor]
    assert users.outdated() == ("", "")

    def change(party: Party, *rules: str) -> None:
        secured.connection("operator").client.execute_command("ACL SETUSER", party.user("fedmoe"), *rules)

    change(monitor, "-info", "clearselectors")
    change(W1, "+xdel", "~fedmoe:{sql_expert}:meta")
    assert users.parties()[monitor] != whole
    doctor = secured.fedmoe("operator", "doctor", "--role", "operator")
    assert doctor.exit_code == 1
    lacking, surplus = [line for line in doctor.output.splitlines() if "operator refresh" in line]
    assert "(monitor main: %R~fedmoe:{*}:lease %R~fedmoe:{merged}:lease +get, +info)" in lacking
    assert f"(worker {NAME} of {EXPERT}: %W~fedmoe:{{sql_expert}}:meta, +xdel)" in surplus
    change(monitor, *party_rules(monitor, Keys()))
    assert [bool(text) for text in users.outdated()] == [False, True]
    assert secured.fedmoe("operator", "doctor", "--role", "operator").exit_code == 0  # more rights: a warning
    assert "4 users" in secured.fedmoe("operator", "operator", "refresh").output
    assert users.parties()[monitor] == whole
    assert users.outdated() == ("", "")


def test_a_party_without_the_right_cannot_enrol(secured: Secured, tmp_path: Path) -> None:
    """On a managed server: it writes a line for the server's administrator, who may; a revocation is refused."""
    out = tmp_path / "w2.toml"
    user = Party(role="operator").user("fedmoe")
    secured.connection("operator").client.execute_command("ACL SETUSER", user, "-acl|setuser", "-acl|deluser")
    said = secured.fedmoe("operator", "worker", "enrol", "w2", "--stream", EXPERT, "--out", str(out)).output
    assert "ACL LOAD" in said
    line = out.with_suffix(".acl").read_text()
    assert tomllib.loads(out.read_text())["password"] not in line
    audit = read_lines(secured.connection("operator"))
    assert [(one.what, one.party) for one in audit][4:] == [("prepared", f"worker w2 of {EXPERT}")]
    with raises(RedisUnfitError, about="login"):
        Connection(RedisSettings(enrolment=out)).ping()
    with raises(RedisUnfitError, about="rights"):
        secured.fedmoe("operator", "worker", "revoke", NAME, "--stream", EXPERT)
    with (secured.directory / "users.acl").open("a") as users:
        users.write(line)
    secured.kill()
    secured.start()
    assert worker_login(out)


def test_a_server_without_an_acl_file_says_so(connection: Connection, tmp_path: Path) -> None:
    """The user is there until the server restarts: a warning for who enrols it, and an error for who revokes it."""
    out, url = tmp_path / "w1.toml", ("--redis", connection.settings.url)
    who = (NAME, "--stream", EXPERT, *url)
    try:
        done = CliRunner().invoke(cli, ["worker", "enrol", *who, "--out", str(out)])
        assert done.exit_code == 0
        assert (
            f"worker {NAME} of {EXPERT} is gone when it restarts: write the line in {tmp_path}" in done.stderr
        )
        assert W1 in Users(connection).parties()
        assert out.with_suffix(".acl").read_text().startswith(f"user {W1.user('fedmoe')} ")
    finally:
        gone = CliRunner().invoke(cli, ["worker", "revoke", *who])
    assert isinstance(gone.exception, RedisUnavailableError)
    assert "out of its redis.conf" in str(gone.exception)
    assert W1 not in Users(connection).parties()


def test_keys_of_a_site_stay_there(secured: Secured, tmp_path: Path) -> None:
    """A certificate request goes in, a certificate comes out, and a server that insists takes it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl, with which a site makes its request")
    key, csr = tmp_path / "w2.key", tmp_path / "w2.csr"
    subprocess.run(
        ["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
         "-keyout", key, "-out", csr], check=True, capture_output=True,
    )  # fmt: skip
    file = enrol(secured, tmp_path / "w2.toml", "--csr", str(csr), "--deployment", str(secured.directory))
    enrol(secured, file, "--rotate")  # with the same certificate
    secured.kill()
    insisting = Secured(
        secured.directory, options=["--tls-auth-clients", "yes"], port=secured.port, answers=file
    )
    with insisting:
        with pytest.raises(
            RedisUnavailableError, match="client certificate"
        ):  # at once, or as the alert comes
            worker_login(secured.file(NAME))
        csr.write_text("nothing")
        with raises(SettingsError, about="csr"):
            certificate_for(W1, "fedmoe", csr, secured.directory)


def test_init_says_what_to_do_and_keeps_secrets(tmp_path: Path) -> None:
    """All files are their owner's; a second init into the directory is refused; a renewal keeps the hosts."""
    from click.testing import CliRunner

    tls_server()
    place = tmp_path / "deployment"

    def init(*words: str) -> str:
        done = CliRunner().invoke(cli, ["init", str(place), *words], catch_exceptions=False)
        return done.output

    said = init("--host", "redis.example.org", "--worker", f"{EXPERT}/sql-1")
    files = [Path(root) / name for root, _, names in os.walk(place) for name in names]
    assert {path.stat().st_mode & 0o077 for path in [*files, place]} == {0}
    enrolled = tomllib.loads((place / "enrolments" / "sql-1.toml").read_text())
    assert enrolled["url"] == "rediss://redis.example.org:6379/0"
    secrets = [
        line.split('"')[1]
        for path in files
        for line in path.read_text().splitlines()
        if line.startswith("password")
    ]
    assert len(set(secrets)) == 4
    elsewhere = [path for path in files if path.parent.name != "enrolments"]
    assert not any(secret in path.read_text() for secret in secrets for path in elsewhere)
    assert not any(secret in said for secret in secrets)
    with raises(SettingsError, about="directory"):
        init("--host", "redis.example.org")
    assert "10.0.0.7, redis.example.org" in init("--renew", "--host", "10.0.0.7")
    for words, about in (
        (["--host", "a b"], "host"), (["--host", "h", "--worker", "w1"], "worker"),
        (["--host", "h", "--worker", "gateway/w1"], "expert"), ([], "host"),
        (["--host", "h", "--worker", "a/w", "--worker", "b/w"], "worker"),
        (["--host", "h", "--worker", "a/operator"], "worker"),
    ):  # fmt: skip
        with raises(SettingsError, about=about):
            CliRunner().invoke(cli, ["init", str(tmp_path / "new"), *words], catch_exceptions=False)
        assert not (tmp_path / "new").exists()


def test_worker_run_takes_expert_and_name_from_its_enrolment(secured: Secured, tmp_path: Path) -> None:
    """Others than the enrolment's are refused before anything is asked."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    for option, value in (("--stream", "docs_expert"), ("--name", "other")):
        with raises(SettingsError, about=option.removeprefix("--")):
            secured.fedmoe(NAME, "worker", "run", "--data", str(rows), option, value)
    with raises(SettingsError, about="rights"):
        secured.fedmoe("monitor", "worker", "run", "--data", str(rows), "--stream", EXPERT)
    with raises(UnknownExpertError, about=EXPERT):
        secured.fedmoe(NAME, "worker", "run", "--data", str(rows), "--no-wait")


def test_the_aggregator_serves_with_its_enrolment(secured: Secured) -> None:
    """Its whole loop: lease, reads, scripts."""
    make_expert(secured.connection("aggregator"))
    worker = worker_of(secured.file(NAME))
    with serving(secured.connection("aggregator")):
        worker.push(0.5)
        eventually("the update", lambda: worker.store.meta().version == 1)


def test_redis_finds_its_files_where_they_will_be(tmp_path: Path) -> None:
    """It enters `dir` while it reads its configuration, and ends if that is not there."""
    Deployment(directory=tmp_path / "d", hosts=["h"], redis_dir=Path("/srv/redis")).write(now=0.0)
    assert "\ndir /srv/redis\n" in (tmp_path / "d" / "redis.conf").read_text()
    with raises(SettingsError, about="redis_dir"):
        Deployment(directory=tmp_path / "e", hosts=["h"], redis_dir=Path("srv"))


def test_deployment_fits_replicas(tmp_path: Path) -> None:
    """The password of the link is in redis.conf and its hash in users.acl."""
    import hashlib

    Deployment(directory=tmp_path / "d", hosts=["h"], workers=()).write(now=0.0)
    conf = (tmp_path / "d" / "redis.conf").read_text()
    secret = conf.partition("masterauth ")[2].split()[0]
    assert hashlib.sha256(secret.encode()).hexdigest() in (tmp_path / "d" / "users.acl").read_text()


def test_the_scripts_name_a_worker_by_its_enrolment(tmp_path: Path) -> None:
    """So two workers can be started and stopped on one machine."""
    Deployment(directory=tmp_path / "d", hosts=["h"], workers=[W1]).write(now=0.0)
    file = tmp_path / "d" / "enrolments" / f"{NAME}.toml"
    lib = Path(__file__).parents[2] / "ops" / "lib.sh"
    for options in (f"--enrolment {file}", f"--enrolment={file}"):
        typed = ["bash", "-c", f"source {lib}; worker_name {options} --data x"]
        said = subprocess.run(typed, capture_output=True, text=True, check=True).stdout
        assert said == f"worker-{EXPERT}-{NAME}\n"


def test_a_worker_says_where_its_name_comes_from(secured: Secured, tmp_path: Path) -> None:
    """From the enrolment, not from an option that nobody gave."""
    rows = tmp_path / "rows.jsonl"
    said: list[str] = []
    settings = WorkerSettings(stream=EXPERT, name=NAME, data=rows)
    with pytest.raises(FedMoEError):  # there are no rows
        Worker(secured.settings(NAME), settings, stop=Stop(), report=said.append).run()
    assert said[0].endswith("(name from its enrolment)")
