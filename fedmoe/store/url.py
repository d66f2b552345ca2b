"""Redis URLs: strict checks, and a form for messages without anything that may be secret.

    redis://[user:password@]host[:port][/db]        rediss:// the same over TLS
    unix://[user:password@]/path[?db=0]
    sentinel://[user:password@]host[:port][,host[:port]...]/MASTER[?db=0&sentinel_password=...&ssl=true]
    cluster://[user:password@]host[:port][,host[:port]...][?ssl=true]

redis-py parses the first three; this module parses sentinel:// and cluster://.
"""

import inspect
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.connection import URL_QUERY_ARGUMENT_PARSERS, SSLConnection

from fedmoe.errors import SettingsError
from fedmoe.redis_settings import DEFAULT_URL

SENTINEL_FORM = "sentinel://HOST[:PORT][,HOST[:PORT]...]/MASTER"
CLUSTER_FORM = "cluster://HOST[:PORT][,HOST[:PORT]...]"
_FORMS = {"sentinel": SENTINEL_FORM, "cluster": CLUSTER_FORM}
_PORTS = {"sentinel": 26379, "cluster": 6379}
Address = tuple[str, int]  # host and port
_ESCAPE = "write / # ? @ in a password as %2F %23 %3F %40"

_TLS = frozenset(n for n in inspect.signature(SSLConnection.__init__).parameters if n.startswith("ssl_"))
_OPTIONS = {
    "redis": frozenset(("db",)),
    "rediss": frozenset(("db", *_TLS)),
    "unix": frozenset(("db",)),
    "sentinel": frozenset(("db", "ssl", "sentinel_username", "sentinel_password", *_TLS)),
    "cluster": frozenset(("ssl", *_TLS)),
}
_ALLOWED = {
    "redis": "only db is allowed (rediss:// is for TLS)",
    "rediss": "only db and ssl_... are allowed",
    "unix": "only db is allowed",
    "sentinel": "only db, sentinel_username, sentinel_password, ssl and ssl_... are allowed",
    "cluster": "only ssl and ssl_... are allowed (a cluster has one database)",
}

_HOST = r"(?:\[[\w.:%]+\]|[\w.-]+)(?::\d+)?"
_PLACE = re.compile(rf"(?:{_HOST}(?:,{_HOST})*)?(?:/.*)?", re.ASCII)
_WORD = re.compile(r"[\w.-]+", re.ASCII)


def shown(url: str) -> str:
    """The URL without login and options, for messages; text that may be part of a password is left out too."""
    scheme, separator, rest = url.partition("://")
    if not separator or not _WORD.fullmatch(scheme.replace("+", "")):
        return "..."
    # Parsed by hand: a password with a raw / # ? or @ breaks URL parsers and must not be shown. If an @ follows a ?,
    # either may belong to a password, and `redis://:secret` has a password but no host.
    address, _, query = rest.partition("?")
    place = address.rpartition("@")[2]
    return f"{scheme}://{place if '@' not in query and _PLACE.fullmatch(place) else '...'}"


def check(url: str) -> None:
    """Refuse a URL that cannot work.

    Raises:
        SettingsError: if so; the message holds no secret.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _OPTIONS:
        raise SettingsError(
            f"the Redis URL {shown(url)!r} must begin with redis://, rediss://, unix://, sentinel:// or "
            f"cluster://, for example {DEFAULT_URL}",
            about="scheme",
        )
    if scheme == "sentinel":
        SentinelURL.parse(url)
        return
    if scheme == "cluster":
        ClusterURL.parse(url)
        return
    _options(url)
    try:
        path = urlsplit(url).path
    except ValueError:  # its message may quote the password
        raise _wrong(
            url, f"cannot be read: write it like {DEFAULT_URL}, and {_ESCAPE}", about="url"
        ) from None
    if scheme != "unix" and not re.fullmatch(r"/?\d*", path, re.ASCII):
        raise _wrong(
            url,
            f"names a database that is not a number: write it like {DEFAULT_URL}, and {_ESCAPE}",
            about="db",
        )


def check_encrypted(url: str) -> None:
    """Refuse a URL, which passed `check`, by which others on the network could read or change what is sent.

    Raises:
        SettingsError: for plain TCP to another machine, or TLS that accepts any certificate.
    """
    if is_loopback(url):
        return
    if _options(url).get("ssl_cert_reqs") == "none":
        raise _wrong(
            url, "accepts any certificate (ssl_cert_reqs=none), so anybody on the way could read all: leave that out, "
            "or say --insecure", about="ssl_cert_reqs",
        )  # fmt: skip
    if not is_tls(url):
        raise _wrong(
            url, "would send password and updates as plain text over the network: use TLS (rediss://, or ?ssl=true "
            "behind sentinel:// and cluster://; `fedmoe init` makes certificates), or say --insecure if the network "
            "itself is encrypted", about="insecure",
        )  # fmt: skip


def is_tls(url: str) -> bool:
    """True if connections to this URL use TLS."""
    scheme = url.partition("://")[0]
    if scheme == "cluster":
        return "ssl" in ClusterURL.parse(url).server
    return scheme == "rediss" or (scheme == "sentinel" and "ssl" in SentinelURL.parse(url).server)


def is_loopback(url: str) -> bool:
    """True if only this machine can be reached by this URL, which passed `check`."""
    scheme, _, rest = url.partition("://")
    hosts = rest.partition("?")[0].rpartition("@")[2].partition("/")[0].split(",")
    return scheme == "unix" or all(map(is_this_machine, hosts))


def is_this_machine(place: str) -> bool:
    """True if this host, with or without a port, is this machine; its name is not looked up."""
    host = re.sub(r":\d*$", "", place).strip("[]") if not place.count(":") > 1 or "]" in place else place
    if host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def text_of(node: Address) -> str:
    """A node's address for people."""
    return f"[{node[0]}]:{node[1]}" if ":" in node[0] else f"{node[0]}:{node[1]}"


