"""The fields of a worker's heartbeat, a hash; untrusted, because anybody may have written the key. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from fedmoe.protocol import records
from fedmoe.protocol.fields import from_untrusted, optional, to_text
from fedmoe.protocol.records import FIRST_PROTOCOL


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """`fedmoe:{E}:worker:<worker>`. None or "" marks a missing field.

    Args:
        run: of the worker; state_id: of its state directory.
        beat: changes with each heartbeat, so that a watcher sees whether the worker is alive.
        protocol, software, knows: protocol version, releases and features of the worker's FedMoE.
        lineage, base_version: of the expert, as last pulled.
        host, pid: of its process; since, seen: time of its start and of this heartbeat, by its clock (seconds since
            1970).
        in_flight: seq of its undecided update, 0 for none; staleness: of its last decided update.
        published, refused: number of its updates; problem: what hinders it now.
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
        """Parse an untrusted heartbeat; a malformed number counts as missing."""
        return from_untrusted(cls, raw)


FIELDS = tuple(one.name for one in fields(Beat))
SHORT_FIELDS = tuple(name for name in FIELDS if name != "chat_template")  # a template may take 64 KiB


def protocol_problem(worker: str, named: str) -> str:
    """What an aggregator says of a joining worker whose heartbeat names another protocol, "" if it is this FedMoE's."""
    if named == str(records.PROTOCOL):
        return ""
    is_later = named.isdecimal() and len(named) < 10 and int(named) > records.PROTOCOL
    return (
        f"worker {worker} speaks protocol {named[:20]} and this aggregator protocol {records.PROTOCOL}: "
        f"upgrade the FedMoE of {'this aggregator' if is_later else 'that worker'}"
    )
