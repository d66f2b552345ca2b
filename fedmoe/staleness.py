"""How much an update weighs that was trained on an old version.

Staleness τ is the number of updates applied since the version the update was trained on. Pure functions of τ:
no clock and no batch border enters, so a replay of the log gives the same factors.

Why `(1+τ)^-1` is the default: M equal workers in rotation have τ = M−1, so each then weighs 1/M, and it is
the one of these that is stable for every constant delay (linear analysis; see the README).
"""

import math
from dataclasses import dataclass

from fedmoe.errors import SettingsError

KINDS = ("constant", "polynomial", "hinge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decay:
    """A decay function s(τ) with s(0) = 1 and values in [0, 1], never rising.

    constant: 1.  polynomial: (1+τ)^-a.  hinge: 1 up to τ = b, then 1 / (a·(τ−b) + 1).

    Source: FedAsync, arXiv 1903.03934, section 5.2 (there as the mixing weight α·s(τ); here it scales the
    delta, as in FedBuff, arXiv 2106.06639).

    Raises:
        SettingsError: for an unknown kind, or a or b that is negative or not finite.
    """

    kind: str = "polynomial"
    a: float = 1.0
    b: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingsError(f"decay must be one of {', '.join(KINDS)}, not {self.kind!r}")
        for name, value in (("a", self.a), ("b", self.b)):
            if not math.isfinite(value) or value < 0:
                raise SettingsError(f"decay's {name} must be a number of at least 0, not {value!r}")

    def __call__(self, staleness: int) -> float:
        """The factor for an update of this staleness (in updates, not negative)."""
        if staleness < 0:
            raise ValueError(f"staleness cannot be negative, got {staleness}")
        if self.kind == "polynomial":
            return float((1.0 + staleness) ** -self.a)
        if self.kind == "hinge" and staleness > self.b:
            return 1.0 / (self.a * (staleness - self.b) + 1.0)
        return 1.0


def staleness_of(version: int, base_version: int) -> int:
    """Updates applied since the base; 0 if the base is newer, as after a failover to an older replica."""
    return max(0, version - base_version)
