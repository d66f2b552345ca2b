"""What a worker, an expert or a prefix may be called."""

import re

from fedmoe.errors import SettingsError

RESERVED_EXPERTS = frozenset({"gateway", "experts"})
MAX_NAME_LENGTH = 64
_NAME = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_.-]+")


def is_name(name: str) -> bool:
    """True if `name` may stand in a key: letters, digits, `_`, `-`, `.` in the middle; 1 to 64 characters.

    A `:` would move the borders of the key's parts and a glob character those of an ACL pattern.
    """
    return 0 < len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def is_expert(name: str) -> bool:
    """True if an expert may be called so."""
    return is_name(name) and name not in RESERVED_EXPERTS


def check_name(what: str, name: str) -> str:
    """Return `name`, or raise SettingsError that says what a name of this kind may look like."""
    if not is_name(name):
        raise SettingsError(
            f"{what} {name!r} cannot be used: take letters, digits, '_', '-' and '.' (not first or last), "
            f"at most {MAX_NAME_LENGTH} characters"
        )
    return name


def check_expert(name: str) -> str:
    """Like check_name, and not one of the names that the gateway's keys have."""
    if name in RESERVED_EXPERTS:
        raise SettingsError(f"an expert cannot be called {name!r}: that name belongs to FedMoE's own keys")
    return check_name("expert", name)


def clean_name(text: str) -> str:
    """Make a valid name of a host name or the like: 'My Host.local' becomes 'My-Host.local'."""
    return _NOT_ALLOWED.sub("-", text)[:MAX_NAME_LENGTH].strip(".-") or "worker"
