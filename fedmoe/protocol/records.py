"""The records in an expert's hashes; their fields are plain text, readable with redis-cli."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedmoe.errors import ProtocolError, RemovedExpertError, SpecError
from fedmoe.protocol.features import COPIES, PARTS, TAIL, check_requires, with_feature
from fedmoe.protocol.fields import changed, from_text, optional, to_text
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.tail import Tail
from fedmoe.protocol.update import UpdateId
from fedmoe.protocol.validation import Curve
from fedmoe.protocol.weights_parts import WeightsParts

NO_DECISIONS = "0" * 16  # the stamp of no decided updates, see fedmoe/protocol/integrity.py
# The protocol version of this FedMoE. Raise it whenever an earlier release would misread a record of this one, also
# with the formats of header and spec; not for a field of `meta` that an earlier release can ignore.
# 2: headers name the tokenizer, specs may hold a chat template and towers, parts are stamped.
# 3: the keys and fields `decided`, `header`, `incarnation` and `aggregation` have these names.
# 4: the rules are in `meta` under a number, no longer in the spec.
PROTOCOL = 4
FIRST_WITH_RULES = 4  # in meta
FIRST_PROTOCOL = 1  # assumed where no protocol is named: the first releases wrote none
HEARTBEAT_TTL_S = 15.0  # a worker whose heartbeat has expired is gone
TRACE_TTL_S = 7 * 24 * 3600.0  # how long Redis keeps the trace of how a worker left
VANISHED = "vanished"  # how a worker left without notice: it was killed, or its machine was cut off


def read_protocol(raw: bytes | None) -> int:
    """The protocol that a stored field names.

    Raises:
        ProtocolError: if it is later than this FedMoE's protocol: this FedMoE must be upgraded.
        SpecError: if it is not a number.
    """
    try:
        protocol = FIRST_PROTOCOL if raw is None else int(raw)
    except ValueError as error:
        raise SpecError(
            f"field protocol of the expert's meta is {raw!r}, not a number: restore a backup (fedmoe restore "
            "--replace)",
            about="protocol",
        ) from error
    if protocol > PROTOCOL:
        raise ProtocolError(
            f"the expert speaks protocol {protocol} and the FedMoE on this machine protocol {PROTOCOL}: upgrade the "
            "FedMoE on this machine",
            about="protocol",
        )
    return protocol


def grave(name: str, commit: str, when: str) -> dict[str, str]:
    """The meta hash of an expert that an operator removed: a final commit, which no commit can follow."""
    return {"removed": when, "name": name, "commit": commit}


def check_not_removed(raw: Mapping[bytes, bytes]) -> None:
    """Raise RemovedExpertError if this meta hash says that an operator removed the expert."""
    if b"removed" in raw:
        name, when = (raw.get(field, b"?").decode(errors="replace") for field in (b"name", b"removed"))
        raise RemovedExpertError(name, when)


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """`fedmoe:{E}:meta`, the state of an expert.

    Args:
        version: number of updates ever applied, and of rollbacks.
        rolled_back: the rollbacks (see `fedmoe.protocol.rollback`); what was trained on their versions is refused.
        lineage: random id given at creation.
        commit: random id of the transaction that made this state: the head of the expert's chain.
        weights_commit: the last commit that changed the weights.
        tail: the version under the key `weights`, and the size and last record of the tail after it, as JSON (see
            `fedmoe.protocol.tail`); "" if the weights are of the weights commit.
        parts: the strings in which weights and server state lie, as JSON (see `fedmoe.protocol.weights_parts`); "" if
            each is one string.
        digests: quick digests of the weights, and of the server state if there is one, after the weights commit that
            they are of; "" if an earlier release wrote them.
        spec: digest of the spec.
        rules: the rule set in force, as JSON with its number (see `fedmoe.protocol.rules`).
        decided_stamp: stamp over the hash `decided`, which must match (integrity.py).
        restored: commit of the last `fedmoe restore`; "" if there was none.
        base_fingerprint: of the base model's weights; "" until a party (base_fingerprint_by) has pinned it.
        applied, duplicate, refused, undecidable, garbage: number of entries with this outcome.
        staleness_sum: over the applied updates; mean_staleness is derived from it.
        tokenizer: fingerprint of the base model's tokenizer and chat template, by component (see
            `protocol.identity`); a missing component is not pinned yet. tokenizer_by: who pinned them.
        chat_template: the first worker's, if neither spec nor base model has one (Jinja).
        reach: share of the base model's weights, without embeddings, that the adapter covers, 0 if unknown;
            not_reached: the largest parts of the rest.
        loss: training loss that the last applied update reported.
        n_examples, n_tokens: trained on, all applied updates together.
        updated_at: clock of the aggregator at the last commit (seconds since 1970); for people only.
        protocol: version that every writer to this expert must speak.
        round_version: version at which the present round of the server optimizer began (see `fedmoe.protocol.server`).
        server_state: the server optimizer whose state lies beside the weights, "" if there is none.
        software: releases that its last aggregator ran on (see `fedmoe.util.software`); for people only.
        knows: the features that its aggregators know and an update may require (see `fedmoe.protocol.features`).
        requires: the features that a reader of this expert must know.
    """

    lineage: str
    commit: str
    weights_commit: str
    spec: str
    rules: RuleSet = field(default_factory=RuleSet)
    decided_stamp: str = NO_DECISIONS
    restored: str = ""
    version: int = 0
    base_model: str = ""
    base_fingerprint: str = ""
    base_fingerprint_by: str = ""
    applied: int = 0
    duplicate: int = 0
    refused: int = 0
    undecidable: int = 0
    garbage: int = 0
    staleness_sum: int = 0
    loss: float = float("nan")
    n_examples: int = 0
    n_tokens: int = 0
    created_at: float = 0.0
    updated_at: float = 0.0
    aggregator: str = ""
    tokenizer: str = ""
    tokenizer_by: str = ""
    chat_template: str = ""
    reach: float = 0.0
    not_reached: str = ""
    protocol: int = optional(FIRST_PROTOCOL)
    round_version: int = optional(0)
    server_state: str = optional("")
    software: str = optional("")
    knows: str = optional("")
    requires: str = optional("")
    rolled_back: RolledBack = field(default=RolledBack(), metadata={"optional": True})
    tail: Tail = field(default=Tail(), metadata={"optional": True})
    parts: WeightsParts = field(default=WeightsParts(), metadata={"optional": True})
    digests: str = optional("")

    @property
    def snapshot_commit(self) -> str:
        """The commit whose weights lie under the key `weights`."""
        return self.tail.snapshot or self.weights_commit

    def with_tail(self, tail: Tail) -> "Meta":
        """The same state with this tail; without one (`Tail()`), the weights are of the weights commit."""
        requires = with_feature(with_feature(self.requires, TAIL, bool(tail)), COPIES, bool(tail))
        return replace(self, tail=tail, requires=requires)

    def with_snapshot(self, weights: bytes | memoryview) -> "Meta":
        """The same state, whose commit writes this file of weights: without a tail, and in parts if it is long."""
        return self.with_parts(WeightsParts.of(self.commit, weights)).with_tail(Tail())

    def in_one_string(self) -> "Meta":
        """The same state with the exact weights in one string, as backups hold it: without tail and parts."""
        return self.with_parts(WeightsParts()).with_tail(Tail())

    def with_parts(self, parts: WeightsParts) -> "Meta":
        """The same state, whose weights lie in these parts; without them (`WeightsParts()`), in one string."""
        return replace(self, parts=parts, requires=with_feature(self.requires, PARTS, bool(parts)))

    @property
    def mean_staleness(self) -> float:
        """Mean staleness of the applied updates (0 if there are none)."""
        return self.staleness_sum / self.applied if self.applied else 0.0

    def to_hash(self) -> dict[str, str]:
        """The fields as Redis stores them."""
        return to_text(self) | self._derived

    def changes(self, before: "Meta") -> dict[str, str]:
        """The fields of `to_hash` that may differ from those of `before`."""
        return changed(self, before) | self._derived

    @property
    def _derived(self) -> dict[str, str]:
        return {"mean_staleness": f"{self.mean_staleness:.6g}"}

    @classmethod
    def from_hash(cls, raw: Mapping[bytes, bytes]) -> "Meta":
        """Parse what HGETALL gave.

        Raises:
            ProtocolError: if this FedMoE is too old for it.
            SpecError: if a field is missing or malformed.
            RemovedExpertError: if an operator removed the expert.
        """
        check_not_removed(raw)
        protocol = read_protocol(raw.get(b"protocol"))
        check_requires(raw.get(b"requires", b"").decode(errors="replace"), "the expert")
        try:
            return from_text(cls, raw)
        except ProtocolError:
            raise
        except (KeyError, ValueError, TypeError) as error:
            if protocol < FIRST_WITH_RULES:
                raise ProtocolError(
                    f"the expert has protocol {protocol}, the FedMoE on this machine reads protocol {PROTOCOL}: serve "
                    "it with the FedMoE that made it, or remove it (fedmoe expert remove)",
                    about="protocol",
                ) from error
            raise SpecError(
                f"the expert's meta hash is malformed ({error!r}); was it edited by hand?", about="meta"
            ) from error


def reach_text(reach: float, not_reached: str) -> str:
    """For people: 23% of the weights, embeddings not counted; not covered: mlp.experts.gate_up_proj (50%)."""
    rest = f"; not covered: {not_reached}" if not_reached else ""
    return f"{reach:.0%} of the weights, embeddings not counted{rest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A worker's last decided update, as `fedmoe:{E}:decided` holds it: the head of the worker's chain.

    With it, `validation` is the summary of the worker's validation losses (JSON), "" if it has published none.

    The stamp in meta covers this record, and every release must compute the same stamp. So a new field is written only
    if it is not empty, and fields of a later FedMoE are kept in `unknown` (JSON).
    """

    id: UpdateId
    how: str  # "applied" or "refused"
    version: int  # of the expert after it
    staleness: int = 0
    reason: str = ""
    position: str = ""
    validation: str = ""
    unknown: str = ""

    @property
    def curve(self) -> Curve | None:
        """The summary of the worker's validation losses; None if there is none, or it cannot be read."""
        return Curve.from_json(self.validation)

    def to_json(self, *, canonical: bool = False) -> str:
        """The record as Redis stores it; canonical: with sorted fields, so that every release gives the same text."""
        content = {"run": self.id.run, "seq": self.id.seq, "how": self.how, "version": self.version}
        content |= {"staleness": self.staleness, "reason": self.reason, "position": self.position}
        if self.validation:
            content["validation"] = json.loads(self.validation)
        return json.dumps(content | json.loads(self.unknown or "{}"), sort_keys=canonical)

    @classmethod
    def from_json(cls, text: bytes) -> "Decided":
        """Parse a stored record.

        Raises:
            SpecError: if it is malformed.
        """
        try:
            content = json.loads(text)
            ours = {"how", "version", "staleness", "reason", "position"}
            validation = content.pop("validation", None)
            unknown = {name: value for name, value in content.items() if name not in ours | {"run", "seq"}}
            return cls(
                id=UpdateId(content["run"], content["seq"]),
                validation=json.dumps(validation, sort_keys=True) if validation else "",
                unknown=json.dumps(unknown, sort_keys=True) if unknown else "",
                **{name: value for name, value in content.items() if name in ours},
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SpecError(
                f"an entry of the decided hash is malformed ({error!r})", about="decided"
            ) from error


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of the updates stream: an untrusted doorbell."""

    id: str
    fields: dict[str, str]

    @property
    def ms(self) -> int:
        """The id's first half: the server's clock (ms) when the entry was added, or a number its writer chose."""
        return int(self.id.partition("-")[0])

    @classmethod
    def of(cls, entry_id: bytes, raw: Mapping[bytes, bytes] | None) -> "Entry":
        """Decode an entry from Redis; bytes that are not UTF-8 are escaped, a deleted entry has no fields."""
        pairs = (raw or {}).items()
        return cls(
            entry_id.decode(),
            {k.decode(errors="backslashreplace"): v.decode(errors="backslashreplace") for k, v in pairs},
        )
