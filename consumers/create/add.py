"""Add an expert to a federation that runs: of the same base model, adapter and rules as one that is there."""

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
from fedmoe.protocol.lora_init import initial_adapter
from fedmoe.protocol.names import check_expert
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.change import check_weight, whole_expert
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore

PINNED = ("base_fingerprint", "base_fingerprint_by", "tokenizer", "tokenizer_by", "chat_template")


def add_expert(
    connection: Connection, name: str, *, like: str, gateway_weight: float, settings: Mapping[str, Any]
) -> str:
    """Create an expert at version 0; the name of the expert that it took after.

    Its spec, and what is pinned of the base model, are those of the expert `like` ("": the first one by name that is
    whole). So are its rules, but for `settings` (named as in `RuleSet.settings`). The base model itself is not needed
    here. The aggregators that run serve it within seconds.

    Raises:
        SettingsError: if there is an expert of this name, none to take after, or a value breaks its bound.
        DamagedExpertError: if the one to take after is damaged; LostExpertError if Redis lost the one to be added.
    """
    gateway, store = GatewayStore(connection), ExpertStore(connection, check_expert(name))
    listed = gateway.experts()
    check_weight(gateway_weight)
    _check_absent(store, name, is_listed=name in listed)
    if not (like or listed):
        raise SettingsError(
            f"there are no experts at {connection.settings.shown} yet to take base model and adapter from: "
            f"create the first one with `{create_from_zero(name)}`"
        )
    like, spec, meta = _whole(connection, [like] if like else list(listed))
    rules = replace(meta.rules.changed(settings), number=1)
    pinned = {field: getattr(meta, field) for field in PINNED}
    new = first_meta(spec, rules, reach=meta.reach, not_reached=meta.not_reached)
    weights = initial_adapter(spec.layout, spec.init_seed).file
    if not store.create(
        spec, replace(new, **pinned), weights, gateway_weight=gateway_weight, though_removed=True
    ):
        raise SettingsError(f"somebody else has just created expert {name!r}")
    return like


def _check_absent(store: ExpertStore, name: str, *, is_listed: bool) -> None:
    try:
        found = store.condition()
    except RemovedExpertError:
        return
    if found.meta is not None or found.weights_commit:
        raise SettingsError(f"expert {name!r} is there already: see `fedmoe expert show {name}`")
    if is_listed:
        raise LostExpertError(name)
    check_never_there(store)


def _whole(connection: Connection, names: Sequence[str]) -> tuple[str, Spec, Meta]:
    """The first of these experts that is whole; raises what is wrong with the last one if none is."""
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
