"""A federation as the JSON API shows it, from what the inspector and the chronicles read. Pure.

`fedmoe/tools/dashboard/schemas.py` describes every record that is made here; a test fuzzes the API against it.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedmoe.protocol.chronicle import Change, Chronicle, Refusal
from fedmoe.protocol.federation import (
    QUIET_AFTER_S,
    STILL_AFTER_S,
    CurveView,
    ExpertView,
    Federation,
    GoneWorker,
    ServerView,
    WorkerView,
    findings,
    plain_json,
)
from fedmoe.protocol.merged_view import MergedView
from fedmoe.protocol.names import GATEWAY, is_name
from fedmoe.tools.dashboard.figures import Contribution, Figures, figures_of, rates, throughput
from fedmoe.util.text import printable

SHOWN_REFUSALS = 50

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A federation at one moment, ready to be sent.

    Args:
        federation: what the overview shows, without events.
        experts: name → all about it.
        workers: expert, worker → all about it.
    """

    federation: Json = field(default_factory=dict)
    experts: Mapping[str, Json] = field(default_factory=dict)
    workers: Mapping[tuple[str, str], Json] = field(default_factory=dict)


class Painter:
    """Makes pictures; remembers the figures of chronicles that got no new line."""

    def __init__(self) -> None:
        self._figures: dict[str, tuple[Chronicle, int, Figures]] = {}

    def paint(self, seen: Federation, chronicles: Mapping[str, Chronicle], now: float) -> Picture:
        """The picture of a federation; `now` is the server's clock, in seconds since 1970."""
        empty = Chronicle()
        figures = {name: self._figures_of(name, chronicle) for name, chronicle in chronicles.items()}
        self._figures = {name: one for name, one in self._figures.items() if name in chronicles}
        experts: dict[str, Json] = {}
        workers: dict[tuple[str, str], Json] = {}
        for view in seen.experts:
            chronicle = chronicles.get(view.name, empty)
            known = figures.get(view.name) or figures_of(empty)
            own: list[Json] = plain_json(_workers(view, known))
            experts[view.name] = _expert(view, chronicle, known, own, now)
            workers |= {(view.name, one["name"]): _worker_page(one, chronicle, known) for one in own}
        return Picture(
            federation=plain_json(_federation(seen, list(experts.values()))), experts=experts, workers=workers
        )

    def _figures_of(self, name: str, chronicle: Chronicle) -> Figures:
        known = self._figures.get(name)
        if known is None or known[0] is not chronicle or known[1] != chronicle.edition:
            known = (chronicle, chronicle.edition, figures_of(chronicle))
            self._figures[name] = known
        return known[2]


def _federation(seen: Federation, experts: list[Json]) -> Json:
    workers = [worker for expert in experts for worker in expert["workers"]]
    alive = [worker for worker in workers if worker["is_alive"]]
    return {
        "prefix": seen.prefix,
        "findings": list(findings(seen)),
        "totals": {
            "experts": len(experts),
            "serving": sum(one["state"] in ("serving", "idle", "standing still") for one in experts),
            "workers": len(alive),
            "quiet": sum(one["state"] == "quiet" for one in alive),
            "waiting": sum(one["waiting"] or 0 for one in experts),
            "applied": sum(one["applied"] or 0 for one in experts),
            "refused": sum(one["refused"] or 0 for one in experts),
            "updates_per_min": sum(one["updates_per_min"] for one in experts),
            "tokens_per_s": _bounded_sum(one["tokens_per_s"] for one in experts),
        },
        "experts": [{name: one[name] for name in SUMMARY} for one in experts],
        "aggregators": plain_json(list(seen.aggregators)),
        "gateway": _gateway(seen.merged, experts),
        "redis": redis_of(seen.server),
    }


SUMMARY = (
    "name", "state", "is_well", "version", "last_update_s", "updates_per_min", "examples_per_s", "tokens_per_s",
    "loss", "recent_losses", "validation", "mean_staleness", "waiting", "pending", "applied", "refused",
    "running_workers", "served_by", "gateway_weight", "base_model", "held",
)  # fmt: skip


