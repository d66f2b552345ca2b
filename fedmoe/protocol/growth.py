"""What a batch of updates adds to the tail of an expert. Pure."""

from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.records import Meta
from fedmoe.protocol.server import ServerStep, has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.tail import Copy, Tail, TailRecord, quick_digest, record_field

# The weights are written once the tail outweighs them this many times. With 1, writing them costs as much as all
# updates together; with 2 half of that, for as much memory again (docs/decisions/snapshot-and-tail.md).
MOST_WEIGHTS = 2


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
        is_open: False once the weights are to be written instead: an update could not be copied, or the tail, or this
            batch, outweighs them.
        made: all copies of this batch. kept: those that the tail needs.
    """

    def __init__(self, meta: Meta, spec: Spec, *, is_wanted: bool = True) -> None:
        commit = meta.weights_commit
        self.tail = meta.tail or Tail(snapshot=commit, snapshot_version=meta.version, head=commit)
        self.fields: dict[str, str] = {}
        self.made: list[Copy] = []
        self.kept: list[Copy] = []
        self.is_open = is_wanted and spec.wire_format != EXACT
        self._weights_bytes = spec.layout.file_bytes
        self._added = 0

    def copy(self, token: str, n_parts: int) -> Copy | None:
        """A copy of an update, yet to be made; None if the tail needs none."""
        if not self.is_open:
            return None
        self.made.append(copy := Copy(token, n_parts))
        return copy

    def add(self, version: int, step: ServerStep, copy: Copy | None, *, rules: int, new_state: bool) -> None:
        """Add an applied update, which lies in this copy."""
        if copy is None or not copy.is_whole:
            self.close()
        if copy is None or not self.is_open:
            return
        before = self.tail
        record = TailRecord.of(version, step, copy, rules=rules, prev=before.head, new_state=new_state)
        text = record.to_json()
        n_bytes = len(text) + copy.n_bytes
        self._added += n_bytes
        self.tail = Tail(
            snapshot=before.snapshot,
            snapshot_version=before.snapshot_version,
            head=quick_digest(text.encode()),
            fields=before.fields + 1 + copy.count,
            n_bytes=before.n_bytes + n_bytes,
            state=before.state or _state_of(step, new_state),
        )
        self.fields[record_field(version)] = text
        self.kept.append(copy)
        if self._is_too_heavy():
            self.close()

    def _is_too_heavy(self) -> bool:
        most = self._weights_bytes
        return self._added > most or self.tail.n_bytes > MOST_WEIGHTS * most

    def close(self) -> None:
        """The weights are to be written: nothing is added to the tail."""
        self.is_open = False
        self.fields.clear()
        self.kept.clear()


def _state_of(step: ServerStep, new_state: bool) -> str:
    if not has_state(step.rules):
        return ""
    return "new" if new_state else "snapshot"
