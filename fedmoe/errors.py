"""Every error FedMoE raises on purpose.

A message names the field, what was wanted, what came, and what to do. The command line prints it as one sentence and
exits with `exit_code`; a traceback is always a bug. A program compares the type and `about`, never the message.
"""

from typing import Any


class FedMoEError(Exception):
    """Root of all errors raised on purpose; printed as one sentence, without a traceback.

    Args:
        about: what the error is about, in one word for programs: the setting, field, file, key, worker or expert by
            the name that it has where it is declared, else the noun of the reason ("rights", "rollback").
    """

    exit_code = 1

    def __init__(self, message: str, *, about: str) -> None:
        super().__init__(message)
        self.about = about

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy gets the same fields. It is not made by calling the class, because subclasses take other arguments,
        # nor by the class's own __new__, because MemoryError's takes no class that has a second base.
        builtin = OSError if isinstance(self, OSError) else Exception
        return builtin.__new__, (type(self),), {**self.__dict__, "args": self.args}


class SettingsError(FedMoEError, ValueError):
    """A setting, an option or a name cannot be used."""

    exit_code = 2


class SpecError(FedMoEError, ValueError):
    """A spec, rule set or record is malformed, or differs from that of another party."""


class ProtocolError(SpecError):
    """Another party speaks another version of the protocol; the message says which side to upgrade."""

    exit_code = 2


class BaseModelError(FedMoEError, ValueError):
    """The base model is missing, unreadable, or not the one that the expert's spec names."""


class DataError(FedMoEError, ValueError):
    """A JSONL file, or a row in it, cannot be trained on."""


class RowError(DataError):
    """A row cannot be trained on; the subject of the message is "it", the row.

    Args:
        kind: the reason without details of the row, for people; rows are counted by kind.
        detail: the part of the message after the kind.
    """

    def __init__(self, kind: str, detail: str = "", *, about: str) -> None:
        super().__init__(kind + detail, about=about)
        self.kind = kind


class UpdateError(FedMoEError, ValueError):
    """A header or a part of an update breaks the format; the message becomes the reason of the refusal."""


class BackupError(FedMoEError, ValueError):
    """A backup cannot be made, is damaged, or does not fit the experts in Redis."""


class UnknownExpertError(FedMoEError, LookupError):
    """There is no expert of that name; the message lists the experts."""

    exit_code = 2


def create_from_zero(name: str) -> str:
    """The command that creates a lost or removed expert from zero."""
    if name == "gateway":  # no aggregator is told to create it
        return "fedmoe expert add gateway --new-lineage"
    return f"fedmoe aggregator run --expert {name} --new-lineage"


class LostExpertError(UnknownExpertError):
    """An expert is gone because Redis was emptied. Only an operator creates it from zero; every process waits."""

    exit_code = 1

    def __init__(self, name: str, known: str = "") -> None:
        super().__init__(
            f"expert {name!r} is gone from Redis{known}: an aggregator that retains it in memory writes it back; if "
            f"none does, restore a backup (fedmoe restore), or create it from zero ({create_from_zero(name)})",
            about=name,
        )


class DamagedExpertError(UnknownExpertError):
    """A part of an expert is missing or does not match its meta. The expert is neither served nor trained."""

    def __init__(self, name: str, damage: str) -> None:
        super().__init__(
            f"expert {name!r} in Redis is damaged: {damage}; an aggregator that retains it in memory repairs it; if "
            "none does, restore a backup (fedmoe restore --replace)",
            about=name,
        )
        self.damage = damage


class RefusedError(FedMoEError, RuntimeError):
    """The aggregator refuses this worker's updates for a reason that a retry does not change."""


class RemovedExpertError(RefusedError, LookupError):
    """An operator removed the expert for good. Its workers end, and no aggregator serves it or writes it back."""

    exit_code = 1

    def __init__(self, name: str, when: str) -> None:
        super().__init__(
            f"expert {name!r} was removed by an operator at {when}; to have it back, restore a backup (fedmoe "
            f"restore), or create it from zero ({create_from_zero(name)})",
            about=name,
        )
        self.when = when


class RedisUnavailableError(FedMoEError, ConnectionError):
    """Redis cannot be reached, or refuses a command for a reason that may pass; a retry may succeed."""


class IncompleteUpdateError(RedisUnavailableError):
    """The server lacks parts of the update that was just sent, for example after a failover; the worker resends it."""


class RedisUnfitError(RedisUnavailableError):
    """Redis refuses a command until somebody changes its settings, this user's rights or a key.

    At its start a process ends with this error; while it runs, it reports the error once a minute and retries.
    """

    exit_code = 2


class RequestError(FedMoEError, ValueError):
    """A request to the endpoint of `fedmoe gateway serve` cannot be answered as it is; `about` is its field."""


class UnknownModelError(RequestError, LookupError):
    """A request names a model that is not served."""


class ServerAwayError(FedMoEError, ConnectionError):
    """A server that answers with the model cannot be reached, or has a problem of its own; a retry may succeed."""


class AdapterRefusedError(FedMoEError, RuntimeError):
    """A server, or an operator's command, does not take this version of the adapter; another version may be taken."""


class StaleStateError(FedMoEError, RuntimeError):
    """Another process committed, or the connection was opened again; load the expert again before deciding."""


class NameTakenError(FedMoEError, RuntimeError):
    """Another live process has this worker's name."""


class StoppedError(FedMoEError):
    """A process was told to stop before it began its work."""

    exit_code = 0


class NotAliveError(FedMoEError, RuntimeError):
    """A process does not show that it is alive."""


class TooLittleMemoryError(FedMoEError, MemoryError):
    """Not even one row fits into the memory of the device."""