def unusable(url: str) -> SettingsError:
    """The error for a URL that passed `check` but that redis-py cannot parse."""
    return _wrong(url, f"cannot be used: {_ESCAPE}", about="url")


def _wrong(url: str, why: str, *, about: str) -> SettingsError:
    return SettingsError(f"the Redis URL {shown(url)!r} {why}", about=about)


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelURL:
    """A parsed sentinel:// URL.

    Args:
        sentinels: host and port of each sentinel.
        master: the name under which they know the master.
        server: redis-py's arguments for the master: login, database and TLS.
        sentinel: the same for the sentinels, whose login is their own.
    """

    sentinels: tuple[Address, ...]
    master: str
    server: dict[str, Any] = field(repr=False)
    sentinel: dict[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> "SentinelURL":
        """Parse a URL; raises SettingsError, without any secret in the message."""
        options = _options(url)
        login, _, place = url.partition("://")[2].partition("?")[0].rpartition("@")
        hosts, _, master = place.partition("/")
        sentinels = tuple(_address(item, url) for item in hosts.split(","))
        if not master:
            raise _wrong(url, f"names no master: write {SENTINEL_FORM}", about="master")
        if not _WORD.fullmatch(master):
            raise _wrong(
                url,
                "names a master with characters other than letters, digits, '.', '-' and '_' "
                "(a database is given as ?db=0)",
                about="master",
            )
        tls = _tls(options)
        return cls(
            sentinels=sentinels,
            master=master,
            server=_login_of(login) | {"db": options.get("db", 0)} | tls,
            sentinel=_login(options.get("sentinel_username"), options.get("sentinel_password")) | tls,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterURL:
    """A parsed cluster:// URL.

    Args:
        nodes: host and port of some nodes; the others are asked for.
        server: redis-py's arguments for every node: login and TLS.
    """

    nodes: tuple[Address, ...]
    server: dict[str, Any] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> "ClusterURL":
        """Parse a URL; raises SettingsError, without any secret in the message."""
        options = _options(url)
        login, _, place = url.partition("://")[2].partition("?")[0].rpartition("@")
        hosts, slash, rest = place.partition("/")
        nodes = tuple(_address(item, url) for item in hosts.split(","))
        if slash and rest not in ("", "0"):
            raise _wrong(url, f"names a database, and a cluster has only 0: write {CLUSTER_FORM}", about="db")
        return cls(nodes=nodes, server=_login_of(login) | _tls(options))


def _tls(options: dict[str, Any]) -> dict[str, Any]:
    """The options of TLS; any of them means TLS."""
    tls = {name: value for name, value in options.items() if name.startswith("ssl")}
    return tls | {"ssl": True} if tls else {}


def _login_of(text: str) -> dict[str, Any]:
    user, _, password = text.partition(":")
    return _login(unquote(user), unquote(password))


def _login(user: str | None, password: str | None) -> dict[str, Any]:
    return {name: said for name, said in (("username", user), ("password", password)) if said}


def _address(item: str, url: str) -> Address:
    """Host and port of one sentinel or node."""
    scheme = url.partition("://")[0]
    form, one = _FORMS[scheme], {"sentinel": "sentinel", "cluster": "node"}[scheme]
    host, colon, port = item.rpartition(":") if re.search(r":[^:\]]*$", item) else (item, "", "")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise _wrong(
                url,
                f"has brackets around a host that is not an IPv6 address: write {form}",
                about="IPv6",
            ) from None
    elif not _WORD.fullmatch(host):
        what = "an unreadable host (write an IPv6 address in brackets)" if host else f"a {one} without a host"
        raise _wrong(url, f"has {what}: write {form}", about="host" if host else one)
    if colon and not (port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise _wrong(url, f"has a port that is not 1 to 65535: write {form}", about="port")
    return host, int(port) if colon else _PORTS[scheme]


def _options(url: str) -> dict[str, Any]:
    """The options after the ?, as redis-py's arguments."""
    scheme, query = url.partition("://")[0], url.partition("?")[2]
    options: dict[str, Any] = {}
    for item in query.split("&") if query else ():
        name, _, text = item.partition("=")
        if name not in _OPTIONS[scheme]:
            # Parts of a password with a raw & or ? look like options: text that may be one is not shown.
            harmless = _WORD.fullmatch(name) and "@" not in query and "password" not in query
            raise _wrong(
                url,
                f"has {f'the option {name!r}' if harmless else 'a wrong option'}; {_ALLOWED[scheme]}",
                about="option",
            )
        if name in options:
            raise _wrong(url, f"has the option {name} twice", about=name)
        options[name] = _value(url, name, unquote(text))
    return options


def _value(url: str, name: str, text: str) -> Any:
    """The value of one option."""
    if name == "db" and not (text.isascii() and text.isdecimal()):
        raise _wrong(url, "names a database that is not a number: write ?db=0", about="db")
    if name == "ssl" and text != "true":
        raise _wrong(
            url, "has ssl with a value other than true: leave it out if there is no TLS", about="ssl"
        )
    if name == "ssl_cert_reqs" and text not in ("none", "optional", "required"):
        raise _wrong(url, "must say none, optional or required for ssl_cert_reqs", about="ssl_cert_reqs")
    try:
        parse: Callable[[str], Any] = URL_QUERY_ARGUMENT_PARSERS.get(name, str)  # type: ignore[assignment]  # of many types
        value = parse(text)
    except (TypeError, ValueError):
        value = ""
    if value in ("", None):
        raise _wrong(url, f"has an empty or impossible value for {name}", about=name)
    return value
