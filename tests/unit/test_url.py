"""Redis URLs: what is read from sentinel:// and cluster://, what is refused, and that no secret is ever shown."""

import ssl

import pytest

from fedmoe.errors import RedisUnavailableError, SettingsError
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.sentinel import QUESTION_TIMEOUT_S
from fedmoe.store.url import ClusterURL, SentinelURL, check_encrypted, is_tls, shown
from tests.errors import raises

HIDDEN = "5ecret"


@pytest.mark.parametrize(
    ("url", "sentinels", "master", "server", "sentinel"),
    [
        ("sentinel://h/M", (("h", 26379),), "M", {"db": 0}, {}),
        (
            "sentinel://a:1,b.example,[::1]:3,[fe80::2]/my-master_1.x?db=4",
            (("a", 1), ("b.example", 26379), ("::1", 3), ("fe80::2", 26379)),
            "my-master_1.x",
            {"db": 4},
            {},
        ),
        (
            "sentinel://me:p%40%2F%3Fss+w%25@h/M?sentinel_username=other&sentinel_password=q+%26=",
            (("h", 26379),),
            "M",
            {"db": 0, "username": "me", "password": "p@/?ss+w%"},
            {"username": "other", "password": "q+&="},
        ),
        ("sentinel://:a:b#/c@h/M", (("h", 26379),), "M", {"db": 0, "password": "a:b#/c"}, {}),
        ("sentinel://h/M?ssl=true", (("h", 26379),), "M", {"db": 0, "ssl": True}, {"ssl": True}),
        (
            "sentinel://h/M?ssl_ca_certs=/a/b.pem&ssl_check_hostname=false",
            (("h", 26379),),
            "M",
            {"db": 0, "ssl": True, "ssl_ca_certs": "/a/b.pem", "ssl_check_hostname": False},
            {"ssl": True, "ssl_ca_certs": "/a/b.pem", "ssl_check_hostname": False},
        ),
    ],
)
def test_sentinel_url_is_read(
    url: str, sentinels: object, master: str, server: object, sentinel: object
) -> None:
    """Hosts with and without port, IPv6, logins, database, TLS; sentinels never get the server's login."""
    read = SentinelURL.parse(url)
    assert (read.sentinels, read.master, read.server, read.sentinel) == (sentinels, master, server, sentinel)


@pytest.mark.parametrize(
    ("url", "nodes", "server"),
    [
        ("cluster://h", (("h", 6379),), {}),
        ("cluster://a:1,b.example,[::1]:3/0", (("a", 1), ("b.example", 6379), ("::1", 3)), {}),
        ("cluster://me:p%40%2Fw@h/", (("h", 6379),), {"username": "me", "password": "p@/w"}),
        ("cluster://h?ssl_ca_certs=/a/b.pem", (("h", 6379),), {"ssl": True, "ssl_ca_certs": "/a/b.pem"}),
    ],
)
def test_cluster_url_is_read(url: str, nodes: object, server: dict[str, object]) -> None:
    """Hosts with and without port, IPv6, login and TLS; there is one database."""
    read = ClusterURL.parse(url)
    assert (read.nodes, read.server) == (nodes, server)
    assert is_tls(url) is ("ssl" in server)
    assert shown(url).startswith("cluster://")


def test_every_node_of_a_cluster_must_be_encrypted() -> None:
    """One of them on another machine is enough."""
    check_encrypted("cluster://127.0.0.1:1,[::1]:2")
    check_encrypted("cluster://127.0.0.1,elsewhere?ssl=true")
    with raises(SettingsError, about="insecure"):
        check_encrypted("cluster://127.0.0.1,elsewhere")


