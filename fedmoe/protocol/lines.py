"""The lines of an expert's two streams: what changed it (`log`), and what was not taken (`dead`). Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedmoe.errors import ProtocolError, UpdateError
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import exact, from_text, from_untrusted, optional, to_text
from fedmoe.protocol.rules import RuleSet

Line = Mapping[str, str]  # as it is written


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLine:
    """A line of the log: one applied update.

    Args:
        version: of the expert after it.
        worker, run, seq, prev: the update, and the one before it in its worker's chain ("" for the first).
        base_version, staleness: of the update; factor: what it was multiplied with; norm: Euclidean, before that.
        loss: training loss that the worker reported.
        rules: number of the rule set that it was decided under.
        n_examples: rows that it counts for; claimed_examples, claimed_tokens: what it claimed, if that was more.
        update: digest under which it was kept, "" if it was not (`--keep-updates`).
        requires: what a replay must know.
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
    claimed_examples: int | None = optional(None)
    claimed_tokens: int | None = optional(None)
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
        restored: why, for people.
        weights: digest under which its weights were kept, "" if they were not.
        requires: what a replay must know.
    """

    version: int
    restored: str
    weights: str = optional("")
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The line as Redis stores it."""
        return to_text(self, sparse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesLine:
    """A line of the log: an operator changed the rules.

    Args:
        version: of the expert then.
        changed: what, for people: `lr 1 -> 0.5`.
        ended: the rule set that was in force until then. The new one stands in `meta`, or in the next such line.
        requires: what a replay must know.
    """

    version: int
    changed: str
    ended: RuleSet
    requires: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The line as Redis stores it."""
        return to_text(self, sparse=True)


LogLine = AppliedLine | AnchorLine | RulesLine


def read_line(raw: Mapping[Any, bytes | str]) -> LogLine:
    """Parse a line of the log.

    Raises:
        ProtocolError: if it needs something that this FedMoE does not know.
        UpdateError: if it is malformed.
    """
    requires = raw.get("requires") or raw.get(b"requires") or ""
    check_requires(requires.decode(errors="replace") if isinstance(requires, bytes) else requires, "the log")
    names = {name.decode(errors="replace") if isinstance(name, bytes) else name for name in raw}
    try:
        if "restored" in names:
            return from_text(AnchorLine, raw)
        return from_text(RulesLine, raw) if "ended" in names else from_text(AppliedLine, raw)
    except ProtocolError:
        raise
    except (KeyError, ValueError) as error:
        raise UpdateError(f"a line of the log is malformed ({error!r}); was it edited by hand?") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """An update that was refused, or an entry that was garbage (`entry` is its id, `fields` its beginning), and why."""

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
        """Parse one that anybody may have edited."""
        return from_untrusted(cls, raw)
