"""Reads a whole federation without changing anything; a read-only user (`+@read`) is enough.

Data that is missing, malformed, of the wrong type or not readable for this user is reported with its expert; everything
else is shown. One SCAN finds all workers (members.py); KEYS is never used.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from redis.exceptions import NoPermissionError

from fedmoe.errors import ProtocolError, RemovedExpertError, SpecError
from fedmoe.protocol.balance import active_of
from fedmoe.protocol.federation import (
    CurveView,
    DeadLetterView,
    ExpertView,
    Federation,
    WorkerView,
)
from fedmoe.protocol.fields import number
from fedmoe.protocol.fit import Fit
from fedmoe.protocol.keys import GROUP
from fedmoe.protocol.lines import DeadLetter
from fedmoe.protocol.merged import BuiltFrom, MergedMeta, may_be_newer
from fedmoe.protocol.merged_view import FitView, MergedView
from fedmoe.protocol.names import GATEWAY, MERGED, is_expert
from fedmoe.protocol.records import NO_DECISIONS, Decided, Meta
from fedmoe.protocol.validation import Curve, best_version
from fedmoe.store.aggregators import views
from fedmoe.store.connection import Connection
from fedmoe.store.members import Members, read_members
from fedmoe.store.reading import Command, ask, texts, why
from fedmoe.store.server_info import clock_of, read_info, server_view, why_empty
from fedmoe.util.text import printable

SHOWN_DEAD, SHOWN_LOG = 3, 5
REPAIR = (
    "was the key deleted? An aggregator that retains it repairs it, else restore a backup (fedmoe restore)"
)
_KEY_OF = {"groups": "updates", "last_dead": "dead", "lease_ms": "lease"}


class Inspector:
    """Reads a federation over one connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.keys = connection.keys
        self._redis = connection.client

    def federation(self) -> Federation:
        """Read the federation.

        Raises:
            RedisUnavailableError: if Redis does not reply, or refuses to list the experts.
        """
        problems: list[str] = []
        made, began = self.connection.generation, time.perf_counter()
        weights = self._experts(problems)
        took_s = time.perf_counter() - began
        is_trip = self.connection.generation == made  # else it connected, too
        info = read_info(self.connection)
        if not weights and not problems and (reason := why_empty(info, self.connection.database)):
            problems.append(reason)
        commands: dict[tuple[str, str], Command] = {("", "aggregators"): ("HGETALL", self.keys.aggregators)}
        for name in (*weights, MERGED):
            commands |= {(name, what): command for what, command in self._commands(name).items()}
        replies = ask(self.connection, commands)
        members = read_members(self.connection, list(weights), problems)
        now = clock_of(info)

        def of(name: str) -> dict[str, Any]:
            return {what: reply for (owner, what), reply in replies.items() if owner == name}

        experts = tuple(
            self._expert(name, weight, of(name), members[name] if members else None, now)
            for name, weight in weights.items()
        )
        return Federation(
            prefix=self.keys.prefix,
            server=server_view(self.connection, info, now, took_s if is_trip else None),
            experts=experts,
            merged=_merged(of(MERGED), experts, now),
            aggregators=views(replies["", "aggregators"], now),
            problems=tuple(problems),
            read_at=now,
            sees_workers=members is not None,
        )

    def _experts(self, problems: list[str]) -> dict[str, float | None]:
        """The listed experts and their gateway weights, None for a weight that is not a number."""
        raw = ask(self.connection, {"experts": ("HGETALL", self.keys.experts)})["experts"]
        if isinstance(raw, Exception):
            with self.connection.errors():
                if not str(raw).startswith("WRONGTYPE"):
                    raise raw
            problems.append(f"{self.keys.experts} is not a hash: was it written by something else?")
            raw = {}
        found: dict[str, float | None] = {}
        for name, weight in sorted(raw.items()):
            if not is_expert(printable(name)):
                problems.append(
                    f"{self.keys.experts} lists {printable(name)!r}, which is not an expert's name"
                )
                continue
            found[name.decode()] = number(weight)
            if found[name.decode()] is None:
                problems.append(f"{name.decode()}: its gateway weight is {printable(weight)!r}, not a number")
        return found

    def _commands(self, name: str) -> dict[str, Command]:
        keys = self.keys.expert(name)
        commands: dict[str, Command] = {
            "meta": ("HGETALL", keys.meta),
            "weights": ("STRLEN", keys.weights),
            "lease": ("GET", keys.lease),
            "lease_ms": ("PTTL", keys.lease),
            "problem": ("HGETALL", keys.problem),
        }
        if name == MERGED:
            return commands | {"fit": ("HGETALL", keys.fit)}
        return commands | {
            "updates": ("XLEN", keys.updates),
            "groups": ("XINFO GROUPS", keys.updates),
            "dead": ("XLEN", keys.dead),
            "last_dead": ("XREVRANGE", keys.dead, "+", "-", "COUNT", SHOWN_DEAD),
            "log": ("XREVRANGE", keys.log, "+", "-", "COUNT", SHOWN_LOG),
            "decided": ("HGETALL", keys.decided),
            "spec": ("STRLEN", keys.spec),
        }

    def _expert(
        self, name: str, weight: float | None, replies: dict[str, Any], members: Members | None, now: float
    ) -> ExpertView:
        problems = _refused(replies)
        meta = _meta(replies["meta"], problems)
        problems += _missing(replies, meta)
        waiting = replies["updates"]
        pending, lag = _group(replies["groups"], waiting)
        problems += _of_aggregators(replies)
        workers = members.alive if members else []
        curves = _curves(replies["decided"] or {}, meta)
        if meta:
            workers = [_behind(worker, meta.version) for worker in workers]
        return ExpertView(
            name=name,
            gateway_weight=weight,
            meta=meta,
            weights_bytes=meta.parts.n_bytes if meta and meta.parts else replies["weights"],
            waiting=waiting,
            pending=pending,
            lag=lag,
            lease=_lease(replies),
            workers=tuple(workers),
            left=members.left(map(printable, replies["decided"] or ())) if members else (),
            dead=replies["dead"],
            last_dead=tuple(_dead_letter(entry) for entry in replies["last_dead"] or ()),
            log=tuple(texts(fields) for _, fields in replies["log"] or ()),
            last_update_s=_age_of_last(replies["log"] or (), now),
            curves=tuple(CurveView.of(printable(name), curve) for name, curve in sorted(curves.items())),
            best_version=best_version(curves),
            problems=tuple(problems),
        )


