"""A federation at one moment, as `fedmoe status` and dashboards show it, with the problems found. Pure.

Every text in these records is printable: texts from Redis are escaped when they are read.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

from fedmoe.protocol.eviction import eviction_threat
from fedmoe.protocol.merged_view import MergedView
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TRAIN_GATEWAY
from fedmoe.protocol.validation import Curve
from fedmoe.util.text import printable

# Two missed heartbeats; after HEARTBEAT_TTL_S the key expires and the worker is gone.
QUIET_AFTER_S = 10.0
STILL_AFTER_S = 600.0  # no update for this long, although workers run, is a finding
NEWS_FOR_S = 24 * 3600.0  # a vanished or failed worker stays a finding for this long
MEMORY_ALARM = 0.8
CERTIFICATE_ALARM_S = 21 * 24 * 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker's heartbeat; None marks a missing field.

    Args:
        last_seen_s: seconds since the heartbeat, derived from the key's expiry, so that no two clocks are compared.
        since: when the worker began, by its own clock (seconds since 1970).
        base_version: of the expert, as the worker last pulled it; behind: updates applied since.
        software: the releases it runs on.
        staleness: of its last decided update.
        in_flight: number of its undecided update, 0 for none.
    """

    expert: str
    name: str
    last_seen_s: float | None = None
    since: float | None = None
    run: str = ""
    host: str = ""
    pid: int | None = None
    software: str = ""
    step: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    base_version: int | None = None
    behind: int | None = None
    staleness: int | None = None
    in_flight: int | None = None
    published: int | None = None
    refused: int | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GoneWorker:
    """A worker that has left.

    Args:
        how: finished, stopped, refused or failed (with the reason), vanished without notice, "" if unknown.
        ago_s: seconds since it left (vanished: since its last heartbeat); None if unknown.
    """

    name: str
    how: str = ""
    reason: str = ""
    host: str = ""
    ago_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterView:
    """A refused update, or garbage (`worker` is then empty), with the reason."""

    id: str
    worker: str
    seq: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveView:
    """The validation losses of an active worker: the best, the newest, and how they compare, in a word or two."""

    worker: str
    rows: int
    best: float
    best_version: int
    last: float
    last_version: int
    trend: str
    is_worse: bool = False

    @classmethod
    def of(cls, worker: str, curve: Curve) -> "CurveView":
        """Show a worker's curve."""
        return cls(
            worker=worker, rows=curve.rows, best=curve.best, best_version=curve.best_version, last=curve.last,
            last_version=curve.last_version, trend=curve.trend, is_worse=curve.is_worse,
        )  # fmt: skip

    def __str__(self) -> str:
        at = f"{self.worker} {self.last:.4f} at version {self.last_version}"
        if self.last_version == self.best_version:
            return f"{at}, its best"
        return f"{at}, {self.trend} ({self.best:.4f} at version {self.best_version})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertView:
    """One expert; None marks a value that could not be read, and `problems` gives the reason.

    Args:
        waiting: entries on the stream, read or not.
        pending: entries that an aggregator has read but not committed; lag: entries not read yet.
        lease: the lease holder; "" if there is none.
        left: workers that have left.
        last_update_s: seconds since the last update was applied, by the server's clock.
        log: the last applied updates, newest first.
        curves: the validation losses of the active workers; best_version: of the expert, by these losses.
    """

    name: str
    gateway_weight: float | None = None
    meta: Meta | None = None
    weights_bytes: int | None = None
    waiting: int | None = None
    pending: int | None = None
    lag: int | None = None
    lease: str | None = None
    workers: tuple[WorkerView, ...] = ()
    left: tuple[GoneWorker, ...] = ()
    last_update_s: float | None = None
    dead: int | None = None
    last_dead: tuple[DeadLetterView, ...] = ()
    log: tuple[dict[str, str], ...] = ()
    curves: tuple[CurveView, ...] = ()
    best_version: int | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorView:
    """A living aggregator, as its heartbeat tells.

    Args:
        serves: the experts (or `merged`, the merged gateway) that it serves; overdue: those that it serves too slowly.
        limit: the most experts that it takes, None without a limit.
        since: when it started, by its own clock (seconds since 1970).
    """

    name: str
    serves: tuple[str, ...] = ()
    overdue: tuple[str, ...] = ()
    limit: int | None = None
    since: float = 0.0
    software: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerView:
    """The server, for example Redis 7.0.15; memory in bytes; max_memory 0 means no bound, None means unknown.

    Args:
        persists: False if its last write to disk (RDB or AOF) failed.
        certificate_ends: when its certificate or the CA's ends (seconds since 1970), None without TLS.
        certificate_left_s: seconds until then, by the clock of this machine.
        latency_s: time of one round trip, as just measured.
        clients: connections to it; uptime_s: since its start.
        is_aof_on: it writes an append-only file.
        saved_s: seconds since its last snapshot; unsaved: changes since then.
    """

    url: str
    software: str = "Redis"
    used_memory: int | None = None
    max_memory: int | None = None
    policy: str | None = None
    persists: bool | None = None
    certificate_ends: float | None = None
    certificate_left_s: float | None = None
    latency_s: float | None = None
    clients: int | None = None
    uptime_s: int | None = None
    is_aof_on: bool | None = None
    saved_s: float | None = None
    unsaved: int | None = None

    @property
    def memory_share(self) -> float:
        """Used share of max_memory, 0 if there is no bound."""
        return (self.used_memory or 0) / self.max_memory if self.max_memory else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """Everything that `fedmoe status` shows.

    Args:
        read_at: the server's clock then (seconds since 1970).
        sees_workers: False if this user may not look for workers, so that none are known.
    """

    prefix: str
    server: ServerView
    experts: tuple[ExpertView, ...]
    merged: MergedView
    aggregators: tuple[AggregatorView, ...] = ()
    problems: tuple[str, ...] = ()
    read_at: float = 0.0
    sees_workers: bool = True

    @property
    def workers(self) -> list[WorkerView]:
        """All workers that are alive."""
        return [worker for expert in self.experts for worker in expert.workers]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: NaN and infinity become None, and problems are listed under `findings`."""
        content: dict[str, Any] = plain_json(self)
        for shown, expert in zip(content["experts"], self.experts, strict=True):
            shown["mean_staleness"] = expert.meta.mean_staleness if expert.meta else None
        return content | {"findings": list(findings(self))}


def findings(federation: Federation) -> Iterator[str]:
    """What the operator should look at, one sentence each."""
    yield from federation.problems
    if not federation.experts and not federation.problems:
        yield "there are no experts yet: start `fedmoe aggregator run`"
    for expert in federation.experts:
        yield from _of_expert(expert)
    if lacking := no_gateway({expert.name: expert.meta for expert in federation.experts}):
        yield lacking
    yield from federation.merged.findings()
    for one in federation.aggregators:
        if one.limit is not None:
            slow = f" (overdue: {', '.join(one.overdue)})" if one.overdue else ""
            yield (
                f"aggregator {one.name} could not keep up{slow} and serves at most "
                f"{_count(one.limit, 'expert', 'experts')}: start one more, on a machine with free cores"
            )
    yield from _of_server(federation.server)


def no_gateway(metas: Mapping[str, Meta | None]) -> str:
    """A sentence if some of all these experts have rules to train a gateway that is not among them; else ""."""
    names = [name for name, meta in metas.items() if meta and TRAIN_GATEWAY in meta.rules.trained]
    if GATEWAY in metas or not names:
        return ""
    return (
        f"{', '.join(names)}: by the rule train the workers train the gateway, but there is none: change the rule "
        f"(fedmoe expert set {names[0] if len(names) == 1 else 'NAME'} --train expert), or create a gateway (fedmoe "
        f"expert add {GATEWAY})"
    )


def _of_expert(expert: ExpertView) -> Iterator[str]:
    yield from (f"{expert.name}: {problem}" for problem in expert.problems)
    if expert.lease == "":
        waiting = f"{_count(expert.waiting, 'entry', 'entries')} waiting and " if expert.waiting else ""
        yield f"{expert.name}: {waiting}no aggregator serves it: start `fedmoe aggregator run`"
    held = expert.meta.rules.held if expert.meta else ""
    if held:
        yield (
            f"{expert.name}: held, its updates wait: {printable(held)}; look at the workers' data, go back to a better "
            f"version if need be, then `fedmoe expert release {expert.name}`"
        )
    yield from (
        f"{expert.name}: the validation loss is worse: {one}" for one in expert.curves if one.is_worse
    )
    if (expert.last_update_s or 0.0) > STILL_AFTER_S and expert.workers and not held:
        yield (
            f"{expert.name}: the last update was applied {duration(expert.last_update_s)} ago, although "
            f"{_count(len(expert.workers), 'worker runs', 'workers run')}: see the logs of workers and aggregator"
        )
    if expert.last_dead:
        last = expert.last_dead[0]
        who = f"{last.worker} update {last.seq}" if last.worker else f"entry {last.id}"
        yield f"{expert.name}: {_refusals(expert)}; the last: {who}: {last.reason}"
    for worker in expert.workers:
        if worker.last_seen_s is not None and worker.last_seen_s > QUIET_AFTER_S:
            yield f"{expert.name}: worker {worker.name} has not been heard of for {worker.last_seen_s:.0f} s"
        if worker.problem:
            yield f"{expert.name}: worker {worker.name}: {worker.problem}"
    for gone in expert.left:
        if gone.how in ("vanished", "failed", "refused") and (gone.ago_s or 0.0) < NEWS_FOR_S:
            yield f"{expert.name}: {left_line(gone)}"


def left_line(worker: GoneWorker) -> str:
    """How and when a worker left, for example: worker bob stopped sending heartbeats 3 min ago (host lab): …."""
    ago = "" if worker.ago_s is None else f" {duration(worker.ago_s)} ago"
    host = f" (host {worker.host})" if worker.host else ""
    match worker.how:
        case "":
            what = "is not running"
        case "vanished":
            what, ago = (
                "stopped sending heartbeats",
                f"{ago}{host}: if it was killed and not revoked, start it again with the same command",
            )
        case "refused":
            what = "was refused and ended"
        case how:
            what = how
    reason = f": {worker.reason}" if worker.reason else ""
    return f"worker {worker.name} {what}{ago}{reason}"


def duration(seconds: float | None) -> str:
    """A time span for people: 40 s, 12 min, 5 h, 3 days."""
    if seconds is None or math.isnan(seconds):
        return "-"
    for size, unit, below in ((1, "s", 120), (60, "min", 120 * 60), (3600, "h", 48 * 3600)):
        if seconds < below:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def _refusals(expert: ExpertView) -> str:
    if expert.meta is None:
        return f"{_count(expert.dead or 0, 'dead letter', 'dead letters')}"
    garbage = (
        f" and {_count(expert.meta.garbage, 'entry', 'entries')} of garbage" if expert.meta.garbage else ""
    )
    return f"{_count(expert.meta.refused, 'update', 'updates')} refused{garbage}"


def _of_server(server: ServerView) -> Iterator[str]:
    if server.memory_share > MEMORY_ALARM:
        used = f"{server.memory_share:.0%} of maxmemory is used"
        yield f"Redis: {used}: raise maxmemory, a full Redis takes no updates"
    if server.persists is False:
        yield "Redis: its last write to disk failed, see its log: is the disk full?"
    if server.certificate_left_s is not None and server.certificate_left_s < CERTIFICATE_ALARM_S:
        yield f"Redis: its TLS certificate or the CA's ends in {duration(server.certificate_left_s)}: renew it"
    if server.max_memory and (threat := eviction_threat(server.policy or "", server.url)):
        yield f"Redis: {threat}"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def plain_json(value: Any) -> Any:
    """Dataclasses as dicts; NaN and infinity, which JSON lacks, as None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
