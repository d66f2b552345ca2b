"""Decay: the factor by which staleness reduces the weight of an update.

Staleness τ is the number of updates applied since the version on which the update was trained. The functions here
depend on τ alone, not on clocks or on batch boundaries, so a replay of the log gives the same factors. Pure.

`(1+τ)^-1` is the default for two reasons. M equal workers in rotation have τ = M−1, so each update weighs 1/M. And it
is the only one of these functions that is stable for every constant delay (linear analysis; see docs/protocol.md).
"""

from dataclasses import dataclass

from fedmoe.util.setting import check, setting

KINDS = ("constant", "polynomial", "hinge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Decay:
    """A non-increasing decay function s(τ) with s(0) = 1 and values in [0, 1].

    constant: 1.  polynomial: (1+τ)^-a.  hinge: 1 up to τ = b, then 1 / (a·(τ−b) + 1).

    Source: FedAsync, arXiv 1903.03934, section 5.2 (there as the mixing weight α·s(τ); here it scales the
    delta, as in FedBuff, arXiv 2106.06639).

    Raises:
        SettingsError: for an unknown kind, or a or b that is negative or not finite.
    """

    kind: str = setting(
        "polynomial",
        "Function by which staleness reduces the weight of an update.",
        option="decay",
        choices=KINDS,
    )
    a: float = setting(1.0, "Exponent of polynomial decay, (1+τ)^-a; slope of hinge decay.", option="decay_a",
                       at_least=0, at_most=1e9)  # fmt: skip
    b: float = setting(4.0, "Staleness τ, in updates, up to which hinge decay gives full weight.", option="decay_b",
                       at_least=0, at_most=1e9, unit="updates")  # fmt: skip

    def __post_init__(self) -> None:
        check(self)

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
    """Number of updates applied since the base; 0 if the base is newer, as after a failover to an older replica."""
    return max(0, version - base_version)
