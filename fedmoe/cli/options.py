"""An option type for durations."""

import re
from typing import Any, ClassVar

import click


class Duration(click.ParamType[float]):
    """A duration with its unit, for example 30m, converted to seconds."""

    name = "duration"
    units: ClassVar = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return seconds; fail if there is no unit, because a bare number is ambiguous."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd])", str(value).strip())
        if not match or not float(match[1]):
            self.fail(
                f"{value!r} must be a number above 0 with its unit, like 7d, 12h, 30m or 90s", param, ctx
            )
        return float(match[1]) * self.units[match[2]]
