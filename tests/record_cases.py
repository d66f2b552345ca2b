"""One of each record, with every field set: how it is stored, and how it is read again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import torch

from fedmoe.errors import FedMoEError, ProtocolError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.codec import cut
from fedmoe.protocol.doorbell import Doorbell, Join, parse_entry
from fedmoe.protocol.fit import Fit
from fedmoe.protocol.lines import AnchorLine, AppliedLine, DeadLetter, RollbackLine, RulesLine, read_line
from fedmoe.protocol.merged import BuiltFrom, MergedMeta, built_from_text
from fedmoe.protocol.records import Decided, Entry, Meta
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import ForeignHeaderError, Header, Part, UpdateId
from producers.checkpoint import Checkpoint, StateDir
from producers.ledger import Ledger, Trained
from tests.federation import first_meta, small_spec

SPEC = small_spec()
RULES = RuleSet(number=2, aggregation=AggregationRules(lr=0.5, max_staleness=7), sync_interval_s=30.0)
HEADER = Header(
    lineage="l", spec="s", run="1-0123abcd", seq=2, prev=UpdateId("1-0123abcd", 1), base_version=3, wire_format="fp32",
    base_fingerprint="f", n_examples=4, n_tokens=5, steps=6, loss=0.5, position="7", parts=(Part(1, bytes(32)),),
    tokenizer="template:ab",
)  # fmt: skip
APPLIED = AppliedLine(
    version=1, worker="w", run="1-0123abcd", seq=1, base_version=0, staleness=0, factor=0.1 + 0.2, norm=1.5, loss=2.5,
    n_examples=4, rules=2, prev="1-0123abcd:1", claimed_examples=9, claimed_tokens=9, update="digest",
)  # fmt: skip
DECIDED = Decided(
    id=UpdateId("1-0123abcd", 1), how="refused", version=3, staleness=1, reason="r", position="4"
)
GATEWAY = MergedMeta(
    built_from=built_from_text({"a": BuiltFrom(3, "c")}), adapter_config='{"r": 8}', method="cat", settings="s", rank=8,
    relative_error=0.5, updated_at=1.5, build_s=0.25, error="e", software="fedmoe 1",
)  # fmt: skip
FIT = Fit(
    weights='{"a": [0.5, 1.0]}', fitted_on='{"a": {"version": 3, "weights_commit": "c", "lineage": "l"}}',
    data='{"a": {"rows": 64, "digest": "d"}}', loss=1.5, before='{"base": 2.5}', fitted_at=1.5, software="fedmoe 1",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A record, its fields as they are stored, and how they are read."""

    record: Any
    stored: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], Any]
    refusal: type[FedMoEError] | None = ProtocolError  # of one that requires what nobody here knows


def _unpacked(content: Mapping[str, Any]) -> Header:
    return Header.unpack(msgpack.packb(dict(content)))


def _entry(content: Mapping[str, Any]) -> Any:
    return parse_entry(Entry("1-1", {name: str(value) for name, value in content.items()}))


def _beginning(content: Mapping[str, Any]) -> dict[bytes, bytes]:
    return {name.encode(): str(value).encode() for name, value in content.items()}


META = first_meta(
    SPEC, rules=RULES, lineage="1" * 16, commit="2" * 16, weights_commit="3" * 16, decided_stamp="4" * 16,
    restored="5" * 16, version=7, base_model="base", base_fingerprint="f", base_fingerprint_by="worker w", applied=7,
    duplicate=1, refused=2, undecidable=3, garbage=4, staleness_sum=9, loss=1.5, n_examples=40, n_tokens=400,
    created_at=1.5, updated_at=2.5, aggregator="a", tokenizer="template:ab", tokenizer_by="worker w",
    chat_template="{{ m }}", reach=0.5, not_reached="mlp", software="fedmoe 1", knows="a b",
)  # fmt: skip
CASES = {
    "header": Case(HEADER, msgpack.unpackb(HEADER.pack()), _unpacked, ForeignHeaderError),
    "meta": Case(META, META.to_hash(), lambda content: Meta.from_hash(_beginning(content))),
    "spec": Case(SPEC, json.loads(SPEC.to_json()), lambda content: Spec.from_json(json.dumps(content))),
    "decided": Case(
        DECIDED, json.loads(DECIDED.to_json()), lambda content: Decided.from_json(json.dumps(content).encode()), None
    ),
    "applied": Case(APPLIED, APPLIED.to_fields(), read_line),
    "anchor": Case(
        anchor := AnchorLine(version=3, restored="why", weights="digest"), anchor.to_fields(), read_line
    ),
    "rollback": Case(
        back := RollbackLine(version=8, rolled_back_to=5, by="user@host", weights="digest"), back.to_fields(), read_line
    ),
    "rules": Case(
        change := RulesLine(version=3, changed="lr 1 -> 0.5", ended=RULES), change.to_fields(), read_line
    ),
    "rule set": Case(
        RULES, json.loads(RULES.to_json()), lambda content: RuleSet.from_json(json.dumps(content))
    ),
    "dead letter": Case(
        letter := DeadLetter(reason="r", worker="w", run="1-0123abcd", seq=1, loss=0.5, n_examples=4),
        letter.to_fields(), DeadLetter.read, None,
    ),
    "update entry": Case(
        Doorbell(worker="w", run="1-0123abcd", seq=2), Doorbell.of(HEADER, "w").to_fields(), _entry, None
    ),
    "join entry": Case(
        Join(worker="w"), Join(worker="w", software="fedmoe 1").to_fields(), _entry, None
    ),
    "heartbeat": Case(
        beat := Beat(run="1-0123abcd", host="h", pid=3, loss=0.5, software="fedmoe 1"),
        beat.to_fields(), Beat.read, None,
    ),
    "gateway": Case(GATEWAY, GATEWAY.to_fields(), MergedMeta.read),
    "fit": Case(FIT, FIT.to_fields(), Fit.read),
}  # fmt: skip

CHECKPOINT_WORKER = "alice"


def make_checkpoint(directory: Path) -> Checkpoint:
    """Write a checkpoint with a decided update, one that waits, and training that is in neither."""
    numel = SPEC.layout.numel
    ledger = Ledger(
        base=torch.arange(numel) * 1.0, meta=META, run="1-0123abcd", start=UpdateId("1-0123abcd", 4), seq=4
    )
    for amount in (1.0, 2.0):
        ledger.make_update(
            cut(torch.full((numel,), amount), SPEC.wire_format),
            Trained(n_examples=4, n_tokens=40, steps=2, loss_sum=3.0, position="8"), fingerprint="f",
            tokenizer="template:ab",
        )  # fmt: skip
    ledger.kept = [ledger.queue.pop(0)]
    checkpoint = Checkpoint(
        ledger=ledger, local=torch.arange(numel) * 2.0, optimizer={"step": torch.tensor(3.0)},
        trained=Trained(n_examples=1, n_tokens=2, steps=3, loss_sum=4.0, position="9"), position=12, data="digest",
        expert="sql_expert", worker=CHECKPOINT_WORKER,
    )  # fmt: skip
    state_dir = StateDir(directory)
    state_dir.save(checkpoint)
    state_dir.close()
    return checkpoint
