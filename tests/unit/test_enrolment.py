"""Enrolment files: what is wrong with one is a sentence without its secrets; a password is read again each time."""

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fedmoe.cli.main import cli
from fedmoe.enrolment import Enrolment
from fedmoe.errors import RedisUnfitError, SettingsError
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.credentials import Credentials, login_and_tls
from fedmoe.store.tls import tls_problem
from fedmoe.store.url import check_encrypted
from fedmoe.tools.deploy.files import enrolment_text, write_private
from tests.errors import raises

URL = "rediss://redis.example.org:6379/0"
WHOLE = f'url = "{URL}"\nuser = "u"\n'
ODD = 'a"b\\c'
SECRET = "s3cret"  # noqa: S105  # of nobody


def provide() -> tuple[str, str]:
    """A credential provider."""
    return "token-user", os.environ.get("TOKEN", "first")


def refuse() -> tuple[str, str]:
    """One that fails."""
    raise LookupError("no token")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "party.toml"


def write(file: Path, more: str, text: str = WHOLE) -> Path:
    write_private(file, text + more + "\n", replace=True)
    return file


@pytest.mark.parametrize(
    ("text", "about"),
    [
        (f'password = "{SECRET}', "enrolment"), ("", "password"),
        (f'password = "{SECRET}"\npassword_env = "X"', "password"),
        (f'password = "{SECRET}"\nunknown = "{SECRET}"', "unknown"), ("password = 5", "password"),
        ('password_command = "echo x"', "password_command"), ("password_command = []", "password_command"),
        ("password_command = [1]", "password_command"), (f'password = "{SECRET}"\nprefix = "a:b"', "prefix"),
        (f'password = "{SECRET}"\nrole = "king"', "role"), (f'password = "{SECRET}"\nrole = "worker"', "name"),
        (f'password = "{SECRET}"\ncertificate_file = "a"', "key_file"),
        (f'password = "{SECRET}"\nrole = "worker"\nexpert = "gateway"\nname = "a"', "expert"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(file: Path, text: str, about: str) -> None:
    """And no secret with it."""
    with raises(SettingsError, about=about) as caught:
        Enrolment.read(write(file, text))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "about"),
    [
        (f'user = "u"\npassword = "{SECRET}"', "url"), (f'url = "{URL}"\npassword = "{SECRET}"', "user"),
        (f'url = "redis://a:{SECRET}@h"\nuser = "u"\npassword = "{SECRET}"', "url"),
        (f'url = "redis://h"\nuser = "u"\npassword = "{SECRET}"', "insecure"),
    ],
)  # fmt: skip
def test_a_wrong_url_is_named(file: Path, text: str, about: str) -> None:
    with raises(SettingsError, about=about) as caught:
        RedisSettings(enrolment=write(file, text, ""))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(file: Path, mode: int) -> None:
    write(file, f'password = "{SECRET}"').chmod(mode)
    with raises(SettingsError, about="enrolment"):
        Enrolment.read(file)
    file.chmod(0o600)
    assert Enrolment.read(file).login() == ("u", SECRET)


def test_no_file_and_no_text(file: Path, tmp_path: Path) -> None:
    for path in (file, tmp_path):
        with raises(SettingsError, about="enrolment"):
            Enrolment.read(path)
    file.write_bytes(b"\xff\xfe\x00")
    file.chmod(0o600)
    with raises(SettingsError, about="enrolment"):
        Enrolment.read(file)


def test_a_new_password_is_read_at_the_next_login(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From each source; and the enrolment itself may be replaced."""
    secret = tmp_path / "password"
    write_private(secret, "one\n")
    enrolled = Enrolment.read(write(file, 'password_file = "password"'))
    assert enrolled.login() == ("u", "one")
    write_private(secret, "two\nmore\n", replace=True)
    assert enrolled.login() == ("u", "two")
    write(file, f'password_command = ["{sys.executable}", "-c", "print(3)"]')
    assert enrolled.login() == ("u", "3")
    write(file, 'password_env = "FEDMOE_TEST_SECRET"')
    monkeypatch.setenv("FEDMOE_TEST_SECRET", "four")
    assert enrolled.login() == ("u", "four")
    write(file, f'credential_provider = "{__name__}:provide"')
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    monkeypatch.setenv("TOKEN", "five")
    assert enrolled.login() == ("token-user", "five")


@pytest.mark.parametrize(
    ("text", "about"),
    [
        ('password_file = "nowhere"', "enrolment"), ('password_env = "FEDMOE_NOT_SET"', "password_env"),
        ('password_command = ["false"]', "password_command"), ('password_command = ["true"]', "password_command"),
        ('password_command = ["/no/such/program"]', "password_command"),
        ('credential_provider = "no_such_module:x"', "credential_provider"),
        ('credential_provider = "os:getcwd"', "credential_provider"),
        (f'credential_provider = "{__name__}:refuse"', "credential_provider"),
    ],
)  # fmt: skip
def test_a_secret_that_is_not_there_may_come(file: Path, text: str, about: str) -> None:
    """A process that runs reports it and tries again, as if Redis had refused the login."""
    enrolled = Enrolment.read(write(file, text))
    with raises(RedisUnfitError, about=about):
        Credentials(enrolled.login).get_credentials()


def test_a_provider_of_the_caller_is_asked_each_time() -> None:
    found = iter([("a", "1"), ("a", "2")])
    settings = RedisSettings(credential_provider=lambda: next(found))
    provider = login_and_tls(settings)["credential_provider"]
    assert [provider.get_credentials() for _ in range(2)] == [("a", "1"), ("a", "2")]
    with raises(RedisUnfitError, about="credential_provider"):
        provider.get_credentials()


def test_url_and_enrolment_exclude_each_other(file: Path) -> None:
    write(file, f'password = "{SECRET}"\nprefix = "team"')
    settings = RedisSettings(enrolment=file)
    assert (settings.url, settings.prefix) == (URL, "team")
    assert SECRET not in repr(settings)
    for wrong, about in (({"url": "redis://localhost"}, "enrolment"), ({"prefix": "other"}, "prefix")):
        with raises(SettingsError, about=about):
            RedisSettings(enrolment=file, **wrong)


def test_a_ca_needs_tls(file: Path) -> None:
    text = f'url = "redis://localhost"\nuser = "u"\npassword = "{SECRET}"\nca = "x"'
    with raises(SettingsError, about="url"):
        login_and_tls(RedisSettings(enrolment=write(file, text, "")))


def test_what_is_written_is_read(file: Path) -> None:
    party = Party(role="worker", expert="sql_expert", name="w1")
    enrolled = Enrolment(
        url=URL, user=party.user("fedmoe"), role="worker", expert="sql_expert", name="w1",
        password=ODD, ca="-----BEGIN\nabc\n-----END",
    )  # fmt: skip
    write_private(file, enrolment_text(enrolled, party))
    found = Enrolment.read(file)
    assert (found.password, found.user, found.expert) == (ODD, enrolled.user, "sql_expert")
    assert found.ca.strip() == enrolled.ca
    with raises(SettingsError, about="out"):
        write_private(file, "")


def test_users_name_parties() -> None:
    parties = [
        Party(role="worker", expert="a.b", name="c-d"),
        *(Party(role=r) for r in ("monitor", "operator")),
    ]
    for party in parties:
        assert Party.of_user(party.user("team"), "team") == party
        assert Party.of_user(party.user("team"), "other") is None
    for user in (
        "default",
        "team",
        "team:king:main",
        "team:worker:main",
        "team:monitor:a:b",
        "team:worker:gateway:x",
    ):
        assert Party.of_user(user, "team") is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost", "redis://127.0.0.1:6379/0", "redis://me:pw@127.1.2.3:1", "redis://[::1]:6379", "redis:///0",
        "unix:///tmp/x.sock", "rediss://redis.example.org", "rediss://127.0.0.1?ssl_cert_reqs=none",
        "sentinel://127.0.0.1,[::1]:1/m", "sentinel://a,b/m?ssl=true", "sentinel://a/m?ssl_ca_certs=x",
    ],
)  # fmt: skip
def test_these_urls_keep_secrets(url: str) -> None:
    check_encrypted(url)


@pytest.mark.parametrize(
    ("url", "about"),
    [
        ("redis://redis.example.org", "insecure"), ("redis://me:pw@10.0.0.5:6379/0", "insecure"),
        ("redis://localhost@10.0.0.5", "insecure"), ("redis://[2001:db8::1]:6379", "insecure"),
        ("sentinel://127.0.0.1,10.0.0.5/m", "insecure"), ("rediss://h?ssl_cert_reqs=none", "ssl_cert_reqs"),
        ("redis://localhost.example.org", "insecure"),
    ],
)  # fmt: skip
def test_these_urls_need_insecure(url: str, about: str) -> None:
    with raises(SettingsError, about=about) as caught:
        RedisSettings(url=url)
    assert "pw" not in str(caught.value)
    assert RedisSettings(url=url, insecure=True).url == url


def test_insecure_is_a_variable_too() -> None:
    """For containers whose network is encrypted itself."""
    words = ["doctor", "--acl", "monitor", "--redis", "redis://10.0.0.5"]
    with raises(SettingsError, about="insecure"):
        CliRunner().invoke(cli, words, catch_exceptions=False)
    assert CliRunner(env={"FEDMOE_INSECURE": "1"}).invoke(cli, words).exit_code == 0
    assert CliRunner().invoke(cli, [*words, "--insecure"]).exit_code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired",
            "2026-01-02T00:00:00Z",
        ),
        ("certificate verify failed: certificate is not yet valid", "not valid yet"),
        ("verify failed: Hostname mismatch, certificate is not valid for 'h'", "--host h"),
        ("IP address mismatch, certificate is not valid for '10.0.0.1'", "--host 10.0.0.1"),
        ("certificate verify failed: unable to get local issuer certificate", "did not sign"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "does not speak TLS"),
        ("tlsv13 alert certificate required", "asks for a client certificate"),
        ("[SSL: TLSV1_ALERT_UNKNOWN_CA] tlsv1 alert unknown ca", "refuses the client certificate"),
    ],
)
def test_errors_of_tls_are_sentences(text: str, says: str) -> None:
    found = tls_problem(text, "rediss://h", now=1767312000.0)
    assert found is not None
    assert found[0] == "certificate"
    assert says in found[1]
    assert tls_problem("Connection refused", "rediss://h") is None