def _expert(view: ExpertView, chronicle: Chronicle, known: Figures, workers: list[Json], now: float) -> Json:
    meta = view.meta
    updates_per_min, examples_per_s = rates(chronicle, now)
    state, is_well = _state(view)
    values: Json = {
        "name": view.name,
        "state": state,
        "is_well": is_well,
        "version": meta.version if meta else None,
        "last_update_s": view.last_update_s,
        "updates_per_min": round(updates_per_min, 3),
        "examples_per_s": round(examples_per_s, 3),
        "tokens_per_s": _bounded_sum(worker.tokens_per_s or 0.0 for worker in view.workers),
        "loss": meta.loss if meta else None,
        "recent_losses": known.spark,
        "validation": {
            "best_version": view.best_version,
            "is_worse": any(curve.is_worse for curve in view.curves),
        },
        "mean_staleness": meta.mean_staleness if meta else None,
        "waiting": view.waiting,
        "pending": view.pending,
        "applied": meta.applied if meta else None,
        "refused": meta.refused if meta else None,
        "running_workers": len(view.workers),
        "served_by": {None: None, "": None, "?": "somebody"}.get(view.lease, view.lease),
        "gateway_weight": view.gateway_weight,
        "base_model": printable(meta.base_model) if meta else "",
        "held": printable(meta.rules.held) if meta else "",
        "unread": view.lag,
        "garbage": meta.garbage if meta else None,
        "examples": meta.n_examples if meta else None,
        "tokens": meta.n_tokens if meta else None,
        "weights_bytes": view.weights_bytes,
        "lineage": printable(meta.lineage) if meta else "",
        "problems": list(view.problems),
        "rules": {"number": meta.rules.number, "values": meta.rules.settings()} if meta else None,
    }
    whole: Json = plain_json(values)
    return whole | {  # what follows holds finite numbers only
        "training_curve": known.training,
        "validation_curves": [{"worker": name, **curve} for name, curve in known.validation.items()],
        "staleness": known.staleness,
        "throughput": throughput(chronicle, now),
        "workers": workers,
        "refusals": _refusals(chronicle.refusals),
        "changes": [_shown(one) for one in reversed(chronicle.changes)],
        "log_updates": len(chronicle.steps),
    }


def _bounded_sum(values: Iterable[float]) -> float:
    """A sum that stays a number whatever workers say of their speed."""
    most = sys.float_info.max
    return max(-most, min(sum(values), most))


def _state(view: ExpertView) -> tuple[str, bool]:
    """An expert's state in a word or two, and True if nobody need look at it."""
    if view.meta is None:
        return "damaged", False
    if view.meta.rules.held:
        return "held", False
    if view.lease == "":
        return "not served", False
    if view.problems:
        return "has a problem", False
    if (view.last_update_s or 0.0) > STILL_AFTER_S and view.workers:
        return "standing still", False
    if any(curve.is_worse for curve in view.curves):
        return "getting worse", False
    return ("serving", True) if view.workers else ("idle", True)


def _refusals(refusals: Iterable[Refusal]) -> list[Json]:
    return [_shown(one) for one in reversed(list(refusals))][:SHOWN_REFUSALS]


def _shown(one: Change | Refusal) -> Json:
    """Its fields, without the id of its line."""
    return {name: value for name, value in asdict(one).items() if name != "line"}


def _workers(view: ExpertView, known: Figures) -> list[Json]:
    curves = {curve.worker: curve for curve in view.curves}
    alive = [_alive(one, known, curves.get(one.name)) for one in view.workers]
    gone = [_gone(view.name, one, known, curves.get(one.name)) for one in view.left]
    return [*alive, *gone]


