"""What a batch of updates adds to the tail of an expert. Pure."""

from collections.abc import Sequence

from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.packed import packed_bytes
from fedmoe.protocol.records import Meta
from fedmoe.protocol.server import ServerStep, has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.tail import Tail, TailRecord, part_field, quick_digest, record_field

# The weights are written once the tail outweighs them this many times. With 1, writing them costs as much as all
# updates together; with 2 half of that, for as much memory again (docs/decisions/snapshot-and-tail.md).
MOST_WEIGHTS = 2
# A server closes a connection that queues more than 1 GiB in a MULTI (client-query-buffer-limit); the rest is for logs.
TRANSACTION_BYTES = 896 * 2**20


class Growth:
    """What a batch adds to an expert's tail until its commit.

    In format fp32 experts have no tail: an update weighs as much as the weights.

    Args:
        meta: of the expert before the batch.
        spec: of the expert.
        is_wanted: False if the weights are to be written in any case.

    Attributes:
        tail: what meta says after the commit.
        fields: of the hash, to be written.
        is_open: False once the weights are to be written instead: the tail, or this batch, outweighs them, or the batch
            does not fit into one transaction.
    """

    def __init__(self, meta: Meta, spec: Spec, *, is_wanted: bool = True) -> None:
        commit = meta.weights_commit
        self.tail = meta.tail or Tail(snapshot=commit, snapshot_version=meta.version, head=commit)
        self.fields: dict[str, str | bytes] = {}
        self.is_open = is_wanted and spec.wire_format != EXACT
        self._weights_bytes = spec.layout.file_bytes
        self._most_added = (
            min(self._weights_bytes, TRANSACTION_BYTES - packed_bytes(spec)) if self.is_open else 0
        )
        self._added = 0

    def add(
        self, version: int, step: ServerStep, parts: Sequence[bytes], *, rules: int, new_state: bool
    ) -> None:
        """Add an applied update; its parts are kept until the commit, unless the weights are to be written."""
        if not self.is_open:
            return
        before = self.tail
        record = TailRecord.of(version, step, parts, rules=rules, prev=before.head, new_state=new_state)
        text = record.to_json()
        n_bytes = len(text) + sum(map(len, parts))
        self._added += n_bytes
        self.tail = Tail(
            snapshot=before.snapshot,
            snapshot_version=before.snapshot_version,
            head=quick_digest(text.encode()),
            fields=before.fields + 1 + len(parts),
            n_bytes=before.n_bytes + n_bytes,
            state=before.state or _state_of(step, new_state),
        )
        self.fields[record_field(version)] = text
        self.fields |= {part_field(version, index): part for index, part in enumerate(parts)}
        if self._is_too_heavy():
            self.close()

    def _is_too_heavy(self) -> bool:
        return self._added > self._most_added or self.tail.n_bytes > MOST_WEIGHTS * self._weights_bytes

    def close(self) -> None:
        """The weights are to be written: forget what was kept for the tail."""
        self.is_open = False
        self.fields.clear()


def _state_of(step: ServerStep, new_state: bool) -> str:
    if not has_state(step.rules):
        return ""
    return "new" if new_state else "snapshot"
