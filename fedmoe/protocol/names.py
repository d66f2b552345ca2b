"""Valid names of workers, experts and prefixes."""

import re

from fedmoe.errors import SettingsError

GATEWAY = "gateway"  # the expert that the workers of all domains train
MERGED = "merged"  # the merge of the experts
RESERVED_EXPERTS = frozenset({MERGED, "experts"})
MAX_NAME_LENGTH = 64
_NAME = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9_.-]+")


def is_name(name: str) -> bool:
    """True if `name` may be part of a key: letters, digits, `_`, `-`, `.` in the middle; 1 to 64 characters.

    A `:` would shift the boundaries between a key's parts; a glob character would widen an ACL pattern.
    """
    return 0 < len(name) <= MAX_NAME_LENGTH and _NAME.fullmatch(name) is not None


def is_expert(name: str) -> bool:
    """True if an expert may have this name, or the trained gateway has it."""
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


def check_domain(name: str) -> str:
    """Like check_expert; also reject the gateway, which belongs to no single domain."""
    if name == GATEWAY:
        raise SettingsError(
            f"{GATEWAY!r} is the expert that the workers of all experts train: name one of theirs, and let its rules "
            "say so (fedmoe expert set EXPERT --train both)",
            about="expert",
        )
    return check_expert(name)


def check_trains_gateway(expert: str) -> None:
    """Raise SettingsError if the workers of this expert cannot train the gateway."""
    if "." in expert:
        raise SettingsError(
            f"the workers of {expert!r} cannot train the gateway, because the name has a dot: there a worker is named "
            "EXPERT.WORKER, and the first dot ends the expert's name. Take an expert without a dot",
            about="expert",
        )


def name_on_gateway(expert: str, worker: str) -> str:
    """The name of an expert's worker on the gateway, `sql_expert.alice`: workers of two experts may share a name.

    Raises:
        SettingsError: if the expert's name has a dot, or the whole name is too long.
    """
    check_trains_gateway(expert)
    name = f"{expert}.{worker}"
    if len(name) > MAX_NAME_LENGTH:
        raise SettingsError(
            f"on the gateway this worker would be named {name!r}, which is longer than {MAX_NAME_LENGTH} characters: "
            "give it a shorter --name",
            about="name",
        )
    return name


def may_train_gateway(expert: str, worker: str) -> bool:
    """True if `name_on_gateway` takes these names."""
    return "." not in expert and is_name(f"{expert}.{worker}")


def domain_of(worker: str) -> str:
    """The expert whose worker has this name on the gateway."""
    return worker.partition(".")[0]


def clean_name(text: str) -> str:
    """Turn a host name or similar text into a valid name: 'My Host.local' becomes 'My-Host.local'."""
    return _NOT_ALLOWED.sub("-", text)[:MAX_NAME_LENGTH].strip(".-") or "worker"