def _refused(replies: dict[str, Any]) -> list[str]:
    """Sentences for the error replies; each error reply is set to None."""
    reasons: dict[str, list[str]] = {}
    for what, reply in list(replies.items()):
        if not isinstance(reply, Exception):
            continue
        replies[what] = None
        if what == "groups" and "no such key" in str(reply):
            replies[what] = []
        elif what != "lease" or not isinstance(reply, NoPermissionError):
            # An ACL may hide the lease holder's name (-get); the key's expiry still shows whether there is one.
            reasons.setdefault(why(reply), []).append(_KEY_OF.get(what, what))
    return [f"{', '.join(dict.fromkeys(keys))} cannot be read: {reason}" for reason, keys in reasons.items()]


def _meta(raw: Mapping[bytes, bytes] | None, problems: list[str]) -> Meta | None:
    if raw is None:
        return None
    if not raw:
        problems.append(f"its meta is missing: {REPAIR}")
        return None
    try:
        return Meta.from_hash(
            {
                key: value if key == b"rules" else printable(value).encode()  # rules are parsed, not shown
                for key, value in raw.items()
            }
        )
    except (SpecError, RemovedExpertError) as error:
        problems.append(printable(str(error)))
        return None


def _missing(replies: Mapping[str, Any], meta: Meta | None) -> list[str]:
    """Sentences for an expert's missing parts. These reads are not atomic, so it is not checked that parts match."""
    missing = [what for what in ("weights", "spec") if replies[what] == 0]
    sentences = [f"its {what} {'is' if what == 'spec' else 'are'} missing" for what in missing]
    # `decided` is read after meta, so a commit between the two reads only adds to it.
    if meta and meta.decided_stamp != NO_DECISIONS and replies["decided"] == {}:
        sentences.append("its decided updates are missing")
    return [f"{sentence}: {REPAIR}" for sentence in sentences]


def _group(groups: Sequence[Mapping[str, Any]] | None, waiting: int | None) -> tuple[int | None, int | None]:
    """Entries read but not committed, and entries not read.

    Redis 6.2 reports no lag, and later versions none after an unread entry was deleted; then the entries that are not
    pending count as unread.
    """
    if groups is None:
        return None, None
    ours = next((group for group in groups if group.get("name") == GROUP.encode()), None)
    pending = int(ours["pending"]) if ours else 0
    lag = ours.get("lag") if ours else None
    if lag is None and waiting is not None:
        lag = max(0, waiting - pending)
    return pending, lag


def _lease(replies: Mapping[str, Any]) -> str | None:
    """The lease holder: "" for none, "?" for a name that this user may not read, None if unknown."""
    if replies["lease"]:
        return printable(replies["lease"])
    if replies["lease_ms"] is None:
        return None
    return "" if replies["lease_ms"] == -2 else "?"


