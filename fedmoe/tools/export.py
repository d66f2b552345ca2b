"""Reads an expert or the gateway from Redis for an export; needs neither peft nor a model."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from fedmoe.errors import (
    DamagedExpertError,
    LostExpertError,
    ProtocolError,
    RemovedExpertError,
    SpecError,
    UnknownExpertError,
    UpdateError,
)
from fedmoe.protocol.federation import Federation
from fedmoe.protocol.identity import expert_template
from fedmoe.protocol.lines import AppliedLine, read_line
from fedmoe.protocol.lora import alpha_at
from fedmoe.protocol.merged import MergedMeta, may_be_newer
from fedmoe.protocol.names import GATEWAY, check_expert, domain_of
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.tools.losses import Validation, validation

MERGED_NAME = "merged gateway"
LOG_LINES = 1000  # of an expert's log that are read for the newest validation losses


def version_name(
    name: str, version: int, commits: Mapping[str, str], *, settings: str = "", options: str = ""
) -> str:
    """A name that changes with the content, for example gateway-v12-3fa9c1e0.

    Args:
        name: its first part.
        version: the number of updates in it.
        commits: expert -> the weights_commit that is in it.
        settings: of the merge.
        options: of the export that change the files, as text; "" for the defaults.
    """
    content = json.dumps([sorted(commits.items()), settings, options])
    return f"{name}-v{version}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


class Team(NamedTuple):
    """What the workers of one expert did for the trained gateway, as far as its log reaches back."""

    workers: int
    updates: int
    loss: float


class Fitted(NamedTuple):
    """The loss of a fit, what else was measured on its rows → loss, and the number of rows of each domain."""

    loss: float | None
    before: Mapping[str, float]
    rows: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """An adapter to write.

    Args:
        name: of the expert, or "merged gateway".
        file: the safetensors file.
        config: content of adapter_config.json.
        built_from: expert -> its version and weights_commit.
        behind: expert -> its present version, for experts that changed since the gateway was built.
        info: further fields of fedmoe.json.
        chat_template: of its workers, "" for the base model's own.
        templates_differ: the experts in it were trained with different chat templates, so it has the base model's own.
        specs, metas: of the experts that have weight in it, as they are now: what they know of base model, tokenizer
            and losses.
        weights: expert -> its weight in each group of layers of the merged gateway, where that is known.
        trained_by: expert -> its workers' part in the trained gateway.
        validation: losses that the workers measured on rows that they held back, None if unknown.
        validations: the same of each expert in the merged gateway, as far as they are known.
        fitted: how the weights of the merged gateway were fitted, None if they were not.
        dtype: of the values in `file`.
        extra: further files, with their content: the tokenizer's.
    """

    name: str
    file: bytes
    config: Mapping[str, Any]
    built_from: Mapping[str, Mapping[str, str | int]]
    behind: Mapping[str, int]
    info: Mapping[str, Any]
    chat_template: str = ""
    templates_differ: bool = False
    specs: Mapping[str, Spec] = field(default_factory=dict)
    metas: Mapping[str, Meta] = field(default_factory=dict)
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    trained_by: Mapping[str, Team] = field(default_factory=dict)
    validation: Validation | None = None
    validations: Mapping[str, Validation] = field(default_factory=dict)
    fitted: Fitted | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    extra: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def kind(self) -> Literal["expert", "trained", "merged"]:
        """What it is: one expert, the gateway that workers train, or the merge of the experts."""
        return "merged" if self.name == MERGED_NAME else "trained" if self.name == GATEWAY else "expert"

    @property
    def versions(self) -> str:
        """For people, for example: docs_expert v3, sql_expert v12."""
        return ", ".join(f"{name} v{part['version']}" for name, part in self.built_from.items())

    @property
    def version(self) -> int:
        """The number of updates in it: of the expert, or of all experts that were merged."""
        return sum(int(part["version"]) for part in self.built_from.values())

    def version_name(self, name: str = "", *, options: str = "") -> str:
        """The name of this version, see the function `version_name`; `name` is by default the expert's or "gateway"."""
        commits = {expert: str(part["weights_commit"]) for expert, part in self.built_from.items()}
        name = name or (GATEWAY if self.kind == "merged" else self.name)
        settings = str(self.info.get("settings", ""))
        return version_name(name, self.version, commits, settings=settings, options=options)


