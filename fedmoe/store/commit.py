"""An expert as an aggregator reads it, and the changes that it commits."""

from dataclasses import dataclass, field

from fedmoe.protocol.lines import Line
from fedmoe.protocol.records import Decided, Meta


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An expert as one MULTI read it.

    Args:
        meta, weights, decided: contents of the keys of these names; they belong together.
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

    `vectors`: worker -> its domain vector as stored; "" removes it.
    """

    on: str
    generation: int
    meta: Meta
    weights: memoryview | None = None
    server_state: memoryview | None = None
    packed: bytes | None = None
    decided: dict[str, Decided] = field(default_factory=dict)
    vectors: dict[str, str] = field(default_factory=dict)
    log: list[Line] = field(default_factory=list)
    dead: list[Line] = field(default_factory=list)
    entries: list[str] = field(default_factory=list)
    unlink: list[str] = field(default_factory=list)
