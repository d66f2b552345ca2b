"""What a federation needs of memory, disk and network, by one formula. Pure.

    n   values of one adapter               w = 4 n     the weights, in fp32, and their file's header
    E   experts that workers train          u           an update in the wire format
    G   1 if the gateway is trained too     p           the weights as workers pull them: u, in format fp32 w
                                            t           the tail: 2 w at most, in format fp32 0
    M   memberships: the workers, twice     s           server state: w, with the optimizer sgd 0
        if they train expert and gateway    m           the merged gateway: E w with `cat`, else w
    Values above 512 MiB lie in parts; while w, s or m is written in parts, Redis holds it twice.

    r   updates a second: M / sync interval             g   rebuilds of it a second: at most r, and one each interval

An aggregator has the experts that it serves in memory. With several aggregators, the one that builds the merged gateway
also reads the experts of the others from Redis, at most g E (w + s + t / 2).

The constants are what a real federation showed; tests/e2e/test_plan.py compares the formula with one.
"""

from dataclasses import dataclass

from fedmoe.protocol.codec import part_lengths
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.growth import MOST_WEIGHTS
from fedmoe.protocol.layout import FLOAT_BYTES
from fedmoe.protocol.weights_parts import PART_BYTES, WHOLE_BYTES

HEADER_BYTES = 1000  # of an update, beside its parts
FILE_HEADER_BYTES = 32 * 1024  # of a file of weights, with the names and shapes of its tensors
LOG_LINES, LOG_LINE_BYTES = 100_000, 110  # of a log that is full; older lines are removed
SERVER_BYTES = 4 * 2**20  # Redis without data, with its connections
KEPT_S, KEPT_BYTES = 60.0, 256 * 2**20  # decided updates that a worker keeps (producers/ledger.py)
REWRITE_BYTES = 2**30  # size from which ops/redis.conf lets Redis rewrite its append-only file
DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A federation to plan.

    Args:
        values: of one adapter.
        experts: number of domains. trained_gateway: the gateway is an expert, too.
        memberships: workers, each counted for every expert that it trains.
        wire_format: of updates and pulls. sync_interval_s: between two updates of a worker.
        has_server_state: the server optimizer is not sgd.
        is_cat: the merged gateway is as large as all experts together. gateway_interval_s: between two rebuilds of it.
        keep: backups that are kept.
    """

    values: int
    experts: int
    trained_gateway: bool
    memberships: int
    wire_format: str
    sync_interval_s: float
    has_server_state: bool
    is_cat: bool
    gateway_interval_s: float
    keep: int

    @property
    def weights(self) -> int:
        """Bytes of an expert's weights."""
        return self.values * FLOAT_BYTES + FILE_HEADER_BYTES

    @property
    def update(self) -> int:
        """Bytes of an update."""
        return sum(part_lengths(self.values, self.wire_format)) + HEADER_BYTES

    @property
    def pull(self) -> int:
        """Bytes that a worker pulls."""
        return self.weights if self.wire_format == EXACT else self.update - HEADER_BYTES

    @property
    def tail(self) -> int:
        """Bytes of an expert's tail at most."""
        return 0 if self.wire_format == EXACT else MOST_WEIGHTS * self.weights

    @property
    def commit(self) -> float:
        """Bytes that a commit of one update writes, on average: its tail fills up, and then the weights are written.

        The tail's copy of the update costs nothing: Redis makes it, by one short command.
        """
        whole = self.weights + self.state
        return self.pull + whole * self.update / self.tail if self.tail else whole

    @property
    def all_experts(self) -> int:
        """The experts, and the trained gateway."""
        return self.experts + self.trained_gateway

    @property
    def state(self) -> int:
        """Bytes of an expert's server state."""
        return self.weights if self.has_server_state else 0

    @property
    def merged(self) -> int:
        """Bytes of the merged gateway."""
        return self.weights * (self.experts if self.is_cat else 1)

    @property
    def updates_per_s(self) -> float:
        """Updates a second, of all workers."""
        return self.memberships / self.sync_interval_s

    @property
    def rebuilds_per_s(self) -> float:
        """Rebuilds of the merged gateway a second."""
        return min(1 / self.gateway_interval_s, self.updates_per_s)


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a sum. `part`: memory, in, out, disk; `formula`: as in the head of this file; `amount`: bytes."""

    part: str
    name: str
    formula: str
    amount: float


MEMORY, IN, OUT, DISK = PARTS = ("memory", "in", "out", "disk")


def allocated(n_bytes: int) -> int:
    """The memory that Redis's allocator takes for a string: its sizes are four in each doubling, from 16 KiB on."""
    if n_bytes <= 16 * 1024:
        return n_bytes
    step = 1 << ((n_bytes - 1).bit_length() - 3)
    return -(-n_bytes // step) * step


def stored(n_bytes: int) -> int:
    """The memory that Redis takes for weights: one string, or parts."""
    if n_bytes <= WHOLE_BYTES:
        return allocated(n_bytes)
    parts, rest = divmod(n_bytes, PART_BYTES)
    return parts * allocated(PART_BYTES) + allocated(rest)


def _while_written(shape: Shape) -> list[Term]:
    """The second copies of what lies in parts, while all of it is written again; none if nothing does."""
    values = [(shape.weights, shape.all_experts), (shape.state, shape.all_experts), (shape.merged, 1)]
    amount = sum(number * stored(n_bytes) for n_bytes, number in values if n_bytes > WHOLE_BYTES)
    return [Term(MEMORY, "parts, while written again", "(E+G) (w + s) + m, if above 512 MiB", amount)] * bool(
        amount
    )


def terms(shape: Shape) -> list[Term]:
    """All terms: memory and disk in bytes, network in bytes a second, as Redis sees it (`in` is what it receives)."""
    every, members, rate, rebuilds = (
        shape.all_experts,
        shape.memberships,
        shape.updates_per_s,
        shape.rebuilds_per_s,
    )
    weights, update, pull, state, merged = shape.weights, shape.update, shape.pull, shape.state, shape.merged
    packed = 0 if shape.wire_format == EXACT else update
    parts = sum(map(allocated, part_lengths(shape.values, shape.wire_format)))
    memory = [
        Term(MEMORY, "weights", "(E+G) w", every * stored(weights)),
        Term(MEMORY, "tails, when full", "(E+G) t", every * shape.tail),
        Term(MEMORY, "packed weights", "(E+G) p, in fp32 0", every * allocated(packed)),
        Term(MEMORY, "server state", "(E+G) s", every * stored(state)),
        Term(MEMORY, "merged gateway", "m", stored(merged)),
        *_while_written(shape),
        Term(MEMORY, "undecided updates", "M u", members * (parts + HEADER_BYTES)),
        Term(MEMORY, "replies in flight", "M p", members * pull),
        Term(MEMORY, "logs, when full", "(E+G) 11 MB", every * LOG_LINES * LOG_LINE_BYTES),
        Term(MEMORY, "the server itself", "4 MiB", SERVER_BYTES),
    ]
    received = [
        Term(IN, "updates, from workers", "r u", rate * update),
        Term(
            IN,
            "commits, from the aggregator",
            "r (p + (w + s) u / t), in fp32 r (w + s)",
            rate * shape.commit,
        ),
        Term(IN, "merged gateway, from the aggregator", "g m", rebuilds * merged),
    ]
    sent = [
        Term(OUT, "pulls, to workers", "r p", rate * pull),
        Term(OUT, "updates, to the aggregator", "r u", rate * update),
    ]
    data = total(memory, MEMORY) - members * pull
    disk = [
        Term(DISK, "Redis: append-only file and its rewrite", "max(1 GiB, 2 data) + data",
             max(REWRITE_BYTES, 2 * data) + data),
        Term(DISK, "Redis: written a day", "in, for a day", total(received, IN) * DAY_S),
        Term(DISK, "backups", "(keep + 1) (E+G) (w + s)", (shape.keep + 1) * every * (weights + state)),
        Term(DISK, "workers: checkpoints, old and new", "2 M (3 w + p)", 2 * members * (3 * weights + pull)),
        Term(DISK, "workers: updates of the last minute", "M u (1 + 60 s / sync interval)",
             members * (update + max(update, min(KEPT_BYTES, update * KEPT_S / shape.sync_interval_s)))),
        Term(DISK, "aggregator: updates kept a day (--keep-updates)", "r u, for a day", rate * update * DAY_S),
    ]  # fmt: skip
    return [*memory, *received, *sent, *disk]


def total(of: list[Term], part: str) -> float:
    """The sum of a part's terms."""
    return sum(term.amount for term in of if term.part == part)