def read_expert(store: GatewayStore, name: str) -> Export:
    """Read an expert from Redis.

    Raises:
        UnknownExpertError: names the existing experts.
    """
    spec = store.spec(check_expert(name))
    meta, file, lines = store.history(name)
    return Export(
        name=name,
        file=file,
        config=spec.adapter_config(),
        built_from={name: {"version": meta.version, "weights_commit": meta.weights_commit}},
        behind={},
        info={
            "base_model": spec.base_model,
            "base_fingerprint": meta.base_fingerprint,
            "updated_at": meta.updated_at,
            "lineage": meta.lineage,
            "spec": meta.spec,
            "n_examples": meta.n_examples,
        },
        chat_template=expert_template(spec, meta),
        specs={name: spec},
        metas={name: meta},
        trained_by=_teams(lines) if name == GATEWAY else {},
        validation=validation(lines, meta.version, meta.rolled_back),
    )


def _teams(lines: Sequence[Mapping[str, str]]) -> dict[str, Team]:
    """The part of each expert's workers in the trained gateway, from the lines of its log."""
    applied = []
    for line in lines:
        with suppress(UpdateError, ProtocolError):  # the card of a model must not hinder its export
            applied.append(read_line(line))
    teams: dict[str, list[AppliedLine]] = {}
    for one in applied:
        if isinstance(one, AppliedLine):
            teams.setdefault(domain_of(one.worker), []).append(one)
    return {
        name: Team(len({one.worker for one in team}), len(team), team[-1].loss)
        for name, team in sorted(teams.items())
    }


def read_gateway(store: GatewayStore, kind: str = "") -> Export:
    """Read the gateway from Redis: by default the trained one if workers trained it, else the merged one.

    Args:
        store: of the federation.
        kind: "trained" or "merged"; "" for the default.

    Raises:
        UnknownExpertError: if there is none of that kind yet, or Redis has lost it; says why and what to do.
        SpecError: if its meta is malformed.
    """
    if kind == "merged" or not (kind or is_gateway_trained(store)):
        return read_merged(store)
    try:
        return read_expert(store, GATEWAY)
    except (DamagedExpertError, LostExpertError):
        raise
    except UnknownExpertError as error:
        if GATEWAY in store.listed():
            raise LostExpertError(GATEWAY) from error
        raise UnknownExpertError(
            "this federation trains no gateway: let the workers of an expert train it (fedmoe expert set EXPERT "
            "--train both), or take the merged one (--kind merged)",
            about="gateway",
        ) from error


def is_gateway_trained(store: GatewayStore) -> bool:
    """True if the federation has a trained gateway to which an update was applied; raises as `trained_gateway`."""
    return trained_gateway(store) is not None


def trained_gateway(store: GatewayStore, *, seen: bool = False) -> Meta | None:
    """The trained gateway's meta; None if there never was one, no update was applied, or an operator removed it.

    Args:
        store: of the federation.
        seen: True if the caller has read one before, so that it is lost if it is neither there nor removed.

    Raises:
        LostExpertError: if it is in the list of experts, and its meta is not in Redis.
        SpecError: if its meta is malformed, or of a later release.
    """
    try:
        meta = store.meta(GATEWAY)
    except RemovedExpertError:
        return None
    except UnknownExpertError as error:
        if seen or GATEWAY in store.listed():
            raise LostExpertError(GATEWAY) from error
        return None
    return meta if meta.version > 0 else None