def _alive(worker: WorkerView, known: Figures, curve: CurveView | None) -> Json:
    state = "joining" if worker.run == "joining" else "running"
    if (worker.last_seen_s or 0.0) > QUIET_AFTER_S:
        state = "quiet"
    return {
        "expert": worker.expert,
        "name": worker.name,
        "has_page": is_name(worker.name),
        "state": state,
        "is_alive": True,
        "is_well": state != "quiet" and not worker.problem,
        "last_seen_s": worker.last_seen_s,
        "since": worker.since,
        "host": worker.host,
        "software": worker.software,
        "step": worker.step,
        "loss": worker.loss,
        "tokens_per_s": worker.tokens_per_s,
        "base_version": worker.base_version,
        "behind": worker.behind,
        "staleness": worker.staleness,
        "in_flight": worker.in_flight or None,
        "published": worker.published,
        "refused": worker.refused,
        "problem": worker.problem,
        **_part(known, worker.name, curve),
    }


def _gone(expert: str, worker: GoneWorker, known: Figures, curve: CurveView | None) -> Json:
    nothing = ("since", "step", "loss", "tokens_per_s", "base_version", "behind", "staleness", "in_flight",
               "published", "refused")  # fmt: skip
    return {
        "expert": expert,
        "name": worker.name,
        "has_page": is_name(worker.name),
        "state": worker.how or "not running",
        "is_alive": False,
        "is_well": worker.how not in ("vanished", "failed", "refused"),
        "last_seen_s": worker.ago_s,
        "host": worker.host,
        "software": "",
        **dict.fromkeys(nothing),
        "problem": worker.reason,
        **_part(known, worker.name, curve),
    }


def _part(known: Figures, worker: str, curve: CurveView | None) -> Json:
    validation = None
    if curve:
        validation = {name: value for name, value in asdict(curve).items() if name != "worker"}
    return {
        "contribution": asdict(known.contributions.get(worker, Contribution())),
        "validation": validation,
    }


def _worker_page(worker: Json, chronicle: Chronicle, known: Figures) -> Json:
    name = worker["name"]
    return worker | {
        "training_curve": known.worker_losses.get(name, {"version": [], "loss": []}),
        "validation_curve": known.validation.get(name, {"version": [], "loss": [], "rows": None}),
        "refusals": _refusals(one for one in chronicle.refusals if one.worker == name),
        "log_updates": len(chronicle.steps),
    }


def _gateway(merged: MergedView, experts: list[Json]) -> Json:
    names = sorted(merged.built_from.keys() | merged.present.keys())
    fit = merged.fit
    return {
        "trained": next((one["name"] for one in experts if one["name"] == GATEWAY), None),
        "merged": {
            "exists": merged.exists,
            "method": merged.method,
            "rank": merged.rank,
            "updated_at": merged.updated_at,
            "relative_error": merged.relative_error,
            "served_by": {None: None, "": None, "?": "somebody"}.get(merged.lease, merged.lease),
            "made_of": [
                {
                    "expert": name,
                    "version": merged.built_from.get(name),
                    "present_version": merged.present.get(name),
                    "is_outdated": name in merged.outdated,
                    "weights": list(merged.weights.get(name, ())),
                }
                for name in names
            ],
            "fit": None
            if fit is None
            else {
                "is_used": fit.is_used,
                "loss": fit.loss,
                "before": [{"what": what, "loss": loss} for what, loss in fit.before.items()],
                "rows": sum(fit.rows.values()),
                "fitted_at": fit.fitted_at,
            },
            "problems": [*merged.problems, *([merged.error] if merged.error else [])],
        },
    }


def redis_of(server: ServerView, problem: str = "") -> Json:
    """The server; with a problem it did not answer the last look."""
    return {
        "is_here": not problem,
        "problem": problem,
        "url": server.url,
        "software": server.software,
        "used_memory": server.used_memory,
        "max_memory": server.max_memory,
        "policy": server.policy,
        "latency_ms": None if server.latency_s is None else round(server.latency_s * 1000, 2),
        "clients": server.clients,
        "uptime_s": server.uptime_s,
        "is_aof_on": server.is_aof_on,
        "persists": server.persists,
        "saved_s": server.saved_s,
        "unsaved": server.unsaved,
    }
