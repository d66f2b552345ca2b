"""The lines of an expert's two streams: its changes (`log`), and refused updates and garbage (`dead`). Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmoe.errors import ProtocolError, UpdateError
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import exact, from_text, from_untrusted, optional, to_text
from fedmoe.protocol.rules import RuleSet

Line = Mapping[str, str]  # a line as it is written to Redis


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLine:
    """A line of the log: one applied update.

    Args:
        version: of the expert after it.
        worker, run, seq, prev: the update, and the one before it in its worker's chain ("" for the first).
        base_version, staleness: of the update; factor: the scale it was folded with; norm: its L2 norm before scaling.
        weight: of its worker beside the others (see `fedmoe.protocol.balance`).
        loss: training loss that the worker reported.
        rules: number of the rule set it was decided under.
        val_loss, val_version, val_rows, val_set: a validation loss, the version it was measured on, the number of rows
            and their digest; None and "" for none.
        n_examples: rows counted for it; claimed_examples, claimed_tokens: what its worker claimed, if more.
        ends_round, new_state: 1 if it ended a round of the server optimizer; if the server state began with it.
        update: digest of the kept update, "" if it was not kept (`--keep-updates`).
        requires: features that a replay must know.
    """

    version: int
    worker: str
    run: str
    seq: int
    base_version: int
    staleness: int
    factor: float = exact()
    norm: float
    loss: float
    n_examples: int
    rules: int
    prev: str = optional("")
    weight: float = optional(1.0, exact=True)
    ends_round: int = optional(0)
    new_state: int = optional(0)
    claimed_examples: int | None = optional(None)
    claimed_tokens: int | None = optional(None)
    val_loss: float | None = optional(None)
    val_version: int | None = optional(None)
    val_rows: int | None = optional(None)
    val_set: str = optional("")
    update: str = optional("")
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The line as Redis stores it."""
        return to_text(self, sparse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorLine:
    """A line of the log from which a replay begins, because the lines before it are gone.

    Args:
        version: of the expert then.
        restored: the reason, for people.
        weights: digest of the kept weights, "" if they were not kept.
        server_state: digest of the kept server state, "" if it was not kept or there was none; optimizer: to which it
            belongs.
        requires: features that a replay must know.
    """

    version: int
    restored: str
    weights: str = optional("")
    server_state: str = optional("")
    optimizer: str = optional("")
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The line as Redis stores it."""
        return to_text(self, sparse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesLine:
    """A line of the log: an operator changed the rules.

    Args:
        version: of the expert then.
        changed: the differences, for people: `lr 1 -> 0.5`.
        ended: the rule set in force until then. The new rule set is in `meta`, or in the next RulesLine.
        requires: features that a replay must know.
    """

    version: int
    changed: str
    ended: RuleSet
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The line as Redis stores it."""
        return to_text(self, sparse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackLine:
    """A line of the log: an operator gave the expert the weights of an earlier version.

    Args:
        version: of the expert after it.
        rolled_back_to: the version whose weights these are.
        by: the operator, for people: user@host.
        weights: digest of these weights (see `fedmoe.protocol.layout.digest_of`).
        server_state: digest of that version's server state, "" if it had none; optimizer: to which it belongs.
        requires: features that a replay must know.
    """

    version: int
    rolled_back_to: int
    by: str
    weights: str
    server_state: str = optional("")
    optimizer: str = optional("")
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The line as Redis stores it."""
        return to_text(self, sparse=True)


LogLine = AppliedLine | AnchorLine | RulesLine | RollbackLine


def read_line(raw: Mapping[Any, bytes | str]) -> LogLine:
    """Parse a line of the log.

    Raises:
        ProtocolError: if it needs a feature that this FedMoE does not know.
        UpdateError: if it is malformed.
    """
    requires = raw.get("requires") or raw.get(b"requires") or ""
    check_requires(requires.decode(errors="replace") if isinstance(requires, bytes) else requires, "the log")
    names = {name.decode(errors="replace") if isinstance(name, bytes) else name for name in raw}
    try:
        if "restored" in names:
            return from_text(AnchorLine, raw)
        if "rolled_back_to" in names:
            return from_text(RollbackLine, raw)
        return from_text(RulesLine, raw) if "ended" in names else from_text(AppliedLine, raw)
    except ProtocolError:
        raise
    except (KeyError, ValueError) as error:
        raise UpdateError(
            f"a line of the log is malformed ({error!r}); was it edited by hand?", about="log"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A refused update, or garbage (`entry` is its id, `fields` its beginning), with the reason."""

    worker: str = optional("")
    run: str = optional("")
    seq: int | None = optional(None)
    reason: str = ""
    loss: float | None = optional(None)
    n_examples: int | None = optional(None)
    entry: str = optional("")
    fields: str = optional("")
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The letter as Redis stores it."""
        return to_text(self, sparse=True)

    @classmethod
    def read(cls, raw: Mapping[Any, bytes | str]) -> "DeadLetter":
        """Parse an untrusted dead letter."""
        return from_untrusted(cls, raw)
