"""How to reach Redis: the settings that all commands have. Free of torch and redis."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedmoe.enrolment import Enrolment, Login
from fedmoe.errors import SettingsError
from fedmoe.protocol.keys import DEFAULT_PREFIX, Keys
from fedmoe.util.setting import check, setting

MAX_SECONDS = 86_400
DEFAULT_URL = "redis://127.0.0.1:6379/0"


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """How to reach Redis, and the prefix of the federation's keys.

    Args:
        url: redis://, rediss:// (TLS), unix://, sentinel:// or cluster:// URL (see store/url.py); may carry user and
            password.
        prefix: first part of every key, so that several federations can share a server.
        timeout_s: seconds to wait for a reply before a command has failed; longer than any blocking read (1 s).
        enrolment: file with URL, prefix, login and CA; then `url` and `prefix` come from it.
        insecure: plain TCP to other machines is allowed.
        credential_provider: callable that returns user and password, asked at each connection; for managed servers
            whose passwords are tokens that expire.

    Raises:
        SettingsError: for another scheme, an impossible value, or a connection that others could read.
    """

    url: str = setting(
        DEFAULT_URL,
        "URL of Redis: redis://, rediss:// (TLS), unix://, sentinel://HOST[:PORT][,HOST...]/MASTER or "
        "cluster://HOST[:PORT][,HOST...]; it may carry user:password@.",
        option="redis", metavar="URL", variable="FEDMOE_REDIS",
    )  # fmt: skip
    prefix: str = setting(
        DEFAULT_PREFIX,
        "Prefix of every key; each federation on a server has its own.",
        variable="FEDMOE_PREFIX",
    )
    timeout_s: float = setting(
        10.0, "Seconds to wait for a reply before a command has failed.", option="redis_timeout", at_least=2,
        at_most=MAX_SECONDS, unit="s", variable="FEDMOE_REDIS_TIMEOUT",
    )  # fmt: skip
    enrolment: Path | None = setting(
        None, "Enrolment file with URL, user, password and CA, from `fedmoe init` or an operator; instead of --redis.",
        metavar="FILE", variable="FEDMOE_ENROLMENT",
    )  # fmt: skip
    insecure: bool = setting(
        False, "Allow plain TCP to other machines, or TLS without checking the server's certificate; for a network "
        "that is encrypted itself.", variable="FEDMOE_INSECURE",
    )  # fmt: skip
    credential_provider: Callable[[], Login] | None = field(default=None, repr=False)
    enrolled: Enrolment | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        from fedmoe.store.url import check as check_url  # it imports redis
        from fedmoe.store.url import check_encrypted

        if self.enrolment is not None:
            self._take(Enrolment.read(self.enrolment))
        check_url(self.url)
        check(self)
        Keys(self.prefix)
        if not self.insecure:
            check_encrypted(self.url)

    def _take(self, enrolled: Enrolment) -> None:
        """Take URL and prefix from the enrolment."""
        if self.url not in (DEFAULT_URL, enrolled.url):
            raise SettingsError(
                "--redis (or FEDMOE_REDIS) and --enrolment both say how to reach Redis: give one of them",
                about="enrolment",
            )
        if self.prefix not in (DEFAULT_PREFIX, enrolled.prefix):
            raise SettingsError(
                f"--prefix (or FEDMOE_PREFIX) is {self.prefix!r}, and the enrolment is for {enrolled.prefix!r}: leave "
                "--prefix out",
                about="prefix",
            )
        for name, value in (("url", enrolled.url), ("prefix", enrolled.prefix), ("enrolled", enrolled)):
            object.__setattr__(self, name, value)  # frozen, and still being made

    @property
    def shown(self) -> str:
        """The URL without login and options, for messages."""
        from fedmoe.store.url import shown

        return shown(self.url)
