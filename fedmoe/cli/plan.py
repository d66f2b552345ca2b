"""`fedmoe plan`: memory, disk and network of a federation."""

import json
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options
from fedmoe.tools.plan import PlanSettings

if TYPE_CHECKING:
    from fedmoe.protocol.plan import Shape, Term

TITLES = {
    "memory": ("memory of Redis", ""),
    "in": ("network: Redis receives", "/s"),
    "out": ("network: Redis sends", "/s"),
    "disk": ("disk", ""),
}
LETTERS = """n = values of an adapter, w = 4 n = its weights; u = an update, p = a pull, both in the wire format;
s = server state (w, with sgd 0); m = merged gateway (E w with cat, else w); E experts, G = 1 if the gateway is
trained; M = workers, twice if each trains both; r = M / sync interval; g = rebuilds of the merged gateway a second"""


@click.command()
@options(PlanSettings)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for a program; all amounts are bytes.")
def plan(as_json: bool, **values: Any) -> None:
    """Estimate memory, disk and network of a federation, by one formula whose terms are shown.

    It asks no Redis. Memory is what Redis holds at its busiest: `maxmemory` should be twice that. A worker needs memory
    for its base model and its batch besides.
    """
    from fedmoe.protocol.plan import PARTS, terms, total
    from fedmoe.tools.plan import shape_of

    shape = shape_of(made(PlanSettings, values))
    found = terms(shape)
    if as_json:
        click.echo(json.dumps(as_dict(shape, found), indent=2))
        return
    click.echo("\n".join(head(shape)))
    for part in PARTS:
        title, per = TITLES[part]
        rows = [(term.name, size(term.amount) + per, term.formula) for term in found if term.part == part]
        if part != "disk":
            rows.append(("together", size(total(found, part)) + per, ""))
        click.echo("\n" + "\n".join(_table(title, rows)))
    click.echo(f"\nmaxmemory should be twice the memory: {size(2 * total(found, 'memory'))}\n\n{LETTERS}")


def head(shape: "Shape") -> list[str]:
    """What is planned."""
    gateway = ", and a trained gateway" if shape.trained_gateway else ""
    trained = (
        f"{shape.experts} experts of {shape.values:,} values each{gateway}; {shape.memberships} memberships"
    )
    sizes = f"w = {size(shape.weights)}, u = {size(shape.update)}, p = {size(shape.pull)}, m = {size(shape.merged)}"
    return [
        f"{trained}; an update each {shape.sync_interval_s:g} s, in {shape.wire_format}",
        f"{sizes}, r = {shape.updates_per_s:.3g}/s, g = {shape.rebuilds_per_s:.3g}/s",
    ]


def as_dict(shape: "Shape", found: "list[Term]") -> dict[str, Any]:
    """The plan for programs."""
    from dataclasses import asdict

    from fedmoe.protocol.plan import MEMORY, PARTS, total

    by_part = {part: {term.name: round(term.amount) for term in found if term.part == part} for part in PARTS}
    sums = {part: round(total(found, part)) for part in PARTS if part != "disk"}
    return {
        "federation": asdict(shape),
        **by_part,
        "together": sums,
        "maxmemory": 2 * round(total(found, MEMORY)),
    }


def _table(title: str, rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"  {name:<{widths[0]}}  {amount:>{widths[1]}}  {formula}".rstrip() for name, amount, formula in rows
    ]
    return [title, *lines]


def size(n_bytes: float) -> str:
    """An amount with its unit: 512 B, 35.2 MiB, 1.5 TiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} TiB"
