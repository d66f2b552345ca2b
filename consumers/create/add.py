"""Adds an expert to a running federation, with the base model, adapter shape and rules of an existing expert."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from consumers.create.beginning import first_meta
from consumers.recovery.creation import check_never_there
from fedmoe.errors import (
    DamagedExpertError,
    LostExpertError,
    RemovedExpertError,
    SettingsError,
    create_from_zero,
)
from fedmoe.protocol.identity import base_difference
from fedmoe.protocol.lora_init import initial_adapter
from fedmoe.protocol.names import GATEWAY, check_expert, check_trains_gateway
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TRAIN_EXPERT
from fedmoe.protocol.spec import Spec
from fedmoe.store.change import check_weight, whole_expert
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore

GATEWAY_WEIGHT = 0.0  # the trained gateway is no part of the merged one
PINNED = ("base_fingerprint", "base_fingerprint_by", "tokenizer", "tokenizer_by", "chat_template")


def add_expert(
    connection: Connection,
    name: str,
    *,
    like: str,
    gateway_weight: float,
    settings: Mapping[str, Any],
    new_lineage: bool = False,
) -> str:
    """Create an expert at version 0; returns the name of the expert that it was copied from.

    It takes the spec, the pinned components of the base model, and the rules of the expert `like` ("": the first whole
    expert of a domain, by name), or for a gateway those of `RuleSet.for_gateway`; `settings` changes some rules (named
    as in `RuleSet.settings`). The base model need not be on this machine. Running aggregators serve the new expert
    within seconds. With `new_lineage` it is created from zero although Redis lost it.

    Raises:
        SettingsError: if the expert exists, there is none to copy from, or a value breaks its bound.
        DamagedExpertError: if the expert to copy from is damaged; LostExpertError if Redis lost the expert to add.
    """
    gateway, store = GatewayStore(connection), ExpertStore(connection, check_expert(name))
    listed = gateway.experts()
    check_weight(gateway_weight)
    _check_absent(store, name, is_listed=name in listed, new_lineage=new_lineage)
    if not (like or listed.keys() - {GATEWAY}):
        raise SettingsError(
            f"there are no experts at {connection.settings.shown} yet to copy base model and adapter shape from: "
            f"create the first one with `{create_from_zero(name)}`",
            about="experts",
        )
    like, spec, meta = _whole(connection, [like] if like else [one for one in listed if one != GATEWAY])
    rules = meta.rules
    if name == GATEWAY:
        rules, gateway_weight = rules.for_gateway(), GATEWAY_WEIGHT
    rules = rules.changed(settings).as_first()
    if rules.train != TRAIN_EXPERT:
        check_trains_gateway(name)
        _check_base_of_gateway(connection, name, spec, meta)
    pinned = {field: getattr(meta, field) for field in PINNED}
    new = first_meta(spec, rules, reach=meta.reach, not_reached=meta.not_reached)
    weights = initial_adapter(spec.layout, spec.init_seed).file
    if not store.create(
        spec, replace(new, **pinned), weights, gateway_weight=gateway_weight, though_removed=True
    ):
        raise SettingsError(
            f"another process has just created expert {name!r}: see `fedmoe expert show {name}`",
            about="expert",
        )
    return like


def ensure_gateway(connection: Connection, *, like: str, though_removed: bool = True) -> bool:
    """Create the trained gateway if the federation has none, with the spec of the expert `like`; True if it was new.

    Raises:
        FedMoEError: as `add_expert`; LostExpertError if Redis lost the gateway; RemovedExpertError if an operator
            removed it, unless `though_removed`.
        SettingsError: if the gateway has another base model than `like`, so that its workers could not train it.
    """
    try:
        found = ExpertStore(connection, GATEWAY).condition()
    except RemovedExpertError:
        if not though_removed:
            raise
    else:
        if found.meta is not None:
            _, spec, meta = _whole(connection, [like])
            _check_base_of_gateway(connection, like, spec, meta)
            return False
    add_expert(connection, GATEWAY, like=like, gateway_weight=GATEWAY_WEIGHT, settings={})
    return True


def _check_base_of_gateway(connection: Connection, name: str, spec: Spec, meta: Meta) -> None:
    """Raise SettingsError if there is a gateway that workers with this base model cannot train."""
    try:
        found = ExpertStore(connection, GATEWAY).condition()
    except RemovedExpertError:
        return
    if found.meta is None or found.spec is None:
        return
    if odd := base_difference(spec, meta, found.spec, found.meta):
        raise SettingsError(
            f"the workers of expert {name!r} cannot train the gateway, because the gateway's base model differs in "
            f"{odd}: give the expert --train expert, or make a gateway of its base model (fedmoe expert remove "
            f"{GATEWAY}, then fedmoe expert set {name} --train both)",
            about="train",
        )


def _check_absent(store: ExpertStore, name: str, *, is_listed: bool, new_lineage: bool) -> None:
    try:
        found = store.condition()
    except RemovedExpertError:
        return
    if found.meta is not None or found.weights_commit:
        raise SettingsError(
            f"expert {name!r} exists already: see `fedmoe expert show {name}`", about="expert"
        )
    if new_lineage:
        return
    if is_listed:
        raise LostExpertError(name)
    check_never_there(store)


def _whole(connection: Connection, names: Sequence[str]) -> tuple[str, Spec, Meta]:
    """The first whole one of these experts; if there is none, raises the error of the last one."""
    for name in names:
        store = ExpertStore(connection, name)
        try:
            meta, _ = whole_expert(store)
        except (DamagedExpertError, RemovedExpertError):
            if name == names[-1]:
                raise
        else:
            return name, store.spec(), meta
    raise AssertionError("there are names")
