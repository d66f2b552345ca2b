"""Every error FedMoE raises on purpose.

A message names the thing, says what was wanted and what came, and what to do. The command line prints it as one
sentence and exits with `exit_code`; a traceback is always a bug.
"""


class FedMoEError(Exception):
    """Root of all errors raised on purpose; printed as one sentence, without a traceback."""

    exit_code = 1


class SettingsError(FedMoEError, ValueError):
    """A setting, option or name that cannot be used."""

    exit_code = 2


class SpecError(FedMoEError, ValueError):
    """A spec that is malformed, or that another party disagrees with."""


class ProtocolError(SpecError):
    """Another party speaks another version of the protocol; the message says which side to upgrade."""

    exit_code = 2


class BaseModelError(FedMoEError, ValueError):
    """The base model is missing, unreadable, or not the one that the expert's spec names."""


class DataError(FedMoEError, ValueError):
    """A JSONL file, or a row of it, that cannot be trained on."""


class RowError(DataError):
    """A row that cannot be trained on; the message says so of "it", the row.

    Args:
        kind: the reason without what differs from row to row; rows are counted by it.
        detail: what follows the kind in the message.
    """

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind + detail)
        self.kind = kind


class UpdateError(FedMoEError, ValueError):
    """An update (header or part) that breaks the format; the message is the reason a person reads."""


class BackupError(FedMoEError, ValueError):
    """A backup that cannot be made, is damaged, or does not fit what is in Redis."""


class UnknownExpertError(FedMoEError, LookupError):
    """No expert of that name; the message lists those there are."""

    exit_code = 2


def create_from_zero(name: str) -> str:
    """The command that creates an expert again after it was lost or removed."""
    return f"fedmoe aggregator run --expert {name} --new-lineage"


class LostExpertError(UnknownExpertError):
    """An expert that was there is gone: Redis was emptied. Only an operator creates it from zero; all others wait."""

    exit_code = 1

    def __init__(self, name: str, known: str = "") -> None:
        super().__init__(
            f"expert {name!r} is gone from Redis{known}: an aggregator that retains it in memory writes it back; if "
            f"none does, restore a backup (fedmoe restore), or create it from zero ({create_from_zero(name)})"
        )


class DamagedExpertError(UnknownExpertError):
    """A part of an expert is missing, or is not the part that its meta knows. Nobody serves or trains it."""

    def __init__(self, name: str, damage: str) -> None:
        super().__init__(
            f"expert {name!r} in Redis is damaged: {damage}; an aggregator that retains it in memory repairs it; if "
            "none does, restore a backup (fedmoe restore --replace)"
        )


class RefusedError(FedMoEError, RuntimeError):
    """The aggregator refuses this worker's updates for a reason that trying again will not change."""


class RemovedExpertError(RefusedError, LookupError):
    """An expert that an operator took away for good: whoever serves or trains it ends, and nobody writes it back."""

    exit_code = 1

    def __init__(self, name: str, when: str) -> None:
        super().__init__(
            f"expert {name!r} was removed by an operator at {when}; to have it back, restore a backup (fedmoe "
            f"restore), or create it from zero ({create_from_zero(name)})"
        )


class RedisUnavailableError(FedMoEError, ConnectionError):
    """Redis cannot be reached, or refuses a command for a reason that may pass: try again."""


class RedisUnfitError(RedisUnavailableError):
    """Redis refuses a command until somebody changes its settings, this user's rights or a key.

    At the start it ends a process; while it runs, it is said once a minute, and tried again.
    """

    exit_code = 2


class StaleStateError(FedMoEError, RuntimeError):
    """Somebody else committed, or the connection was opened again: load again before deciding anything."""


class NameTakenError(FedMoEError, RuntimeError):
    """Another live process bears this worker's name."""


class StoppedError(FedMoEError):
    """A process was told to stop before it had begun its work."""

    exit_code = 0


class TooLittleMemoryError(FedMoEError, MemoryError):
    """Not even one row at a time fits into the memory of the device."""
