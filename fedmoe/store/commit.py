"""An expert as an aggregator reads it, and the changes that it commits."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmoe.protocol.growth import Growth
from fedmoe.protocol.keys import ExpertKeys
from fedmoe.protocol.lines import Line
from fedmoe.protocol.records import Decided, Meta
from fedmoe.store.parts import NewWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An expert as one MULTI read it.

    Args:
        meta, decided: contents of the keys of these names.
        weights: the exact weights that meta means, a safetensors file: the snapshot with the tail folded into it.
        server_state: what the server optimizer remembers, None if there is none that belongs to these weights.
        vectors: worker -> its domain vector as stored.
        generation: number of the connection that read it.
        packed_commit: the commit of the packed weights, "" if there are none.
        logged_version: of the log's last line, -1 if there is none.
        claims: aggregator -> the version that it can write back because Redis lost it.
    """

    meta: Meta
    weights: bytes
    decided: dict[str, Decided]
    vectors: dict[str, str]
    generation: int
    packed_commit: str
    logged_version: int
    claims: dict[str, int]
    server_state: bytes | None = None

    @property
    def server_optimizer(self) -> str:
        """The server optimizer to which the state belongs, "" if there is none."""
        return self.meta.server_state if self.server_state is not None else ""


@dataclass(slots=True, kw_only=True)
class Commit:
    """The changes of one commit on top of the loaded state (commit id `on`, connection `generation`).

    `before`: the meta that was loaded. Only fields that differ from it are written; if it is None, all fields are.
    `weights`, `server_state`: a new snapshot; writing it removes the tail. `written`: its strings, if its parts were
    written before; None: the commit writes the parts, and removes them if it comes too late.
    `tail`: the records to add to the tail; `copies`: keys of the copied parts that they name; `begins_tail`: its fields
    so far, if there are any, are of another history.
    `vectors`: worker -> its domain vector as stored; "" removes it.
    """

    on: str
    generation: int
    meta: Meta
    before: Meta | None = None
    weights: memoryview | None = None
    server_state: memoryview | None = None
    written: NewWeights | None = None
    packed: memoryview | bytes | None = None
    tail: Mapping[str, str] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    begins_tail: bool = False
    decided: dict[str, Decided] = field(default_factory=dict)
    vectors: dict[str, str] = field(default_factory=dict)
    log: list[Line] = field(default_factory=list)
    dead: list[Line] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    unlink: list[str] = field(default_factory=list)

    @classmethod
    def on_top(cls, meta: Meta, generation: int) -> "Commit":
        """A commit without changes yet, on a state with this meta that was loaded over this connection."""
        return cls(on=meta.commit, generation=generation, meta=meta, before=meta)

    def add_to_tail(self, growth: Growth, keys: ExpertKeys) -> None:
        """Add what a batch adds to the tail, and remove its copies that are not needed."""
        self.tail = growth.fields
        self.begins_tail = bool(self.tail) and not (self.before and self.before.tail)
        self.copies = [key for copy in growth.kept for key in copy.keys(keys)]
        self.unlink += [
            key for copy in growth.made if copy not in growth.kept for key in copy.left_over(keys)
        ]
