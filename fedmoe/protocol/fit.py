"""The fit of the merged gateway: weights of the experts that were chosen on validation rows. Pure.

The merged gateway is ΔW = Σ wᵢ ΔWᵢ. A fit gives each expert one weight, or one for each group of layers. It replaces
the gateway weights and the scale that the aggregator would use otherwise.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from fedmoe.errors import SpecError
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import from_untrusted, optional, to_text

Weights = Mapping[str, tuple[float, ...]]  # expert -> its weight in each group of layers
_LAYER = re.compile(r"\.(\d+)\.")


class FittedOn(NamedTuple):
    """The state of an expert on which its weight was fitted."""

    version: int
    weights_commit: str
    lineage: str


class FitRows(NamedTuple):
    """Validation rows of one domain: how many were used, and the first 16 hex digits of their file's SHA-256."""

    rows: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """`fedmoe:{merged}:fit`. Without weights there is no fit, because an operator gave it up.

    Args:
        weights: JSON, see `by_expert`; fitted_on: JSON, see `experts`; data: JSON, domain → `FitRows`.
        loss: on the validation rows, with these weights; before: JSON, what else was measured on them → loss.
            A loss is the cross entropy per answer token (nats), averaged over the domains.
        fitted_at: seconds since 1970; without weights, when it was given up.
        software: releases that it was made with.
        requires: features needed to build by it (see `fedmoe.protocol.features`).
    """

    weights: str = optional("")
    fitted_on: str = optional("")
    data: str = optional("")
    loss: float | None = optional(None)
    before: str = optional("")
    fitted_at: float | None = optional(None)
    software: str = optional("")
    requires: str = optional("")

    @property
    def by_expert(self) -> dict[str, tuple[float, ...]]:
        """Expert → its weight in each group of layers, from the first layers to the last; all have as many groups.

        Raises:
            SpecError: if the field is malformed, or the weights are none that can be merged.
        """
        return parse_weights(self.weights)

    @property
    def experts(self) -> dict[str, FittedOn]:
        """Expert → the state of it on which it was fitted. Raises SpecError if the field is malformed."""
        return _records(FittedOn, (int, str, str), _object(self.fitted_on))

    @property
    def rows(self) -> dict[str, FitRows]:
        """Domain → its validation rows. Raises SpecError if the field is malformed."""
        return _records(FitRows, (int, str), _object(self.data))

    @property
    def losses_before(self) -> dict[str, float]:
        """What was measured beside the fit → its loss. Raises SpecError if the field is malformed."""
        return {name: _numbers([value])[0] for name, value in _object(self.before).items()}

    @property
    def id(self) -> str:
        """16 hex digits that name this fit."""
        return hashlib.sha256(json.dumps(self.to_fields(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def day(self) -> str:
        """For people: the day on which it was fitted (UTC)."""
        try:
            return datetime.fromtimestamp(self.fitted_at or math.nan, UTC).date().isoformat()
        except (ValueError, OverflowError, OSError):
            return "an unknown day"

    def to_fields(self) -> dict[str, str]:
        """The fields as Redis stores them."""
        return to_text(self, sparse=True)

    @classmethod
    def read(cls, raw: Mapping[Any, bytes | str]) -> "Fit":
        """Parse a stored hash; malformed fields count as missing. Raises ProtocolError if this FedMoE is too old."""
        fit = from_untrusted(cls, raw)
        check_requires(fit.requires, "the fit of the merged gateway")
        return fit


def weights_text(weights: Weights) -> str:
    """`Fit.weights` as JSON, with six digits."""
    return json.dumps({name: [float(f"{one:.6g}") for one in each] for name, each in weights.items()})


def parse_weights(text: str) -> dict[str, tuple[float, ...]]:
    """Read what `weights_text` wrote; an empty text gives none.

    Raises:
        SpecError: if it is malformed, or the experts cannot be merged with these weights.
    """
    found = {name: _numbers(value) for name, value in _object(text).items()}
    if found:
        _check_weights(found)
    return found


def _check_weights(weights: Weights) -> None:
    """Raise SpecError unless the experts can be merged with these weights."""
    if len({len(each) for each in weights.values()}) > 1 or not all(weights.values()):
        raise SpecError(
            "the fit of the merged gateway does not give all experts weights for the same groups of layers: "
            f"{_AGAIN}",
            about="groups",
        )
    every = [one for each in weights.values() for one in each]
    if not all(math.isfinite(one) and one >= 0 for one in every) or not 0 < sum(every) < math.inf:
        raise SpecError(
            f"the weights of the merged gateway's fit must be numbers of at least 0 with a sum above 0: {_AGAIN}",
            about="weights",
        )


def groups_of(modules: Iterable[str], n_groups: int) -> dict[str, int]:
    """The group of layers of each module, 0 to n_groups - 1; a module outside the layers belongs to the first."""
    numbers = {module: _layer(module) for module in modules}
    n_layers = 1 + max(numbers.values(), default=0)
    return {module: layer * n_groups // n_layers for module, layer in numbers.items()}


def _layer(module: str) -> int:
    """The number of the layer in a module's name."""
    found = _LAYER.search(f"{module}.")
    return int(found[1]) if found else 0


_AGAIN = "fit again (fedmoe gateway fit), or give it up (fedmoe gateway fit --remove)"


def malformed() -> SpecError:
    """The error of a fit that cannot be read."""
    return SpecError(
        f"the fit of the merged gateway is malformed; was it edited by hand? {_AGAIN[0].upper()}{_AGAIN[1:]}",
        about="fit",
    )


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise malformed() from error
    if not isinstance(content, dict):
        raise malformed()
    return content


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, list) or not all(type(one) in (int, float) for one in values):
        raise malformed()
    try:
        return tuple(float(one) for one in values)
    except OverflowError as error:
        raise malformed() from error


def _records(record: Any, kinds: Sequence[type], content: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {
            name: record(*(kind(one[field]) for field, kind in zip(record._fields, kinds, strict=True)))
            for name, one in content.items()
        }
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise malformed() from error
