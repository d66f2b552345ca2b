"""The merged gateway as `fedmoe status` and `fedmoe gateway show` see it, with its fit. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

MERGED = "merged gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitView:
    """The fit of the merged gateway.

    Args:
        weights: expert → its weight in each group of layers.
        versions: expert → the version that it was fitted on.
        strange: experts that it names and that were removed, or created again since; missing: experts with a gateway
            weight that it does not name. The gateway leaves out both.
        loss: on the validation rows, with these weights; before: what else was measured on them → loss.
        rows: domain → number of validation rows.
        fitted_at: seconds since 1970; age_s: seconds since then, by the server's clock.
        is_used: the merged gateway is built by it.
    """

    weights: dict[str, tuple[float, ...]]
    versions: dict[str, int]
    strange: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    loss: float | None = None
    before: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    fitted_at: float | None = None
    age_s: float | None = None
    is_used: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedView:
    """The merged gateway.

    Args:
        is_known: False if this user may not read its meta, so that nothing is known of it.
        relative_error: distance to the exact weighted sum of the experts, ‖ΔW − result‖ / ‖ΔW‖.
        weights: expert → its weight in each group of layers; empty if unknown.
        built_from: the versions it was built from; present: the experts' present ones; outdated: experts that changed.
        fit: None if there is none.
    """

    is_known: bool = True
    exists: bool = False
    method: str = ""
    rank: int | None = None
    updated_at: float | None = None
    relative_error: float | None = None
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)
    built_from: dict[str, int]
    present: dict[str, int]
    outdated: tuple[str, ...] = ()
    fit: FitView | None = None
    lease: str | None = None
    error: str = ""
    problems: tuple[str, ...] = ()

    def findings(self) -> Iterator[str]:
        """What the operator should look at, one sentence each."""
        # Its builder complains of a malformed fit in the words in which it is found here.
        yield from (f"{MERGED}: {problem}" for problem in self.problems if problem != self.error)
        if self.error:
            yield f"{MERGED}: cannot be built: {self.error}"
        elif self.exists and self.outdated and self.lease == "":
            yield (
                f"{MERGED}: {', '.join(self.outdated)} moved on and no aggregator rebuilds it: "
                "start `fedmoe aggregator run`"
            )
        if self.fit and self.fit.missing:
            yield (
                f"{MERGED}: it leaves out {', '.join(self.fit.missing)}, because its fit does not name them: fit again "
                "(fedmoe gateway fit), or give the fit up (fedmoe gateway fit --remove)"
            )
        if self.fit and self.fit.strange:
            yield (
                f"{MERGED}: its fit was made with {', '.join(self.fit.strange)}, removed or created again since: "
                "fit again (fedmoe gateway fit)"
            )


def weights_line(weights: Mapping[str, tuple[float, ...]]) -> str:
    """For people: `docs_expert 0.61, sql_expert 0.72`; with groups of layers `sql_expert 0.72|0.66|0.5`."""
    return ", ".join(f"{name} {'|'.join(f'{one:.3g}' for one in each)}" for name, each in weights.items())
