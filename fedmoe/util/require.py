"""Checks of settings: each says which setting is wrong, what it must be, and what came. Pure."""

import math

from fedmoe.errors import SettingsError


def require(condition: bool, message: str) -> None:
    """Raise SettingsError with this message unless the condition holds."""
    if not condition:
        raise SettingsError(message)


def require_positive(owner: object, *names: str) -> None:
    """Raise SettingsError unless these attributes are finite numbers above 0."""
    for name in names:
        value = getattr(owner, name)
        require(
            _is_number(value) and math.isfinite(value) and value > 0,
            f"{name} must be a number above 0, not {value!r}",
        )


def require_whole(owner: object, *names: str, minimum: int = 1) -> None:
    """Raise SettingsError unless these attributes are whole numbers of at least `minimum`."""
    for name in names:
        value = getattr(owner, name)
        require(
            _is_number(value) and isinstance(value, int) and value >= minimum,
            f"{name} must be a whole number of at least {minimum}, not {value!r}",
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
