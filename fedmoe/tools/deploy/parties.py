"""The parties of a new federation: their enrolment files, and the settings of the operator's machine."""

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from fedmoe.enrolment import Enrolment
from fedmoe.errors import SettingsError
from fedmoe.protocol.parties import Party

SECRET_BYTES = 32
SETTINGS, ENROLMENTS = "fedmoe.toml", "enrolments"
_CENTRAL = ("aggregator", "monitor", "operator")


def parties(workers: Sequence[Party]) -> dict[str, Party]:
    """Every party, by the name of its file."""
    central = {role: Party(role=role) for role in _CENTRAL}
    named = central | {worker.name: worker for worker in workers}
    return {f"{name}.toml": party for name, party in named.items()}


def check_files(workers: Sequence[Party]) -> None:
    """Raise SettingsError if two of the files would have one name."""
    names = [worker.name for worker in workers]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SettingsError(
            f"two workers are named {twice[0]!r}, and their files would be, too: give each its own name here",
            about="worker",
        )
    if odd := set(_CENTRAL) & set(names):
        raise SettingsError(
            f"a worker's file would be named like the {min(odd)}'s: take another name", about="worker"
        )


def new_enrolment(party: Party, *, url: str, prefix: str, ca: str) -> Enrolment:
    """A party's enrolment, with a new password."""
    return Enrolment(
        url=url, prefix=prefix, user=party.user(prefix), password=secrets.token_urlsafe(SECRET_BYTES), role=party.role,
        expert=party.expert, name=party.name, ca=ca,
    )  # fmt: skip


def settings_text(directory: Path, workers: Sequence[Party]) -> str:
    """The settings file of the deployment in this directory."""
    experts = list(dict.fromkeys(worker.expert for worker in workers))
    here = directory.resolve() / ENROLMENTS
    listed = f"expert = {json.dumps(experts)}\n" if experts else ""
    monitor = _toml_text(here / "monitor.toml")
    monitors = "".join(
        f"\n[{command}]\nenrolment = {monitor}\n" for command in ("status", "top", "metrics", "dashboard")
    )
    return f"""# Settings of the federation for the machine of its operator: fedmoe --config {SETTINGS} …
enrolment = {_toml_text(here / "operator.toml")}

[aggregator.run]
enrolment = {_toml_text(here / "aggregator.toml")}
{listed}{monitors}"""


def _toml_text(path: Path) -> str:
    """A path as a text of TOML, which takes no surrogate pairs as JSON does."""
    return json.dumps(str(path), ensure_ascii=False).replace("\x7f", "\\u007f")


def make_empty(directory: Path) -> None:
    """Make the directory of a deployment, its owner's alone.

    Raises:
        SettingsError: if there is something in it, or it cannot be made.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise SettingsError(
                f"the directory {str(directory)!r} is not empty: name a new one, or renew its server certificate "
                "(--renew); a second federation on the same Redis has a directory of its own (--prefix, --beside)",
                about="directory",
            )
        directory.chmod(0o700)
    except OSError as error:
        raise SettingsError(f"cannot use {str(directory)!r}: {error.strerror}", about="directory") from error
