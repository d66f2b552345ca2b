"""Creates missing experts when an aggregator starts."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from consumers.create.add import ensure_gateway
from consumers.create.base_model import STOPPED, look_at_base
from consumers.create.beginning import make_rules, make_spec, pinned_meta
from consumers.create.request import DEFAULT_EXPERTS, SpecRequest, check_identity, compare_rules
from consumers.recovery.creation import without_lost, without_trained
from fedmoe.errors import (
    DamagedExpertError,
    FedMoEError,
    RedisUnavailableError,
    RemovedExpertError,
    SpecError,
    StoppedError,
)
from fedmoe.protocol.effect import without_effect
from fedmoe.protocol.lora_init import initial_adapter
from fedmoe.protocol.names import GATEWAY, check_expert, check_trains_gateway, is_expert
from fedmoe.protocol.rules import TRAIN_EXPERT, TRAIN_GATEWAY
from fedmoe.protocol.spec import Spec
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.util.template_file import template_digest

logger = logging.getLogger(__name__)


def ensure_experts(
    connection: Connection,
    weights: Mapping[str, float],
    request: SpecRequest,
    *,
    stop: threading.Event | None = None,
) -> list[str]:
    """Create the missing experts of `weights` (name -> gateway weight); returns the names of the new ones.

    The trained gateway is created, too, if the rules of an expert let its workers train it.

    A missing expert that workers train, or that was found lost before, is not created, because Redis was emptied. It is
    marked as lost until an aggregator writes it back or the operator asks for `new_lineage`.

    Raises:
        SpecError: if an expert's spec differs from an explicit setting, or the federation's experts have another base
            model.
        BaseModelError: if the base model's config cannot be read.
        StoppedError: if `stop` is set meanwhile.
    """
    stop = stop or threading.Event()
    if request.rules.train != TRAIN_EXPERT:
        for name in weights:
            check_trains_gateway(name)
    looked_at = time.monotonic()
    for name in weights:
        check_expert(name)
    missing = _missing([ExpertStore(connection, name) for name in weights], weights, request)
    if not request.new_lineage:
        missing = without_lost(missing)
    if not missing:
        return _ensure_gateway(connection)
    described = look_at_base(request, stop)
    spec = make_spec(request, described)
    rules = make_rules(request, spec)
    _check_federation(GatewayStore(connection), spec)
    weights_file = initial_adapter(spec.layout, spec.init_seed).file
    if not request.new_lineage:
        missing = without_trained(missing, since=looked_at, stop=stop)
    created = []
    for store in missing:
        if stop.is_set():
            raise StoppedError(STOPPED, about="experts")
        if store.create(
            spec, pinned_meta(spec, rules, described), weights_file,
            gateway_weight=weights[store.name], though_removed=request.new_lineage,
        ):  # fmt: skip
            created.append(store.name)
            logger.info(
                "created %s: %s, rank %d, %.1f MiB", store.name, spec.base_model, spec.lora.rank,
                spec.layout.file_bytes / 2**20,
            )  # fmt: skip
            for sentence in without_effect(store.name, rules, request.explicit):
                logger.warning("%s", sentence)
        elif store.exists():
            store.register(weights[store.name])  # another process created it first
        else:
            raise SpecError(
                f"expert {store.name!r} is in Redis only in part: restore a backup (fedmoe restore --replace), or "
                f"remove the rest (fedmoe expert remove {store.name}) and create it from zero (fedmoe expert add "
                f"{store.name})",
                about=store.name,
            )
    return created + _ensure_gateway(connection)


def instead_of_defaults(connection: Connection) -> dict[str, float]:
    """The federation's own experts, if it has some and none of the default ones; empty otherwise.

    They take the place of the default experts for an aggregator to which none was named, for example the second one of
    a federation: it would add three experts that nobody wants.
    """
    listed = {name for name in GatewayStore(connection).listed() - {GATEWAY} if is_expert(name)}
    if listed & set(DEFAULT_EXPERTS):
        return {}
    return {name: 1.0 for name in sorted(listed) if ExpertStore(connection, name).exists()}


def _ensure_gateway(connection: Connection) -> list[str]:
    """Create the trained gateway if the rules of an expert let its workers train it; returns its name if it was new.

    What stands in the way is logged only: the experts are served all the same.
    """
    metas = GatewayStore(connection).metas()
    metas.pop(GATEWAY, None)
    like = next((name for name, meta in metas.items() if TRAIN_GATEWAY in meta.rules.trained), None)
    try:
        if like is None or not ensure_gateway(connection, like=like, though_removed=False):
            return []
    except RedisUnavailableError:  # the start is retried
        raise
    except FedMoEError as error:
        logger.warning("%s", error)
        return []
    logger.info("created the gateway like %s; its rules: fedmoe expert show gateway", like)
    return [GATEWAY]


def _missing(
    stores: Sequence[ExpertStore], weights: Mapping[str, float], request: SpecRequest
) -> list[ExpertStore]:
    """The experts that do not exist; existing ones are compared with the request and added to the list."""
    missing = []
    for store in stores:
        if not store.exists():
            missing.append(store)
            continue
        try:
            store.check_protocol()
            check_identity(store.name, store.spec(), request)
            if meta := store.condition().meta:
                compare_rules(store.name, meta.rules, request)
            store.register(weights[store.name], overwrite=store.name in request.weighted)
        except DamagedExpertError as error:  # an aggregator may repair it; the others are served meanwhile
            logger.warning("%s", error)
        except RemovedExpertError:  # its ExpertServer reports it
            if request.new_lineage:
                missing.append(store)
    return missing


def _check_federation(gateway: GatewayStore, spec: Spec) -> None:
    """Raise SpecError unless the federation's experts share this spec's base model and initialisation.

    Without these the gateway cannot be built.
    """
    for name in gateway.experts():
        try:
            other = gateway.spec(name)
        except FedMoEError:
            continue
        for field, what, new, old in (
            ("base_config", "base model", spec.base_config, other.base_config),
            ("lora", "LoRA settings", spec.lora, other.lora),
            ("init_seed", "seed", spec.init_seed, other.init_seed),
            (
                "chat_template",
                "chat template",
                template_digest(spec.chat_template),
                template_digest(other.chat_template),
            ),
        ):
            if new != old:
                raise SpecError(
                    f"the new experts would have another {what} ({new}) than expert {name!r} ({old}): experts of "
                    "different bases have no common gateway, use another --prefix",
                    about=field,
                )
