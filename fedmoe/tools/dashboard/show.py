"""Values as people read them on a page, and small pictures drawn as SVG. Pure."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fedmoe.protocol.federation import duration

NONE = "–"
_SIGNS = {
    "running": "●", "answers": "●", "serving": "●",
    "joining": "◐", "idle": "○", "quiet": "▲", "held": "■", "not served": "▲",
    "standing still": "▲", "getting worse": "▲", "has a problem": "▲", "damaged": "✕", "failed": "✕", "vanished": "✕",
    "refused": "✕", "finished": "✓", "stopped": "○", "not running": "○",
}  # fmt: skip


def whole(value: float | None) -> str:
    """12,345."""
    return NONE if value is None else f"{value:,.0f}"


def fixed(value: float | None, digits: int = 3) -> str:
    """1.234."""
    return NONE if value is None else f"{value:.{digits}f}"


def rate(value: float | None) -> str:
    """A rate with about three digits: 1,240, 12.4, 0.31."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def size(n_bytes: float | None) -> str:
    """A size: 1.5 GiB."""
    if n_bytes is None:
        return NONE
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 2**power:
            return f"{n_bytes / 2**power:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def percent(value: float | None) -> str:
    """A share: 12 %."""
    return NONE if value is None else f"{value:.0%}".replace("%", " %")


def span(seconds: float | None) -> str:
    """A time span: 40 s."""
    return NONE if seconds is None else duration(seconds)


def clock(at: float | None) -> str:
    """A moment, UTC: 12:30:59."""
    return NONE if not at else time.strftime("%H:%M:%S", _utc(at))


def moment(at: float | None) -> str:
    """A moment with its day, UTC, as RFC 3339."""
    return NONE if not at else time.strftime("%Y-%m-%dT%H:%M:%SZ", _utc(at))


def _utc(at: float) -> time.struct_time:
    return time.gmtime(min(max(at, 0.0), 253_402_300_799.0))  # an id of a stream may name any time


def sign(state: str) -> str:
    """A shape for a state, so that it is not told by colour alone."""
    return _SIGNS.get(state, "▲")


def spark(losses: Sequence[float], label: str) -> Markup:
    """A small line of losses."""
    values = [value for value in losses if value is not None and math.isfinite(value)]
    if len(values) < 2:
        return Markup('<span class="none">{}</span>').format(NONE)
    low, high = min(values), max(values)
    width, height = 96.0, 24.0
    points = " ".join(
        f"{2 + i * (width - 4) / (len(values) - 1):.1f},"
        f"{height - 3 - (value - low) / ((high - low) or 1.0) * (height - 6):.1f}"
        for i, value in enumerate(values)
    )
    return Markup(
        '<svg class="spark" width="96" height="24" viewBox="0 0 96 24" role="img" aria-label="{}">'
        '<polyline points="{}"/></svg>'
    ).format(f"{label}: from {values[0]:.3f} to {values[-1]:.3f}", points)


def bars(buckets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The bars of a distribution: label, count, share, and width in percent of the longest one."""
    total = sum(one["updates"] for one in buckets)
    most = max((one["updates"] for one in buckets), default=0)
    return [
        {
            "label": _range(one["first"], one["last"]),
            "updates": one["updates"],
            "share": one["updates"] / total if total else 0.0,
            "width": round(100 * one["updates"] / most, 1) if most else 0,
        }
        for one in buckets
    ]


def _range(first: int, last: int | None) -> str:
    if last is None:
        return f"{first} or more"
    return str(first) if first == last else f"{first} to {last}"


FILTERS: dict[str, Callable[..., Any]] = {
    "whole": whole, "fixed": fixed, "rate": rate, "size": size, "percent": percent, "span": span, "clock": clock,
    "moment": moment, "sign": sign,
}  # fmt: skip
