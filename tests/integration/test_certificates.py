"""What a party is told if a certificate, a login or a file is wrong: one sentence, with what to do."""

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedmoe.errors import RedisUnavailableError, RedisUnfitError, SettingsError
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.tools.deploy.certificates import Pair, make_authority, make_server
from fedmoe.tools.deploy.deployment import read_authority
from fedmoe.tools.deploy.files import write_private
from tests.errors import raises
from tests.secured import NAME, Secured, tls_server
from tests.sentinel import MASTER, Replicated

pytestmark = pytest.mark.one_server
NOW = datetime.datetime.now(datetime.UTC)
YEAR = datetime.timedelta(days=365)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    with Secured(tmp_path_factory.mktemp("certificates") / "deployment") as running:
        yield running


def with_certificate(secured: Secured, make: Callable[[Pair], Pair]) -> None:
    """The running server gets another certificate, made with its CA."""
    pair = make(read_authority(secured.directory))
    place = secured.directory / "tls"
    write_private(place / "redis.key", pair.key, replace=True)
    write_private(place / "redis.crt", pair.certificate, replace=True)
    secured.kill()
    secured.start_anyhow()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda ca: make_server(ca, ["localhost"], days=30, now=NOW - YEAR), "has expired"),
        (lambda ca: make_server(ca, ["localhost"], now=NOW + YEAR), "not valid yet"),
        (lambda _: make_server(make_authority("FedMoE fedmoe"), ["localhost"]), "did not sign"),
        (
            lambda ca: make_server(ca, ["redis.example.org", "127.0.0.1"]),
            "for other hosts, not for localhost",
        ),
    ],
    ids=["expired", "not-yet", "other-ca", "other-host"],
)
def test_a_wrong_certificate_is_named(secured: Secured, make: Callable[[Pair], Pair], says: str) -> None:
    """A worker ends at its start, and says who has to do what."""
    with_certificate(secured, make)
    with raises(RedisUnfitError, about="certificate") as caught:
        secured.connection(NAME).ping()
    assert says in str(caught.value)
    assert str(caught.value).count("certificate") >= 1
    with raises(RedisUnfitError, about="certificate"):
        secured.fedmoe("monitor", "status")
    with_certificate(secured, lambda ca: make_server(ca, ["localhost"]))
    secured.fedmoe("monitor", "status")


def test_a_url_without_tls_says_what_may_be_wrong(secured: Secured) -> None:
    """The server drops the connection without a word."""
    url = f"redis://localhost:{secured.port}"
    with pytest.raises(RedisUnavailableError, match="begins with rediss://"):
        Connection(RedisSettings(url=url)).ping()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('password = "', 'password = "x'),  # wrong
        (f':{NAME}"', ':nobody"'),  # unknown
    ],
    ids=["wrong-password", "unknown-worker"],
)
def test_a_wrong_login_is_named(secured: Secured, tmp_path: Path, old: str, new: str) -> None:
    """The server does not say which of both is wrong, and so the sentence names both."""
    text = secured.file(NAME).read_text()
    assert old in text
    file = tmp_path / "wrong.toml"
    write_private(file, text.replace(old, new, 1))
    with raises(RedisUnfitError, about="login") as caught:
        Connection(RedisSettings(enrolment=file)).ping()
    assert "revoked or never enrolled" in str(caught.value)


def test_no_tls_where_tls_is_wanted(secured: Secured, redis_url: str) -> None:
    """Plain text to a TLS port; a client that trusts the system's CAs only."""
    with pytest.raises(RedisUnavailableError):
        Connection(RedisSettings(url=f"redis://127.0.0.1:{secured.port}")).ping()
    with raises(RedisUnfitError, about="certificate"):
        Connection(RedisSettings(url=f"rediss://localhost:{secured.port}")).ping()


def test_behind_sentinel_the_announced_address_must_be_in_the_certificate(tmp_path: Path) -> None:
    """Sentinel announces 127.0.0.1, and the certificate is for a name."""
    ca = make_authority("test")
    for name, hosts in (("right", ["localhost", "127.0.0.1"]), ("wrong", ["localhost"])):
        pair = make_server(ca, hosts)
        both = tmp_path / f"{name}.pem"
        both.write_text(pair.key + pair.certificate + ca.certificate)
        with Replicated(tls_server(), tmp_path / name, certificate=both, checks_host=False) as running:
            hosts_by_name = running.hosts.replace("127.0.0.1", "localhost")
            file = tmp_path / f"{name}.toml"
            write_private(
                file, f"url = 'sentinel://{hosts_by_name}/{MASTER}?ssl=true'\nuser = 'default'\npassword = 'any'\n"
                f"ca = '''\n{ca.certificate}'''\n",
            )  # fmt: skip
            connection = Connection(RedisSettings(enrolment=file))
            if name == "right":
                connection.ping()
            else:
                with raises(RedisUnfitError, about="certificate") as caught:
                    connection.ping()
                assert "not for 127.0.0.1" in str(caught.value)
                assert "Sentinel" in str(caught.value)


def test_a_readable_file_is_refused(secured: Secured) -> None:
    """Before it is used."""
    file = secured.file(NAME)
    file.chmod(0o640)
    try:
        with raises(SettingsError, about="enrolment"):
            secured.settings(NAME)
    finally:
        file.chmod(0o600)
    assert secured.settings(NAME).enrolled is not None
    assert Party.of_user(secured.settings(NAME).enrolled.user, "fedmoe") is not None
