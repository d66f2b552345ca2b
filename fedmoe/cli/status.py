"""`fedmoe status`: the state of a federation on one screen."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from fedmoe.cli.declared import redis_options
from fedmoe.settings import RedisSettings

if TYPE_CHECKING:
    from rich.text import Text

    from fedmoe.protocol.federation import ExpertView, Federation, ServerView, WorkerView
    from fedmoe.protocol.merged_view import MergedView
    from fedmoe.protocol.records import Meta
    from fedmoe.store.inspect import Inspector

EXPERT_COLUMNS = (
    "expert", "version", "last update", "waiting", "pending", "workers", "loss", "staleness", "applied", "refused",
    "served by",
)  # fmt: skip
WORKER_COLUMNS = (
    "worker", "expert", "host", "last seen", "step", "loss", "tokens/s", "version", "behind", "staleness",
    "in flight", "refused",
)  # fmt: skip
TEXT_COLUMNS = frozenset(
    {"expert", "worker", "host", "served by", "base model", "method", "error", "how", "reason"}
)  # left-aligned; the others are numbers
DROP_FIRST = ("host", "tokens/s", "staleness", "applied", "pending", "in flight", "served by")
SHOWN_WORKERS = 50
SHOWN_CURVES = 5
WIDE_REACH = 0.9  # an adapter that reaches a smaller share of its base model gets a line
NONE = "-"  # not known, or not there yet


@click.command()
@redis_options
@click.option("--watch", type=click.FloatRange(min=0.1, max=86_400), is_flag=False, flag_value=2.0, metavar="[SECONDS]",
              help="Seconds between refreshes, until Ctrl-C; 2 if no number is given.")  # fmt: skip
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    envvar="FEDMOE_STATUS_JSON",
    help="Print JSON, for a program; with --watch one line per refresh.",
)
def status(redis: RedisSettings, watch: float | None, as_json: bool) -> None:
    """Show experts, workers and waiting updates; it only reads, so any monitoring user may run it.

    Exit code 0 if Redis answers, whatever the findings.
    """
    from fedmoe.store.connection import Connection
    from fedmoe.store.inspect import Inspector

    inspector = Inspector(Connection(redis))
    if watch is None:
        federation = inspector.federation()
        if as_json:
            click.echo(json.dumps(federation.to_dict(), indent=2))
        elif sys.stdout.isatty():
            from rich.console import Console

            console = Console()
            console.print(render(federation, console.width))
        else:
            click.echo(plain(federation))
        return
    from fedmoe.util.stopping import end_like_ctrl_c

    end_like_ctrl_c()  # so that the terminal is restored
    try:
        watch_on(inspector, watch, as_json=as_json)
    except KeyboardInterrupt:  # the user ends it this way
        return


def watch_on(inspector: "Inspector", interval_s: float, *, as_json: bool) -> None:
    """Show the federation until interrupted; if Redis does not answer, report it and try again."""
    from fedmoe.errors import RedisUnavailableError

    if as_json or not sys.stdout.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        while True:
            try:
                federation = inspector.federation()
                click.echo(json.dumps(federation.to_dict()) if as_json else plain(federation) + "\n")
            except RedisUnavailableError as error:
                click.echo(f"fedmoe: {error}", err=True)
            time.sleep(interval_s)
    from rich.live import Live
    from rich.text import Text

    with Live(screen=True, auto_refresh=False) as live:
        while True:
            try:
                live.update(render(inspector.federation(), live.console.width), refresh=True)
            except RedisUnavailableError as error:
                live.update(Text(f"{error}; trying again", style="red"), refresh=True)
            time.sleep(interval_s)


def screen(federation: "Federation", *, width: int | None = None) -> Iterator[tuple[str, str]]:
    """The lines of the screen, each with its style; `width` is in columns, None for no limit."""
    from fedmoe.protocol.federation import findings

    yield server_line(federation.server), "dim"
    for columns, rows in (
        (EXPERT_COLUMNS, expert_rows(federation)),
        (WORKER_COLUMNS, worker_rows(federation)),
    ):
        if rows:
            yield "", ""
            title, *body = table(columns, rows, width=width)
            yield title, "bold"
            yield from ((line, "") for line in body)
    yield "", ""
    yield from ((line, "") for line in more_lines(federation))
    yield from ((f"! {line}", "yellow") for line in findings(federation))


def plain(federation: "Federation") -> str:
    """The screen as text."""
    return "\n".join(line for line, _ in screen(federation))


def render(federation: "Federation", width: int) -> "Text":
    """The screen for rich, not as markup, because a name may look like markup."""
    from rich.text import Text

    return Text("\n").join(Text(line, style) for line, style in screen(federation, width=width))


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], *, width: int | None = None) -> list[str]:
    """A line of headings and one for each row; on a narrow terminal the columns of DROP_FIRST are left out."""
    columns = {title: [title, *cells] for title, *cells in zip(titles, *rows, strict=True)}
    sizes = {title: max(map(len, cells)) for title, cells in columns.items()}
    for title in DROP_FIRST:
        if width is None or sum(sizes.values()) + 2 * (len(sizes) - 1) <= width:
            break
        sizes.pop(title, None)
    aligned = [
        [cell.ljust(size) if title in TEXT_COLUMNS else cell.rjust(size) for cell in columns[title]]
        for title, size in sizes.items()
    ]
    return ["  ".join(line).rstrip() for line in zip(*aligned, strict=True)]


def server_line(server: "ServerView") -> str:
    """The server: software, URL and used memory."""
    line = f"{server.software} at {server.url}"
    if server.used_memory is not None:
        bound = f" of {megabytes(server.max_memory)}" if server.max_memory else ""
        line += f", {megabytes(server.used_memory)}{bound} used"
    return line


def expert_rows(federation: "Federation") -> list[list[str]]:
    """A row of cells for each expert."""
    return [_expert_row(expert) for expert in federation.experts]


def _expert_row(expert: "ExpertView") -> list[str]:
    from fedmoe.protocol.federation import duration

    meta = expert.meta
    lease = {None: NONE, "": "nobody", "?": "somebody"}.get(expert.lease, expert.lease)
    return [
        expert.name,
        cell(meta.version if meta else None),
        duration(expert.last_update_s),
        cell(expert.waiting),
        cell(expert.pending),
        str(len(expert.workers)),
        cell(meta.loss if meta else None, ".3f"),
        cell(meta.mean_staleness if meta else None, ".2f"),
        cell(meta.applied if meta else None),
        cell(meta.refused if meta else None),
        str(lease),
    ]


def worker_rows(federation: "Federation", *, limit: int | None = SHOWN_WORKERS) -> list[list[str]]:
    """A row of cells for each live worker, at most `limit`."""
    return [_worker_row(worker) for worker in federation.workers[:limit]]


def _worker_row(worker: "WorkerView") -> list[str]:
    return [
        worker.name,
        worker.expert,
        worker.host or NONE,
        "joining" if worker.run == "joining" else f"{cell(worker.last_seen_s, '.0f')} s",
        cell(worker.step),
        cell(worker.loss, ".3f"),
        cell(worker.tokens_per_s, ".0f"),
        cell(worker.base_version),
        cell(worker.behind),
        cell(worker.staleness),
        cell(worker.in_flight or None),
        cell(worker.refused),
    ]


def more_lines(federation: "Federation") -> list[str]:
    """The lines below the tables: workers that are not shown, workers that left, the merged gateway."""
    from fedmoe.protocol.federation import duration
    from fedmoe.protocol.records import reach_text

    lines = []
    if len(federation.workers) > SHOWN_WORKERS:
        lines.append(f"and {len(federation.workers) - SHOWN_WORKERS} more workers, see --json")
    left = [
        f"{gone.name} ({expert.name}) {gone.how or 'left'} {duration(gone.ago_s)} ago"
        if gone.ago_s is not None
        else f"{gone.name} ({expert.name})"
        for expert in federation.experts
        for gone in expert.left
    ]
    if left:
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        lines.append(f"not running now: {', '.join(left[:10])}{more}")
    lines += [
        f"{expert.name}: its adapter covers {reach_text(expert.meta.reach, expert.meta.not_reached)}; "
        "the rest of the base model is not trained"
        for expert in federation.experts
        if expert.meta and 0 < expert.meta.reach < WIDE_REACH
    ]
    lines += [
        f"{expert.name}: {expert.meta.rolled_back.intervals[-1]}"
        for expert in federation.experts
        if expert.meta and _is_news(expert.meta)
    ]
    lines += [
        f"{expert.name}: the key `weights` is of version {expert.meta.tail.snapshot_version}, the updates since then "
        "are in its tail"
        for expert in federation.experts
        if expert.meta and expert.meta.tail
    ]
    lines += [validation_line(expert) for expert in federation.experts if expert.curves]
    if federation.experts:
        lines.append(merged_line(federation.merged))
    lines += [
        f"aggregator {one.name}: serves {len(one.serves)}{': ' if one.serves else ''}{', '.join(one.serves)}"
        for one in federation.aggregators
    ]
    return lines


def validation_line(expert: "ExpertView") -> str:
    """The best version of an expert, and the validation losses of its workers."""
    shown = "; ".join(map(str, expert.curves[:SHOWN_CURVES]))
    more = f"; and {len(expert.curves) - SHOWN_CURVES} more" if len(expert.curves) > SHOWN_CURVES else ""
    return f"{expert.name}: validation loss best at version {expert.best_version}: {shown}{more}"


def _is_news(meta: "Meta") -> bool:
    """True if the expert was rolled back, and what was trained on the versions before is not too stale yet anyway."""
    if not meta.rolled_back.intervals:
        return False
    return meta.version - meta.rolled_back.latest[1] <= meta.rules.aggregation.staleness_bound(0)


def trained_line(federation: "Federation") -> str:
    """The state of the trained gateway."""
    from fedmoe.protocol.names import GATEWAY

    trained = next((expert for expert in federation.experts if expert.name == GATEWAY), None)
    if trained is None:
        return "trained gateway: none (let workers train it: fedmoe expert set EXPERT --train both)"
    version = trained.meta.version if trained.meta else None
    return f"trained gateway: version {cell(version)}, workers {len(trained.workers)}"


def merged_line(merged: "MergedView") -> str:
    """How the merged gateway was built, and from which versions; present versions are named where they differ."""
    if not merged.exists:
        return "merged gateway: none yet" if merged.is_known else "merged gateway: not known"
    made = f"{merged.method or NONE}, rank {cell(merged.rank)}"
    by_fit = ", weights by the fit" if merged.fit and merged.fit.is_used else ""
    return f"merged gateway: {made}{by_fit}, built from {built_from(merged)}"


def built_from(merged: "MergedView") -> str:
    """The versions in the merged gateway, and the present ones where they differ."""
    parts = []
    for name in sorted(merged.built_from.keys() | merged.present.keys()):
        built, now = merged.built_from.get(name), merged.present.get(name)
        if built is None:
            parts.append(f"not {name}")
        else:
            parts.append(f"{name} v{built}" + ("" if built == now else f" (now v{cell(now)})"))
    return ", ".join(parts)


def cell(value: float | None, form: str = "d") -> str:
    """A number as text, or `-` for None and for nan."""
    return NONE if value is None or math.isnan(value) else format(value, form)


def megabytes(n_bytes: int) -> str:
    """A size as text: 1.5 GiB, 12.0 MiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
