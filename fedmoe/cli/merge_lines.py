"""The lines of `fedmoe gateway show` about the merge: weights, fit, and the error of each method."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fedmoe.cli.status import NONE, cell, table

if TYPE_CHECKING:
    from consumers.gateway.compare import Compared
    from fedmoe.protocol.merged_view import FitView, MergedView

COLUMNS = ("method", "rank", "error")


def merge_lines(merged: "MergedView") -> Iterator[str]:
    """The weights of the experts, the fit that they come from, and its age."""
    from fedmoe.protocol.merged_view import weights_line

    if merged.weights:
        yield f"weights: {weights_line(merged.weights)}"
    if merged.fit:
        yield fit_line(merged.fit)
        yield f"fitted on {_versions(merged)}; the weights also hold for later versions, until they are fitted again"
        if not merged.fit.is_used:
            yield "the merged gateway is not built by this fit yet"


def fit_line(fit: "FitView") -> str:
    """When it was fitted, on what, and the losses."""
    from fedmoe.protocol.federation import duration

    rows = ", ".join(f"{count} rows of {domain}" for domain, count in fit.rows.items()) or NONE
    return f"fit: {duration(fit.age_s)} ago, on {rows}: {losses_text(fit.loss, fit.before)}"


def losses_text(loss: float | None, before: dict[str, float]) -> str:
    """For people: `loss 1.532 (base 2.055, scale 1 1.594)`."""
    others = ", ".join(f"{name} {one:.4f}" for name, one in before.items())
    return f"loss {cell(loss, '.4f')}" + (f" ({others})" if others else "")


def method_lines(merged: "MergedView", compared: "Sequence[Compared] | str | None") -> Iterator[str]:
    """The error of the method in use, and a table of all methods or the reason why there is none."""
    if merged.exists:
        yield f"{merged.method or NONE}: {error_text(merged.relative_error)}"
    if isinstance(compared, str):
        yield f"the merge methods are not compared: {compared}"
    elif compared:
        rows = [[one.method, cell(one.rank), one.reason or error_text(one.error)] for one in compared]
        yield ""
        yield from table(COLUMNS, rows, width=None)


def error_text(error: float | None) -> str:
    """The relative error, for people."""
    if error is None:
        return "its error is unknown, because an earlier release built it"
    if error == 0:
        return "exact"
    return "relative error " + ("below 0.1%" if error < 5e-4 else f"{error:.1%}")


def _versions(merged: "MergedView") -> str:
    """The versions that were fitted on, with the present ones where they differ."""
    assert merged.fit is not None
    parts = []
    for name, version in merged.fit.versions.items():
        now = merged.present.get(name)
        parts.append(f"{name} v{version}" + ("" if now == version else f" (now v{cell(now)})"))
    return ", ".join(parts)