@pytest.mark.parametrize(
    ("url", "about"),
    [
        ("sentinel://h", "master"),
        ("sentinel://h/", "master"),
        ("sentinel://", "sentinel"),
        ("sentinel:///M", "sentinel"),
        ("sentinel://a,,b/M", "sentinel"),
        ("sentinel://a,/M", "sentinel"),
        ("sentinel://:26379/M", "sentinel"),
        ("sentinel://h:/M", "port"),
        ("sentinel://h:0/M", "port"),
        ("sentinel://h:65536/M", "port"),
        ("sentinel://h:٣/M", "port"),
        ("sentinel://h:x/M", "port"),
        ("sentinel://::1/M", "host"),
        ("sentinel://[::1/M", "host"),
        ("sentinel://[h]/M", "IPv6"),
        ("sentinel://a b/M", "host"),
        ("sentinel://h/M/0", "master"),
        ("sentinel://h/M#x", "master"),
        ("sentinel://h/M?db=-1", "db"),
        ("sentinel://h/M?db", "db"),
        ("sentinel://h/M?db=1&db=2", "db"),
        ("sentinel://h/M?timeout=3", "option"),
        ("sentinel://h/M?ssl=yes", "ssl"),
        ("sentinel://h/M?ssl_cert_reqs=maybe", "ssl_cert_reqs"),
        ("sentinel://h/M?ssl_min_version=new", "ssl_min_version"),
        ("sentinel://h/M?sentinel_password=", "sentinel_password"),
        ("redis://h?ssl_ca_certs=x", "option"),
        ("unix:///x?ssl_ca_certs=x", "option"),
        ("rediss://h?ssl_oops=x", "option"),
        ("redis://h?ssl=true", "option"),
        ("redis://h/one", "db"),
        ("cluster://", "node"),
        ("cluster://a,,b", "node"),
        ("cluster://h:0", "port"),
        ("cluster://::1", "host"),
        ("cluster://[h]", "IPv6"),
        ("cluster://h/1", "db"),
        ("cluster://h?db=0", "option"),
        ("cluster://h?ssl=yes", "ssl"),
        ("cluster://h", "insecure"),
        ("redis+cluster://h", "scheme"),
        ("h:6379", "scheme"),
        ("", "scheme"),
    ],
)
def test_url_that_cannot_work_is_one_sentence(url: str, about: str) -> None:
    """Before anything is connected."""
    with raises(SettingsError, about=about) as error:
        RedisSettings(url=url)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "remedy"),
    [
        ("sentinel://h", "names no master: write sentinel://HOST"),
        ("sentinel://h/M/0", "a database is given as ?db=0"),
        ("sentinel://::1/M", "write an IPv6 address in brackets"),
        ("sentinel://h/M?timeout=3", "has the option 'timeout'; only db, sentinel_username"),
        ("redis://h/one", "write / # ? @ in a password as %2F %23 %3F %40"),
        ("h:6379", "must begin with redis://"),
    ],
)
def test_url_that_cannot_work_says_how_to_write_it(url: str, remedy: str) -> None:
    """Also where two mistakes are about the same part."""
    with pytest.raises(SettingsError) as error:
        RedisSettings(url=url)
    assert remedy in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "unix", "sentinel", "cluster", "http"])