def _dead_letter(entry: tuple[bytes, Mapping[bytes, bytes]]) -> DeadLetterView:
    letter = DeadLetter.read(entry[1])
    return DeadLetterView(
        id=printable(entry[0]),
        worker=printable(letter.worker),
        seq="" if letter.seq is None else str(letter.seq),
        reason=printable(letter.reason or "no reason is given"),
    )


def _curves(raw: Mapping[bytes, bytes], meta: Meta | None) -> dict[str, Curve]:
    """The validation losses of the active workers, without those of before the last rollback."""
    decided = {}
    for name, text in raw.items():
        with suppress(SpecError):  # a load names what is malformed
            decided[name.decode(errors="replace")] = Decided.from_json(text)
    if meta is None:
        return {}
    last, since = active_of(decided, meta.version), meta.rolled_back.made
    return {name: curve for name, one in last.items() if (curve := one.curve) and curve.since >= since}


def _behind(worker: WorkerView, version: int) -> WorkerView:
    if worker.base_version is None:
        return worker
    return replace(worker, behind=max(0, version - worker.base_version))


def _age_of_last(log: Sequence[tuple[bytes, Mapping[bytes, bytes]]], now: float) -> float | None:
    """Seconds since the last update was applied, by the server's clock; `log` has the newest line first."""
    for line_id, fields in log:
        if b"worker" in fields:
            return max(0.0, now - int(line_id.partition(b"-")[0]) / 1000)
    return None


def _of_aggregators(replies: Mapping[str, Any]) -> list[str]:
    """The problems that aggregators report, one sentence each."""
    said = texts(replies["problem"] or {})
    return [f"aggregator {holder} has a problem: {problem}" for holder, problem in sorted(said.items())]


def _merged(replies: dict[str, Any], experts: Sequence[ExpertView], now: float) -> MergedView:
    problems = _refused(replies)
    problems += _of_aggregators(replies)
    meta = MergedMeta()
    experts_in: Mapping[str, BuiltFrom] = {}
    weights: Mapping[str, tuple[float, ...]] = {}
    try:
        meta = MergedMeta.read(replies["meta"] or {})
        experts_in = meta.experts if meta.built_from else {}
        weights = meta.by_expert
    except ProtocolError as error:
        problems.append(printable(str(error)))
    except SpecError:
        problems.append("its meta is malformed: was it edited by hand?")
    built_from = {printable(name): one.version for name, one in experts_in.items()}
    commits = {printable(name): printable(one.weights_commit) for name, one in experts_in.items()}
    domains = [expert for expert in experts if expert.name != GATEWAY]
    present = {expert.name: expert.meta for expert in domains if expert.meta}
    weight_of = {expert.name: expert.gateway_weight for expert in domains}
    exists = bool(commits) and (replies["weights"] != 0 or bool(meta.parts))
    fit = None
    try:
        fit = _fit(Fit.read(replies["fit"] or {}), meta, domains, now)
    except (ProtocolError, SpecError) as error:
        problems.append(printable(str(error)))
    return MergedView(
        is_known=replies["meta"] is not None,
        exists=exists,
        method=printable(meta.method),
        rank=meta.rank,
        updated_at=meta.updated_at,
        relative_error=meta.relative_error,
        weights=_printable_names(weights),
        built_from=built_from,
        present={name: expert.version for name, expert in present.items()},
        outdated=tuple(
            n
            for n, expert in present.items()
            if commits.get(n) != expert.weights_commit and may_be_newer(n, weight_of[n], commits, meta.fit)
        ),
        fit=fit,
        lease=_lease(replies),
        error=printable(meta.error),
        problems=tuple(problems),
    )


def _fit(fit: Fit, merged: MergedMeta, experts: Sequence[ExpertView], now: float) -> FitView | None:
    """The fit; None if there is none. Raises SpecError if it is malformed."""
    weights, fitted_on = fit.by_expert, fit.experts
    if not weights:
        return None
    lineages = {expert.name: expert.meta.lineage for expert in experts if expert.meta}
    known = {name for name, one in fitted_on.items() if name in weights and lineages.get(name) == one.lineage}
    return FitView(
        weights=_printable_names(weights),
        versions={printable(name): one.version for name, one in fitted_on.items()},
        strange=tuple(printable(name) for name in weights if name not in known),
        missing=tuple(e.name for e in experts if e.meta and e.gateway_weight and e.name not in known),
        loss=fit.loss,
        before=_printable_names(fit.losses_before),
        rows={printable(name): one.rows for name, one in fit.rows.items()},
        fitted_at=fit.fitted_at,
        age_s=None if fit.fitted_at is None else max(0.0, now - fit.fitted_at),
        is_used=merged.fit == fit.id,
    )


def _printable_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {printable(name): value for name, value in values.items()}
