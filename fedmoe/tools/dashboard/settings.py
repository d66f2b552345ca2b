"""The settings of `fedmoe dashboard`; free of torch, redis and starlette."""

import ipaddress
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmoe.errors import SettingsError
from fedmoe.util.setting import check, setting

PASSWORD_VARIABLE = "FEDMOE_DASHBOARD_PASSWORD"  # noqa: S105  # the variable's name
MIN_PASSWORD_CHARS = 8
MAX_PASSWORD_CHARS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardSettings:
    """Where the dashboard listens, who may read it, and how often it looks at Redis.

    Raises:
        SettingsError: for an impossible value.
    """

    host: str = setting("127.0.0.1", "Address to listen on; one beyond this machine asks for a password.")
    port: int = setting(
        5000, "Port to listen on; 0 takes a free one.", at_least=0, at_most=65_535, metavar="N"
    )
    allow_host: tuple[str, ...] = setting(
        (), "Names, separated by commas, by which browsers may call it, beside addresses and this machine's name.",
        words="none", metavar="NAME,...",
    )  # fmt: skip
    password_file: Path | None = setting(
        None, f"File with the password; nobody but its owner may read it.  Or set {PASSWORD_VARIABLE}.",
        metavar="FILE", words="none, on this machine only",
    )  # fmt: skip
    tls_certificate: Path | None = setting(
        None, "PEM file with the certificate (chain) of the dashboard.", metavar="FILE", words="plain HTTP"
    )
    tls_key: Path | None = setting(
        None, "PEM file with the key of the certificate.", metavar="FILE", words="in the certificate's file"
    )
    forwarded_allow_ips: tuple[str, ...] = setting(
        (), "Addresses, separated by commas, of proxies whose X-Forwarded-For and X-Forwarded-Proto are believed.",
        words="none", metavar="ADDRESS,...",
    )  # fmt: skip
    interval_s: float = setting(
        1.0, "Time between two looks at Redis while somebody looks, like 1s.", option="interval", above=0,
        at_most=3600, unit="s", is_duration=True, words="1s",
    )  # fmt: skip
    downloads: bool = setting(
        False, "Offer each adapter for download; the user in Redis needs an operator's right to read weights."
    )

    def __post_init__(self) -> None:
        check(self)
        if self.tls_key and not self.tls_certificate:
            raise SettingsError(
                "tls_key needs tls_certificate: name the certificate, too", about="tls_certificate"
            )
        for address in self.forwarded_allow_ips:
            try:  # a network could hold clients, who would choose the address that they are known by
                ipaddress.ip_address(address)
            except ValueError:
                raise SettingsError(
                    f"forwarded_allow_ips names {address!r}, which is not the address of a proxy: name each proxy by "
                    "its own, no network, no name and not *",
                    about="forwarded_allow_ips",
                ) from None

    @property
    def is_local(self) -> bool:
        """True if only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def password_of(settings: DashboardSettings, environment: Mapping[str, str]) -> str:
    """The password that readers must give, "" for none.

    Raises:
        SettingsError: if there is none and other machines can reach the dashboard; if it cannot be read, or is too
            short; if others can read its file.
    """
    if settings.password_file:
        what, password = str(settings.password_file), _read(settings.password_file)
    else:
        what, password = PASSWORD_VARIABLE, environment.get(PASSWORD_VARIABLE, "")
        if not password and not settings.is_local:
            raise SettingsError(
                f"other machines can reach {settings.host}, so the dashboard needs a password: give --password-file, "
                f"or set {PASSWORD_VARIABLE}",
                about="password_file",
            )
        if not password:
            return ""
    if not MIN_PASSWORD_CHARS <= len(password) <= MAX_PASSWORD_CHARS:
        raise SettingsError(
            f"the password in {what} must have {MIN_PASSWORD_CHARS} to {MAX_PASSWORD_CHARS} characters, not "
            f"{len(password)}",
            about="password_file",
        )
    return password


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_PASSWORD_CHARS + 2)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise SettingsError(f"cannot read the password file {path}: {why}", about="password_file") from error
    if stat.S_ISREG(mode) and mode & 0o077:
        raise SettingsError(
            f"others may read the password file {path}: type `chmod 600 {path}`", about="password_file"
        )
    return text.strip("\r\n")
