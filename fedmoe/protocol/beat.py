"""What a worker's heartbeat says: a hash that its worker writes, or somebody in its name. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedmoe.protocol.fields import from_untrusted, optional, to_text
from fedmoe.protocol.records import FIRST_PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """`fedmoe:{E}:worker:<worker>`. None or "" is what it does not say.

    Args:
        run: of the worker; state_id: of its state directory.
        beat: another one with each heartbeat, so that a watcher sees whether it still beats.
        protocol, software, knows: what the worker speaks, which releases it runs on, which features it knows.
        lineage, base_version: of the expert, as last pulled.
        host, pid: where it runs; since, seen: when it began and when it wrote this, by its clock (seconds since 1970).
        in_flight: seq of its undecided update, 0 for none; staleness: of its last decided one.
        published, refused: how many of its updates were; problem: what hinders it now.
        step, loss, tokens_per_s: of the training.
        base_fingerprint, tokenizer, chat_template: of its base model (see `fedmoe.protocol.identity`).
    """

    run: str = optional("")
    beat: str = optional("")
    state_id: str = optional("")
    protocol: str = optional(str(FIRST_PROTOCOL))
    software: str = optional("")
    knows: str = optional("")
    lineage: str = optional("")
    base_version: int | None = optional(None)
    host: str = optional("")
    pid: int | None = optional(None)
    since: int | None = optional(None)
    seen: int | None = optional(None)
    in_flight: int | None = optional(None)
    staleness: int | None = optional(None)
    published: int | None = optional(None)
    refused: int | None = optional(None)
    problem: str = optional("")
    step: int | None = optional(None)
    loss: float | None = optional(None)
    tokens_per_s: float | None = optional(None)
    base_fingerprint: str = optional("")
    tokenizer: str = optional("")
    chat_template: str = optional("")

    def to_fields(self) -> dict[str, str]:
        """The heartbeat as Redis stores it."""
        return to_text(self, sparse=True)

    @classmethod
    def read(cls, raw: Mapping[Any, bytes | str | None]) -> "Beat":
        """Parse what anybody may have written; what is no number where one belongs counts as not said."""
        return from_untrusted(cls, raw)


FIELDS = tuple(one.name for one in fields(Beat))
SHORT_FIELDS = tuple(name for name in FIELDS if name != "chat_template")  # without what may be 64 KiB