@pytest.mark.parametrize(
    "rest",
    [
        f"u:{HIDDEN}@127.0.0.1:1/M",
        f"u:{HIDDEN}/x@127.0.0.1:1/M",
        f"u:x?{HIDDEN}@127.0.0.1:1/M",
        f"u:x?{HIDDEN}=1@127.0.0.1:1/M",
        f"u:{HIDDEN}?x@127.0.0.1:1/M",
        f"u:{HIDDEN}?x",
        f"u:{HIDDEN}#x@127.0.0.1:1/M",
        f"u:x@{HIDDEN}@127.0.0.1:1/M",
        f"u:[{HIDDEN}]@127.0.0.1:1/M",
        f"u:{HIDDEN}\u2100@127.0.0.1:1/M",
        f":{HIDDEN}",
        f"u:{HIDDEN}",
        f"u:{HIDDEN}/x",
        f"127.0.0.1:1/M?sentinel_password={HIDDEN}",
        f"127.0.0.1:1/M?sentinel_password=x@{HIDDEN}",
        f"127.0.0.1:1/M?sentinel_password=x&{HIDDEN}=y",
        f"127.0.0.1:1/M?sentinel_password=x/{HIDDEN}&oops=1",
        f"127.0.0.1:1/M?ssl_password=x@{HIDDEN}&oops=1",
        f"127.0.0.1:x/M?sentinel_password={HIDDEN}",
        f"u:{HIDDEN}@/",
        f"u:{HIDDEN}@127.0.0.1:x/M",
        f"u:{HIDDEN}@127.0.0.1:1/M?db=x",
    ],
)
def test_no_secret_is_ever_shown(scheme: str, rest: str) -> None:
    """Neither when the URL is refused nor when nobody answers; not in what the settings show, nor in their repr."""
    url = f"{scheme}://{rest}"
    told = [shown(url)]
    try:
        connection = Connection(RedisSettings(url=url, timeout_s=2.0))
        told.append(repr(connection.client))
        connection.ping()
    except (SettingsError, RedisUnavailableError) as error:
        told += [str(error), repr(error.__cause__)]
    assert HIDDEN not in " ".join(told)


@pytest.mark.parametrize("url", [f"u:{HIDDEN}@h", f"redis:/u:{HIDDEN}@h", f"{HIDDEN}@h://"])
def test_no_secret_is_shown_of_what_is_no_url(url: str) -> None:
    """A password before the scheme, or no scheme at all."""
    with pytest.raises(SettingsError) as error:
        RedisSettings(url=url)
    assert HIDDEN not in str(error.value)


def test_read_sentinel_url_shows_no_secret() -> None:
    """Its repr may stand in a traceback or a log."""
    read = SentinelURL.parse(f"sentinel://u:{HIDDEN}@h/M?sentinel_password={HIDDEN}")
    assert HIDDEN not in repr(read)


def test_what_is_shown_is_the_place() -> None:
    """Enough to know which Redis is meant; but not where a ? may be a password's, though it looks like host:port."""
    assert shown("redis://u:123?4@h/0") == "redis://..."
    assert shown("sentinel://u:p@a:1,[::1]:2/M?ssl=true") == "sentinel://a:1,[::1]:2/M"
    assert shown("redis://u:p@h:1/0") == "redis://h:1/0"
    assert shown("unix://u:p@/run/redis.sock?db=1") == "unix:///run/redis.sock"


def test_every_connection_is_made_with_the_same_care() -> None:
    """To master and sentinels: no retries, RESP2, timeouts, TLS; and nothing but the master's counts."""
    connection = Connection(
        RedisSettings(url="sentinel://u:p@a,b/M?sentinel_password=q&ssl=true", timeout_s=7)
    )
    plain = Connection(RedisSettings(url="rediss://u:p@a", timeout_s=7))
    ours, usual = (c.client.connection_pool.connection_kwargs for c in (connection, plain))
    for name in (
        "protocol",
        "socket_timeout",
        "socket_connect_timeout",
        "socket_keepalive_options",
        "password",
    ):
        assert ours[name] == usual[name]
    made = connection.client.connection_pool.make_connection()
    assert made.retry._retries == 0
    assert made.redis_connect_func == connection._on_connect
    assert made._command_packer is ours["command_packer"]
    assert made.cert_reqs == ssl.CERT_REQUIRED
    for sentinel in connection.client.connection_pool.sentinel_manager.sentinels:
        asking = sentinel.connection_pool.make_connection()
        assert asking.retry._retries == 0
        assert asking.socket_timeout == asking.socket_connect_timeout == QUESTION_TIMEOUT_S
        assert (asking.username, asking.password) == (None, "q")
        assert asking.redis_connect_func is None
        assert asking.cert_reqs == ssl.CERT_REQUIRED
