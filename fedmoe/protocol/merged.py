"""The merged gateway's meta hash: the versions it was built from, the merge settings, its adapter's shape. Pure."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fedmoe.errors import SpecError
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import from_untrusted, optional, to_text
from fedmoe.protocol.fit import parse_weights


class BuiltFrom(NamedTuple):
    """The state of an expert that the gateway contains; lineage "" if an earlier release built it."""

    version: int
    weights_commit: str
    lineage: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedMeta:
    """`fedmoe:{merged}:meta`. The merged gateway can be rebuilt at any time, so every field may be missing.

    Args:
        built_from: JSON, see `experts`; adapter_config: JSON, see `config`.
        method, rank, relative_error: of the merge (see `consumers.gateway.methods`).
        settings: of the merge, with the experts' gateway weights or the fit, as text; a different text triggers a
            rebuild.
        weights: JSON, as in `fedmoe.protocol.fit.Fit`; the ideal gateway is the sum of the experts with these weights.
        fit: id of the fit by which it was built.
        updated_at: seconds since 1970; build_s: duration of the build in seconds.
        error: why the last build failed; the previous gateway stays.
        software: releases that it was built with.
        generation, parts: name and number of the parts that hold its weights, if one Redis string cannot.
        requires: features needed to serve or export it (see `fedmoe.protocol.features`).
    """

    built_from: str = optional("")
    adapter_config: str = optional("")
    method: str = optional("")
    settings: str = optional("")
    rank: int | None = optional(None)
    relative_error: float | None = optional(None)
    weights: str = optional("")
    fit: str = optional("")
    updated_at: float | None = optional(None)
    build_s: float | None = optional(None)
    error: str = optional("")
    software: str = optional("")
    generation: str = optional("")
    parts: int | None = optional(None)
    requires: str = optional("")

    @property
    def experts(self) -> dict[str, BuiltFrom]:
        """Expert -> the state of it that the gateway contains. Raises SpecError if the field is malformed."""
        try:
            content = json.loads(self.built_from)
            return {
                n: BuiltFrom(int(p["version"]), str(p["weights_commit"]), str(p.get("lineage", "")))
                for n, p in content.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise SpecError(
                "the merged gateway's meta hash is malformed; was it edited by hand?", about="experts"
            ) from error

    @property
    def by_expert(self) -> dict[str, tuple[float, ...]]:
        """The weights, as those of a `Fit`; empty if unknown. Raises SpecError if the field is malformed."""
        return parse_weights(self.weights)

    @property
    def config(self) -> dict[str, Any]:
        """Content of PEFT's adapter_config.json. Raises SpecError if the field is malformed."""
        try:
            content = json.loads(self.adapter_config)
        except (ValueError, RecursionError) as error:
            raise SpecError(
                "the merged gateway's meta hash is malformed; was it edited by hand?", about="config"
            ) from error
        if not isinstance(content, dict):
            raise SpecError(
                "the merged gateway's meta hash is malformed; was it edited by hand?", about="config"
            )
        return content

    def to_fields(self) -> dict[str, str]:
        """The fields as Redis stores them."""
        return to_text(self, sparse=True)

    @classmethod
    def read(cls, raw: Mapping[Any, bytes | str]) -> "MergedMeta":
        """Parse a stored hash; malformed fields count as missing. Raises ProtocolError if this FedMoE is too old."""
        meta = from_untrusted(cls, raw)
        check_requires(meta.requires, "the merged gateway")
        return meta


def built_from_text(experts: Mapping[str, BuiltFrom]) -> str:
    """`MergedMeta.built_from` as JSON."""
    return json.dumps(
        {
            name: {field: value for field, value in one._asdict().items() if value != ""}
            for name, one in experts.items()
        }
    )


def may_be_newer(name: str, gateway_weight: float | None, built_from: Collection[str], fit: str) -> bool:
    """True if an update of this expert calls for another merged gateway than the one built from these experts.

    It does not if the expert's gateway weight is 0, or if the gateway was built by a fit that leaves it out. The weight
    is None if it cannot be read; `fit` is the fit's id, "" for none.
    """
    return gateway_weight != 0 and (name in built_from or not fit)
