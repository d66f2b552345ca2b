"""Valid names of workers, experts and prefixes."""

import re

from fedmoe.errors import SettingsError

RESERVED_EXPERTS = frozenset({"gateway", "experts"})
MAX_NAME_LENGTH = 64
_NAME = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_.-]+")


def is_name(name: str) -> bool:
    """True if `name` may be part of a key: letters, digits, `_`, `-`, `.` in the middle; 1 to 64 characters.

    A `:` would shift the boundaries between a key's parts; a glob character would widen an ACL pattern.
    """
    return 0 < len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def is_expert(name: str) -> bool:
    """True if an expert may have this name."""
    return is_name(name) and name not in RESERVED_EXPERTS


def check_name(what: str, name: str, *, setting: str = "") -> str:
    """Return `name`; raise SettingsError, about the setting or `what`, with the naming rules if it is not valid."""
    if not is_name(name):
        raise SettingsError(
            f"{what} {name!r} cannot be used: take letters, digits, '_', '-' and '.' (not first or last), "
            f"at most {MAX_NAME_LENGTH} characters",
            about=setting or what,
        )
    return name


def check_expert(name: str) -> str:
    """Like check_name; also reject reserved names."""
    if name in RESERVED_EXPERTS:
        raise SettingsError(
            f"an expert cannot be called {name!r}: that name belongs to FedMoE's own keys", about="expert"
        )
    return check_name("expert", name)


def clean_name(text: str) -> str:
    """Turn a host name or similar text into a valid name: 'My Host.local' becomes 'My-Host.local'."""
    return _NOT_ALLOWED.sub("-", text)[:MAX_NAME_LENGTH].strip(".-") or "worker"
