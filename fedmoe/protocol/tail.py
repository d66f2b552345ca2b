"""The tail of an expert: the updates that were applied since its weights were last written. Pure.

Redis holds an expert as a snapshot and a tail. The *snapshot* is the safetensors file under `weights`, with the one
under `server_state`, as of an earlier commit. The *tail* is a hash with the updates that were applied since then:

    <version>         a record (JSON): how the update that made this version is folded

The parts of an update lie beside it, in strings of their own, as its worker encoded them. An aggregator has Redis copy
them from the payload, before it reads and checks them: so it folds what nobody else can write, and sends nothing twice.
A copy expires, until the commit that applies its update makes it permanent. (In a tail of an earlier release the parts
are fields of the hash, <version>:<part>.)

The exact weights are the snapshot, then the updates of the tail folded in order; `fedmoe.protocol.exact` does it. A
record names the record before it by its digest, the first one names the commit of the snapshot, and `meta` names the
last one. So nobody folds a tail with a gap, or onto a snapshot of another history.

An aggregator writes a record in the commit that applies the update. Whatever writes the weights removes the tail, with
the copies that its records name, in the same transaction.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

import xxhash

from fedmoe.errors import FedMoEError, SpecError
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import exact, from_json, from_text, optional, to_text
from fedmoe.protocol.keys import ExpertKeys
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
        fields: its records and parts.
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


class Copy:
    """The copy that an aggregator makes of an update's parts, while it reads and folds them.

    Args:
        token: random; it names the copy, so that no two attempts to decide an update write the same keys.
        count: number of the parts.

    Attributes:
        n_made: how many parts are known to be copied.
        refused: why Redis copies nothing for this aggregator; None if it does.
        n_bytes: of the parts.
    """

    def __init__(self, token: str, count: int) -> None:
        self.token = token
        self.count = count
        self.n_made = 0
        self.refused: Exception | None = None
        self.n_bytes = 0
        self._digest = xxhash.xxh3_128()

    def reading(self, parts: Iterable[bytes]) -> Iterator[bytes]:
        """These parts of the update, noted as they come."""
        for part in parts:
            self.n_bytes += len(part)
            self._digest.update(part)
            yield part

    @property
    def is_whole(self) -> bool:
        """True if all parts were copied."""
        return self.n_made == self.count

    @property
    def digest(self) -> str:
        """The quick digest of the parts."""
        return self._digest.hexdigest()

    def keys(self, keys: ExpertKeys) -> list[str]:
        """The keys of the copied parts."""
        return [keys.tail_part(self.token, index) for index in range(self.count)]

    def left_over(self, keys: ExpertKeys) -> list[str]:
        """The keys to remove if the copy is not needed; none if Redis refused the first part, and maybe this too."""
        return [] if self.refused and not self.n_made else self.keys(keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailRecord:
    """How an update of the tail is folded: all that its step depends on, whatever the rules are by now.

    Args:
        version: of the expert after it.
        prev: digest of the record before it; of the first one, the commit of the snapshot.
        factor: the scale that it is folded with. rules: number of the rule set that it was decided under.
        parts, digest: number of its parts, and their quick digest.
        copy: names the strings that hold its parts; "" if the hash holds them, as in tails of an earlier release.
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
    copy: str = optional("")
    ends_round: int = optional(0)
    new_state: int = optional(0)
    server_optimizer: str = optional(SGD)
    server_momentum: float | None = optional(None, exact=True)
    server_beta2: float | None = optional(None, exact=True)
    server_epsilon: float | None = optional(None, exact=True)
    requires: str = optional("")

    @classmethod
    def of(
        cls, version: int, step: ServerStep, copy: Copy, *, rules: int, prev: str, new_state: bool
    ) -> "TailRecord":
        """The record of an update that was just folded; the arguments are as the fields of these names."""
        optimizer, used = step.rules.server_optimizer, step.rules
        return cls(
            version=version,
            prev=prev,
            factor=step.factor,
            rules=rules,
            parts=copy.count,
            digest=copy.digest,
            copy=copy.token,
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


def tail_records(tail: Tail, version: int, stored: Mapping[bytes, bytes]) -> list[TailRecord]:
    """The records of a tail in order, checked against what meta says of them.

    `tail` and `version` are those of the expert's meta, `stored` is the hash.

    Raises:
        SpecError: if a record is missing, or does not belong to this tail; its text is the end of a sentence.
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
        found.append(record)
        prev = quick_digest(text)
    if prev != tail.head:
        raise SpecError(f"its tail ends at {prev}, but its meta expects {tail.head}", about="tail")
    return found


# Token and number of parts -> the parts, None for one that is lost.
CopiedParts = Callable[[str, int], Iterable[bytes | None]]


def no_copies(token: str, count: int) -> Iterable[bytes | None]:
    """The copied parts where there are none."""
    return [None] * count


def tail_parts(record: TailRecord, stored: Mapping[bytes, bytes], copies: CopiedParts) -> Iterator[bytes]:
    """The parts of an update of the tail, one by one.

    Raises:
        SpecError: if a part is missing, or, after the last one, if they are not those that the record names.
    """
    digest = xxhash.xxh3_128()
    for part in _copied(record, copies) if record.copy else _in_hash(record, stored):
        digest.update(part)
        yield part
    if digest.hexdigest() != record.digest:
        raise SpecError(f"in its tail, the update of version {record.version} is damaged", about="tail")


def _copied(record: TailRecord, copies: CopiedParts) -> Iterator[bytes]:
    for index, part in enumerate(copies(record.copy, record.parts)):
        if part is None:
            raise SpecError(
                f"its tail lacks part {index} of the update of version {record.version} (copy {record.copy})",
                about="tail",
            )
        yield part


def _in_hash(record: TailRecord, stored: Mapping[bytes, bytes]) -> Iterator[bytes]:
    return (_field(stored, part_field(record.version, index)) for index in range(record.parts))


def copied_keys(keys: ExpertKeys, stored: Mapping[bytes, bytes] | None) -> list[str]:
    """The keys of all copied parts that the records in this hash name; what is no record counts as none."""
    found = []
    for field, text in (stored or {}).items():
        if b":" in field:  # a part
            continue
        with suppress(FedMoEError):
            record = TailRecord.from_json(text)
            found += [keys.tail_part(record.copy, index) for index in range(record.parts) if record.copy]
    return found


def _field(stored: Mapping[bytes, bytes], name: str) -> bytes:
    if (value := stored.get(name.encode())) is None:
        raise SpecError(f"its tail lacks the field {name}", about="tail")
    return value
