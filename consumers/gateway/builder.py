"""The merged gateway: the merge of all experts, rebuilt whenever an expert changes.

It is a pure function of the experts, so building it need not be exactly-once: its meta names the weights
commit of each expert, and it is rebuilt until these are the present ones.
"""

import json
import logging
import threading
import time
from collections.abc import Callable

from consumers.gateway.merge import MergeInput, merge
from consumers.gateway.methods import METHODS
from consumers.recovery.listing import ExpertList
from fedmoe.errors import FedMoEError, ProtocolError, RedisUnavailableError, SpecError, StaleStateError
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.lora import alpha_at
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.merged import BuiltFrom, MergedMeta, built_from_text
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.lease import Lease
from fedmoe.store.problems import Problems
from fedmoe.util.backoff import Backoff
from fedmoe.util.software import software

logger = logging.getLogger(__name__)


class GatewayBuilder:
    """Rebuilds the merged gateway while it holds its lease."""

    def __init__(
        self,
        connection: Connection,
        settings: GatewaySettings,
        *,
        holder: str,
        lease_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = GatewayStore(connection)
        self._settings = settings
        self._clock = clock
        self._problems = Problems(connection, self._store.keys.problem, holder=holder)
        self._experts = ExpertList(self._store)
        self._lease_s = lease_s
        self._lease = Lease(
            connection,
            self._store.keys.lease,
            holder=holder,
            ttl_ms=int(lease_s * 1000 + settings.interval_s * 2000),
        )

    def run(self, stop: threading.Event) -> None:
        """Rebuild until `stop` is set, then once more."""
        backoff = Backoff("merged gateway", logger)
        ending = False
        while not ending:
            ending = stop.wait(self._settings.interval_s)
            try:
                if self._lease.hold():
                    self.refresh()
                else:
                    self._experts.reconcile()
                backoff.ok()
                self._problems.solved()
            except RedisUnavailableError as error:
                if ending:
                    logger.warning(
                        "merged gateway: the rebuild before the stop failed (%s); the next aggregator rebuilds it",
                        error,
                    )
                else:
                    self._problems.report(str(error))
                    stop.wait(backoff.failed(error))
            except ProtocolError as error:  # release the lease to an aggregator that can read the records
                self._problems.report(str(error))
                self._lease.give_up()
                stop.wait(backoff.failed(error) + self._lease_s / 4)
            except StaleStateError as error:
                logger.info("merged gateway: %s", error)
            except FedMoEError as error:
                backoff.failed(error)
                self._complain(str(error))
            except Exception as error:  # a bug here must not end the daemon
                logger.exception("merged gateway: unexpected error")
                self._problems.report(
                    f"unexpected error, see the traceback in this aggregator's log: {error!r}"
                )
                stop.wait(backoff.failed(error))
        self._lease.give_up()

    def _complain(self, reason: str) -> None:
        try:
            self._store.complain(reason)
        except RedisUnavailableError as error:
            logger.debug(
                "merged gateway: the reason why it is not built cannot be written to Redis: %s", error
            )

    def refresh(self) -> bool:
        """Rebuild if an expert or the settings changed, or the list of experts did; True if it was rebuilt."""
        weights = self._experts.reconcile()
        weights.pop(GATEWAY, None)  # the trained gateway is no part of the merged one
        if not weights:
            return False
        present = {name: self._store.meta(name).weights_commit for name in weights}
        merged = self._store.merged()
        built = {name: one.weights_commit for name, one in merged.experts.items()} if merged else None
        if merged and built == present and merged.settings == self._settings_text(weights):
            return False
        self._build(weights)
        return True

    def _settings_text(self, weights: dict[str, float]) -> str:
        s = self._settings
        by = json.dumps(weights) if s.weighting == "config" else s.weighting
        return f"{s.method} scale={s.scale:g} rank={s.rank} weights={by}"

    def _build(self, weights: dict[str, float]) -> None:
        started = self._clock()
        specs = {name: self._store.spec(name) for name in weights}
        parts: dict[str, BuiltFrom] = {}
        experts = []
        for name, weight in weights.items():
            meta, file = self._store.read(name)
            parts[name] = BuiltFrom(meta.version, meta.weights_commit)
            experts.append(self._expert(specs[name], file, self._weight(weight, meta)))
        if sum(expert.weight for expert in experts) == 0:
            raise SpecError(
                "every expert's gateway weight is 0: nothing to merge yet", about="gateway_weight"
            )
        first = next(iter(specs.values()))
        needs_init = METHODS[self._settings.method].needs_init
        merged = merge(
            experts,
            method=self._settings.method,
            scale=self._settings.scale,
            rank=self._settings.rank or None,
            init=initial_weights(first.layout, first.init_seed) if needs_init else None,
        )
        config = first.adapter_config(rank=merged.rank) | {
            "lora_alpha": alpha_at(merged.scaling, merged.rank)
        }
        gateway = MergedMeta(
            built_from=built_from_text(parts),
            adapter_config=json.dumps(config),
            method=self._settings.method,
            settings=self._settings_text(weights),
            rank=merged.rank,
            relative_error=merged.relative_error,
            updated_at=round(self._clock(), 3),
            build_s=round(self._clock() - started, 3),
            software=software(),
        )
        self._store.write_merged(gateway, merged.buffer.file)
        logger.info(
            "merged gateway: rebuilt from %s", ", ".join(f"{n} v{p.version}" for n, p in parts.items())
        )

    def _weight(self, configured: float, meta: Meta) -> float:
        match self._settings.weighting:
            case "examples":
                return float(meta.n_examples)
            case "updates":
                return float(meta.version)
        return configured

    @staticmethod
    def _expert(spec: Spec, file: bytes, weight: float) -> MergeInput:
        flat = values_of(spec.layout, file)
        return MergeInput(layout=spec.layout, flat=flat, scaling=spec.lora.scaling, weight=weight)
