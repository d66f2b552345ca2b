"""The tail of an expert: the updates that were applied since its weights were last written. Pure.

Redis holds an expert as a snapshot and a tail. The *snapshot* is the safetensors file under `weights`, with the one
under `server_state`, as of an earlier commit. The *tail* is a hash with the updates that were applied since then:

    <version>         a record (JSON): how the update that made this version is folded
    <version>:<part>  a part of its payload, at most 1 MiB, as its worker encoded it

The exact weights are the snapshot, then the updates of the tail folded in order; `fedmoe.protocol.exact` does it. A
record names the record before it by its digest, the first one names the commit of the snapshot, and `meta` names the
last one. So nobody folds a tail with a gap, or onto a snapshot of another history.

An aggregator writes records and parts in the commit that applies the update, from the parts that it has checked and
folded. Whatever writes the weights removes the tail in the same transaction.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import xxhash

from fedmoe.errors import SpecError
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import exact, from_json, from_text, optional, to_text
from fedmoe.protocol.rules import ADAPTIVE, NESTEROV, SGD, AggregationRules
from fedmoe.protocol.server import ServerStep


def quick_digest(*contents: bytes | memoryview) -> str:
    """XXH3 (32 hex digits) of these bytes: it finds damage, not forgery; only aggregators write what it covers."""
    state = xxhash.xxh3_128()
    for content in contents:
        state.update(content)
    return state.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What `meta` says of the snapshot and the tail; false if there is no tail.

    Args:
        snapshot: the commit that wrote the snapshot; "" without a tail, the weights commit then wrote it.
        snapshot_version: of the expert then.
        head: digest of the tail's last record.
        fields: of the hash.
        n_bytes: of records and parts.
        state: where its first update with a server optimizer began: `snapshot`, at the server state that lies with the
            snapshot, or `new`; "" without such an update.
    """

    snapshot: str = ""
    snapshot_version: int = 0
    head: str = ""
    fields: int = 0
    n_bytes: int = 0
    state: str = ""

    def __bool__(self) -> bool:
        return bool(self.snapshot)

    def to_json(self) -> str:
        """The field of meta; "" without a tail."""
        return json.dumps(asdict(self)) if self else ""

    @classmethod
    def from_json(cls, text: str) -> "Tail":
        """Parse the field of meta. Raises ValueError if it is malformed."""
        return from_json(cls, text, "tail") if text else cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class TailRecord:
    """How an update of the tail is folded: all that its step depends on, whatever the rules are by now.

    Args:
        version: of the expert after it.
        prev: digest of the record before it; of the first one, the commit of the snapshot.
        factor: the scale that it is folded with. rules: number of the rule set that it was decided under.
        parts, digest: number of its parts, and their quick digest.
        ends_round, new_state: as in its line of the log.
        server_optimizer, server_momentum, server_beta2, server_epsilon: the rules of its step, None where unused.
        requires: features that a reader must know.
    """

    version: int
    prev: str
    factor: float = exact()
    rules: int
    parts: int
    digest: str
    ends_round: int = optional(0)
    new_state: int = optional(0)
    server_optimizer: str = optional(SGD)
    server_momentum: float | None = optional(None, exact=True)
    server_beta2: float | None = optional(None, exact=True)
    server_epsilon: float | None = optional(None, exact=True)
    requires: str = optional("")

    @classmethod
    def of(
        cls, version: int, step: ServerStep, parts: Sequence[bytes], *, rules: int, prev: str, new_state: bool
    ) -> "TailRecord":
        """The record of an update that was just folded; the arguments are as the fields of these names."""
        optimizer, used = step.rules.server_optimizer, step.rules
        return cls(
            version=version,
            prev=prev,
            factor=step.factor,
            rules=rules,
            parts=len(parts),
            digest=quick_digest(*parts),
            ends_round=int(step.ends_round),
            new_state=int(new_state),
            server_optimizer=optimizer,
            server_momentum=used.server_momentum if optimizer == NESTEROV else None,
            server_beta2=used.server_beta2 if optimizer == ADAPTIVE else None,
            server_epsilon=used.server_epsilon if optimizer == ADAPTIVE else None,
        )

    @property
    def step(self) -> ServerStep:
        """The step of the update."""
        used = {
            name: value
            for name in ("server_momentum", "server_beta2", "server_epsilon")
            if (value := getattr(self, name)) is not None
        }
        rules = AggregationRules(server_optimizer=self.server_optimizer, **used)
        return ServerStep(rules, self.factor, bool(self.ends_round))

    def to_json(self) -> str:
        """The record as Redis stores it."""
        return json.dumps(to_text(self, sparse=True))

    @classmethod
    def from_json(cls, text: bytes) -> "TailRecord":
        """Parse a stored record.

        Raises:
            ProtocolError: if it needs a feature that this FedMoE does not know.
            SpecError: if it is malformed.
        """
        try:
            raw = json.loads(text)
            check_requires(str(raw.get("requires", "")), "the tail")
            return from_text(cls, raw)
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"a record of its tail is malformed ({error!r})", about="tail") from error


def record_field(version: int) -> str:
    """The field of the tail that holds the record of this version."""
    return str(version)


def part_field(version: int, index: int) -> str:
    """The field of the tail that holds a part of the update of this version."""
    return f"{version}:{index}"


def tail_updates(
    tail: Tail, version: int, stored: Mapping[bytes, bytes]
) -> list[tuple[TailRecord, list[bytes]]]:
    """The updates of a tail in order, each a record and its parts, checked against what meta says of them.

    `tail` and `version` are those of the expert's meta, `stored` is the hash.

    Raises:
        SpecError: if a field is missing, or does not belong to this tail; its text is the end of a sentence.
        ProtocolError: if a record needs a feature that this FedMoE does not know.
    """
    found, prev = [], tail.snapshot
    for number in range(tail.snapshot_version + 1, version + 1):
        text = _field(stored, record_field(number))
        record = TailRecord.from_json(text)
        if (record.version, record.prev) != (number, prev):
            raise SpecError(
                f"its tail is of several histories: the record of version {number} does not follow {prev}",
                about="tail",
            )
        parts = [_field(stored, part_field(number, index)) for index in range(record.parts)]
        if quick_digest(*parts) != record.digest:
            raise SpecError(f"in its tail, the update of version {number} is damaged", about="tail")
        found.append((record, parts))
        prev = quick_digest(text)
    if prev != tail.head:
        raise SpecError(f"its tail ends at {prev}, but its meta expects {tail.head}", about="tail")
    return found


def _field(stored: Mapping[bytes, bytes], name: str) -> bytes:
    if (value := stored.get(name.encode())) is None:
        raise SpecError(f"its tail lacks the field {name}", about="tail")
    return value