def read_merged(store: GatewayStore) -> Export:
    """Read the merged gateway from Redis, even if experts changed since it was built; raises as `read_gateway`."""
    loaded = store.load_merged()
    if loaded is None:
        raise UnknownExpertError(_why_no_gateway(Inspector(store.connection).federation()), about="gateway")
    merged, file = loaded
    config = _with_whole_alpha(merged.config)
    if not {"base_model_name_or_path", "r"} <= config.keys() or merged.updated_at is None:
        raise SpecError("the merged gateway's meta hash is malformed; was it edited by hand?", about="config")
    built_from: dict[str, dict[str, str | int]] = {
        name: {"version": one.version, "weights_commit": one.weights_commit}
        for name, one in merged.experts.items()
    }
    info = {
        "base_model": str(config["base_model_name_or_path"]),
        "updated_at": merged.updated_at,
        "settings": merged.settings,
        "lineages": {name: one.lineage for name, one in merged.experts.items() if one.lineage},
    }
    metas = store.metas()
    metas.pop(GATEWAY, None)
    weights = dict.fromkeys(metas, 1.0)
    with suppress(SpecError):  # one is no number; that of another expert must not hinder an export
        weights = store.experts()
    commits = {name: part["weights_commit"] for name, part in built_from.items()}
    used = {name: meta for name, meta in metas.items() if name in (merged.by_expert or built_from)}
    same = {  # one that was created again since says nothing of what is in the merge
        name: meta
        for name, meta in used.items()
        if name in merged.experts and merged.experts[name].lineage in ("", meta.lineage)
    }
    prints = {meta.base_fingerprint for meta in same.values()}
    specs = {name: store.spec(name) for name in used}
    templates = {expert_template(specs[name], meta) for name, meta in used.items()}
    return Export(
        name=MERGED_NAME,
        file=file,
        config=config,
        built_from=built_from,
        behind={
            n: meta.version
            for n, meta in metas.items()
            if meta.weights_commit != commits.get(n)
            and may_be_newer(n, weights.get(n, 0.0), commits, merged.fit)
        },
        info=info | {"base_fingerprint": prints.pop() if len(prints) == 1 else ""},
        chat_template=next(iter(templates)) if len(templates) == 1 else "",
        templates_differ=len(templates) > 1,
        specs=specs,
        metas=used,
        weights=merged.by_expert,
        validations=_validations(store, merged, same),
        fitted=_fitted(store, merged),
    )


def _validations(store: GatewayStore, merged: MergedMeta, metas: Mapping[str, Meta]) -> dict[str, Validation]:
    """What the workers of each expert measured last, at the version that was merged or before."""
    lines = store.newest_lines(metas, LOG_LINES)
    found = {
        name: validation(log, merged.experts[name].version, metas[name].rolled_back)
        for name, log in lines.items()
    }
    return {name: one for name, one in found.items() if one is not None}


def _fitted(store: GatewayStore, merged: MergedMeta) -> Fitted | None:
    """How it was fitted; None if it was not, or its fit was replaced since."""
    with suppress(ProtocolError, SpecError):  # the card of a model must not hinder its export
        fit = store.fit() if merged.fit else None
        if fit and fit.id == merged.fit:
            return Fitted(fit.loss, fit.losses_before, {name: one.rows for name, one in fit.rows.items()})
    return None


def _with_whole_alpha(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with an integer lora_alpha if it is one; an earlier aggregator wrote 32.0."""
    with suppress(LookupError, TypeError, ZeroDivisionError):
        return config | {"lora_alpha": alpha_at(config["lora_alpha"] / config["r"], config["r"])}
    return config


def _why_no_gateway(federation: Federation) -> str:
    merged = federation.merged
    if merged.error:
        return f"there is no merged gateway yet, because it cannot be built: {merged.error}"
    if not federation.experts:
        return "there is no gateway yet, and no expert: start `fedmoe aggregator run`"
    if merged.lease:
        return "there is no gateway yet: the aggregator builds it in a moment, try again"
    return "there is no gateway yet and no aggregator to build it: start `fedmoe aggregator run`"
