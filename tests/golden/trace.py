"""A golden trace of an aggregation: the same updates give the same weights, to the bit, and the same log.

    spec.json, meta.json, start.safetensors   the expert at version 0
    updates/NAME                              an update as its worker published it: msgpack of [header, parts]
    steps.json                                what happens: batches of updates in stream order, and changes of rules
    out/weights.safetensors, out/trace.json   what comes of it: weights, log, dead letters, decisions and counts

All but `out/` stays as it is. Every factor here is a power of two: products are exact, and only sums round.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import torch

from consumers.expert import Expert
from fedmoe.protocol.codec import encode
from fedmoe.protocol.layout import AdapterBuffer, Layout, stamped
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header, Part, UpdateId, make_run
from fedmoe.store.change import change_rules
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.worker import WorkerStore
from tests.federation import FINGERPRINT, aggregating, first_meta, serve, small_spec

EXPERT = "sql_expert"
# What meta counts. Reasons are for people, and may be said otherwise: no trace holds their words.
COUNTS = (
    "version", "applied", "duplicate", "refused", "undecidable", "garbage", "staleness_sum", "n_examples", "n_tokens",
    "loss",
)  # fmt: skip


def play(connection: Connection, trace: Path) -> dict[str, bytes]:
    """Play a trace on an empty Redis through the aggregator's own code: the files of its `out/`."""
    spec = Spec.from_json((trace / "spec.json").read_text())
    stored = json.loads((trace / "meta.json").read_text())
    meta = Meta.from_hash({name.encode(): value.encode() for name, value in stored.items()})
    store = ExpertStore(connection, EXPERT)
    store.create(spec, meta, (trace / "start.safetensors").read_bytes(), gateway_weight=1.0)
    expert = Expert(store, spec, aggregator="golden")
    outcomes = []
    for step in json.loads((trace / "steps.json").read_text()):
        if rules := step.get("rules"):
            change_rules(store, rules)
            continue
        for name in step["batch"]:
            header, parts = msgpack.unpackb((trace / "updates" / name).read_bytes())
            WorkerStore(connection, EXPERT, name.split("-")[0]).publish(Header.unpack(header), parts)
        expert.load()
        outcomes.append(serve(expert))
    return {
        "weights.safetensors": stamped(store.load().weights, "golden"),
        "trace.json": _text({"outcomes": outcomes} | _trace(store)),
    }


def _trace(store: ExpertStore) -> dict[str, Any]:
    loaded = store.load()
    hashed = loaded.meta.to_hash()
    return {
        "log": _lines(store.connection, store.keys.log),
        "dead": [line | {"reason": ""} for line in _lines(store.connection, store.keys.dead)],
        "decided": {
            worker: json.loads(replace(one, reason="").to_json())
            for worker, one in sorted(loaded.decided.items())
        },
        "meta": {name: str(hashed[name]) for name in COUNTS},
        "rules": loaded.meta.rules.number,
    }


def _lines(connection: Connection, key: str) -> list[dict[str, str]]:
    return [
        {name.decode(): text.decode() for name, text in line.items()}
        for _, line in connection.client.xrange(key)
    ]


def _text(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


# ---- how the inputs of a new trace are made

LAYOUT = Layout.of([("a.lora_A.weight", (4, 40)), ("a.lora_B.weight", (33, 4))])
STEPS: list[dict[str, Any]] = [
    {"batch": ["alice-1", "bob-1"]},
    {"batch": ["alice-1", "carol-1", "bob-nan"]},
    {"rules": {"lr": 0.5, "max_staleness": 3, "decay": "hinge", "decay_a": 0.5, "decay_b": 1.0}},
    {"batch": ["bob-3", "alice-stale", "bob-gap", "carol-2"]},
    {"rules": {"decay": "constant", "max_norm": 2.0, "batch_size": 1, "max_length": 8}},
    {"batch": ["carol-far", "alice-claims", "bob-foreign"]},
]
# worker, seq, prev, base version, and what else its header says
UPDATES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "alice-1": (1, 0, 0, {}),
    "bob-1": (1, 0, 0, {}),  # stale by 1: half
    "carol-1": (1, 0, 1, {"loss": 0.1}),
    "bob-nan": (2, 1, 2, {}),
    "bob-3": (3, 2, 0, {}),  # stale by 3, and two above the hinge's b: half of lr
    "alice-stale": (2, 1, 0, {}),
    "bob-gap": (5, 4, 3, {}),
    "carol-2": (2, 1, 3, {}),
    "carol-far": (3, 2, 5, {}),
    "alice-claims": (3, 2, 5, {"n_examples": 2**53, "n_tokens": 2**53}),
    "bob-foreign": (4, 3, 5, {"spec": "0" * 16}),
}


def make_inputs(trace: Path) -> None:
    """Write the inputs of a new trace."""
    spec = small_spec(layout=LAYOUT, wire_format="int4")
    meta = first_meta(spec, rules=aggregating(lr=1.0), lineage="1" * 16, commit="2" * 16)
    (trace / "updates").mkdir(parents=True)
    (trace / "spec.json").write_text(spec.to_json())
    (trace / "meta.json").write_bytes(_text({name: str(value) for name, value in meta.to_hash().items()}))
    buffer = AdapterBuffer(LAYOUT)
    chance = torch.Generator().manual_seed(1)
    buffer.flat.copy_(torch.randn(LAYOUT.numel, generator=chance))
    (trace / "start.safetensors").write_bytes(buffer.file)
    for name, header, parts in _updates(meta, spec, chance):
        (trace / "updates" / name).write_bytes(msgpack.packb([header.pack(), parts]))
    (trace / "steps.json").write_bytes(_text(STEPS))


def _updates(meta: Meta, spec: Spec, chance: torch.Generator) -> Iterator[tuple[str, Header, list[bytes]]]:
    for name, (seq, prev, base_version, differs) in UPDATES.items():
        delta = torch.randn(LAYOUT.numel, generator=chance) * (9.0 if "far" in name else 0.1)
        if "nan" in name:
            delta[7] = torch.nan
        parts = [bytes(part) for part in encode(delta, spec.wire_format)]
        run = make_run(1, name.split("-")[0].encode().hex()[:8].ljust(8, "0"))
        header = Header(
            lineage=meta.lineage, spec=spec.digest, run=run, seq=seq, prev=UpdateId(run, prev) if prev else None,
            base_version=base_version, wire_format=spec.wire_format, base_fingerprint=FINGERPRINT, n_examples=4,
            n_tokens=40, steps=2, loss=1.0 / 3, position=str(4 * seq), parts=tuple(map(Part.of, parts)),
        )  # fmt: skip
        yield name, replace(header, **differs), parts
