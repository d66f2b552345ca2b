"""Two federations on one server, with users of their own: `fedmoe init --prefix P --beside FILE`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fedmoe.cli.main import cli
from fedmoe.errors import RedisUnavailableError, RedisUnfitError, SettingsError
from fedmoe.protocol.keys import Keys
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.audit import read_lines
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.permissions import party_rights
from fedmoe.store.rights import lacking
from fedmoe.store.users import Users
from tests.errors import raises
from tests.federation import make_expert, serve
from tests.integration.test_enrolment import worker_of
from tests.secured import EXPERT, NAME, W1, Secured
from tests.sentinel import Process

pytestmark = pytest.mark.one_server
ROLES = (Party(role="aggregator"), Party(role="monitor"), Party(role="operator"), W1)
FILES = ("aggregator", "monitor", "operator", NAME)


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[Secured]:
    with Secured(tmp_path / "deployment") as running:
        yield running


def share(secured: Secured, *words: str, prefix: str = "second", role: str = "operator") -> Result:
    """Make a second federation beside the first one's directory."""
    options = ["--prefix", prefix, "--beside", str(secured.file(role)), "--worker", f"{EXPERT}/{NAME}"]
    place = secured.directory.parent / prefix
    return CliRunner().invoke(cli, ["init", str(place), *options, *words], catch_exceptions=False)


def test_two_federations_share_a_server_and_nothing_else(secured: Secured) -> None:
    """Each trains an expert of the same name; no user of one may do anything on a key of the other."""
    assert "aggregator run" in share(secured).output
    place = secured.directory.parent / "second"
    second = {name: place / "enrolments" / f"{name}.toml" for name in FILES}
    assert {path.stat().st_mode & 0o077 for path in [place, *second.values()]} == {0}
    for aggregator, worker_file in (
        (secured.connection("aggregator"), secured.file(NAME)),
        (Connection(RedisSettings(enrolment=second["aggregator"])), second[NAME]),
    ):
        expert, worker = make_expert(aggregator), worker_of(worker_file)
        worker.push(0.5)
        assert serve(expert) == ["applied"]
    for party, name in zip(ROLES, FILES, strict=True):
        for file, own, other in (
            (secured.file(name), Keys(), Keys("second")), (second[name], Keys("second"), Keys()),
        ):  # fmt: skip
            user = Connection(RedisSettings(enrolment=file))
            assert lacking(user, party_rights(party, own)) == []
            foreign = [right for right in party_rights(party, other) if right.keys]
            refused = {
                (lack.right.command, key) for lack in lacking(user, foreign) for key in lack.right.keys
            }
            assert refused == {(right.command, key) for right in foreign for key in right.keys}
    operator = Connection(RedisSettings(enrolment=second["operator"]))
    assert list(Users(operator).parties()) == sorted(ROLES)
    assert [line.party for line in read_lines(operator)] == [
        f"{one}" for one in (ROLES[2], ROLES[0], ROLES[1], W1)
    ]
    assert read_lines(secured.connection("operator"))[-1].party == "operator main of the federation second"


def test_what_one_federation_does_leaves_the_other_s_users(secured: Secured) -> None:
    """A refresh, a revocation; and they are there after a restart."""
    share(secured)
    place = secured.directory.parent / "second"
    operator = place / "enrolments" / "operator.toml"
    secured.fedmoe("operator", "operator", "refresh")
    secured.fedmoe("operator", "worker", "revoke", NAME, "--stream", EXPERT)
    secured.kill()
    secured.start()
    assert list(Users(Connection(RedisSettings(enrolment=operator))).parties()) == sorted(ROLES)
    done = CliRunner().invoke(cli, ["--config", str(place / "fedmoe.toml"), "worker", "list"])
    assert f"second:worker:{EXPERT}:{NAME}" in done.output


def test_a_federation_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """The first one's prefix, one that is there, another role, options of a server, and a server that is full."""
    with Secured(tmp_path / "deployment") as secured:
        for words, prefix, role, error, about in (
            ((), "fedmoe", "operator", SettingsError, "prefix"),
            ((), "second", NAME, RedisUnfitError, "rights"),
            (("--host", "h"), "second", "operator", SettingsError, "beside"),
            (("--worker", f"docs_expert/{NAME}"), "second", "operator", SettingsError, "worker"),
        ):
            with raises(error, about=about):
                share(secured, *words, prefix=prefix, role=role)
            assert not (tmp_path / prefix).exists()
        share(secured, prefix="third")
        (tmp_path / "third").rename(tmp_path / "moved")
        with raises(SettingsError, about="prefix"):
            share(secured, prefix="third")
    with Secured(tmp_path / "full", options=["--maxmemory", "1kb"]) as secured:
        with pytest.raises(RedisUnavailableError, match="full"):
            share(secured)
        assert not (tmp_path / "second").exists()
        assert not Users(secured.connection("operator"), Keys("second")).parties()


def test_a_url_without_its_scheme_is_not_shown_with_its_password(tmp_path: Path) -> None:
    """It looks like the name of a file that is not there."""
    words = ["init", str(tmp_path / "new"), "--beside", "admin:S3CRET@node-1:6379"]
    said = str(CliRunner().invoke(cli, words).exception)
    assert "must begin with redis://" in said
    assert "S3CRET" not in said


def test_a_server_without_an_acl_file_gets_lines_to_write(server: EmbeddedRedis, tmp_path: Path) -> None:
    """From `init --beside` and from `enrol`: with them in redis.conf, the parties may log in after a restart."""
    one, place, out = Process(server.server, tmp_path / "one", []), tmp_path / "new", tmp_path / "w2.toml"
    url = f"redis://127.0.0.1:{one.port}/0"
    files = [place / "enrolments" / f"{name}.toml" for name in FILES]
    try:
        one.start()
        words = ["init", str(place), "--beside", url, "--worker", f"{EXPERT}/{NAME}"]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0
        assert f"write the lines in {place / 'users.acl'} into its redis.conf" in done.stderr
        words = ["worker", "enrol", "w2", "--stream", EXPERT, "--out", str(out), "--enrolment", str(files[2])]
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0
        assert f"write the line in {tmp_path / 'w2.acl'} into its redis.conf" in done.stderr
        done = CliRunner().invoke(cli, ["operator", "refresh", "--enrolment", str(files[2])])
        assert done.exit_code == 0
        assert (
            "warning: the server has no ACL file (aclfile), so its users last until it restarts"
            in done.stderr
        )
        one.kill()
        one.configure((place / "users.acl").read_text() + (tmp_path / "w2.acl").read_text())
        one.start()
        for file in (*files, out):
            connection = Connection(RedisSettings(enrolment=file))
            with connection.errors():
                assert connection.client.info("server")
    finally:
        one.kill()
