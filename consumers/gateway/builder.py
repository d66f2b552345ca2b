"""The merged gateway: the merge of all experts, rebuilt whenever an expert changes.

It is a pure function of the experts and of an operator's fit, so building it need not be exactly-once: its meta names
the weights commit of each expert, and it is rebuilt until these are the present ones.
"""

import json
import logging
import threading
import time
from collections.abc import Callable

from consumers.gateway.inputs import Served, not_served, read_inputs, takes_part
from consumers.gateway.merge import merge
from consumers.gateway.methods import METHODS
from consumers.rebalance import Rebalancer, lease
from consumers.recovery.listing import ExpertList
from fedmoe.errors import FedMoEError, ProtocolError, RedisUnavailableError, StaleStateError
from fedmoe.protocol.fit import Fit, weights_text
from fedmoe.protocol.lora import alpha_at
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.merged import MergedMeta, built_from_text
from fedmoe.protocol.names import GATEWAY, MERGED
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.problems import Problems
from fedmoe.util.backoff import Backoff
from fedmoe.util.rest import Rest
from fedmoe.util.software import software

logger = logging.getLogger(__name__)

REST = 9.0  # times the CPU time of a rebuild: rebuilding large experts takes a tenth of a core, and no more


class GatewayBuilder:
    """Rebuilds the merged gateway while it holds its lease; see `REST` for how often at most.

    `served` is as in `read_inputs`.
    """

    def __init__(
        self,
        connection: Connection,
        settings: GatewaySettings,
        *,
        holder: str,
        lease_s: float,
        rebalancer: Rebalancer | None = None,
        clock: Callable[[], float] = time.time,
        rest: Rest | None = None,
        served: Served = not_served,
    ) -> None:
        self._store = GatewayStore(connection)
        self._settings = settings
        self._clock = clock
        self._rest = rest or Rest(REST)
        self._served = served
        self._fit: Fit | None = None  # last seen, also one that was given up
        self._problems = Problems(connection, self._store.keys.problem, holder=holder)
        self._experts = ExpertList(self._store)
        self._lease_s = lease_s
        self._lease = lease(
            connection, self._store.keys.lease, holder=holder, ttl_s=lease_s + 2 * settings.interval_s,
            rebalancer=rebalancer, expert=MERGED,
        )  # fmt: skip

    def run(self, stop: threading.Event) -> None:
        """Rebuild until `stop` is set, then once more."""
        backoff = Backoff("merged gateway", logger)
        ending = False
        while not ending:
            ending = stop.wait(self._settings.interval_s)
            try:
                holds = self._lease.hold()
                rests = holds and not (self._rest.is_over or ending)
                if holds and not rests:
                    self.refresh()
                else:
                    self._experts.reconcile()
                if rests:  # if the rebuild before failed, it was not tried again yet
                    self._problems.repeat()
                else:
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
                self._lease.cannot()
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
        """Rebuild if an expert, the list of experts, the settings or the fit changed, or if Redis lost the weights.

        Returns:
            True if it was rebuilt.
        """
        weights = self._experts.reconcile()
        weights.pop(GATEWAY, None)  # the trained gateway is no part of the merged one
        if not weights:
            return False
        fit = self._fit_in_force()
        metas = {name: self._store.meta(name) for name in weights}
        present = {
            n: meta.weights_commit for n, meta in metas.items() if takes_part(n, weights[n], meta, fit)
        }
        merged = self._store.merged()
        built = {name: one.weights_commit for name, one in merged.experts.items()} if merged else None
        if merged and built == present and merged.settings == self._settings_text(weights, fit):
            if self._store.has_weights(merged):
                return False
            logger.warning("merged gateway: Redis has lost its weights, so it is built again")
        with self._rest.after():
            self._build(weights, fit)
        return True

    def _fit_in_force(self) -> Fit | None:
        """The fit by which to build, None if there is none or it was given up; one that Redis lost is put back."""
        found = self._store.fit()
        if found is None and self._fit is not None and self._store.put_back_fit(self._fit):
            logger.warning("merged gateway: Redis had lost its fit, this aggregator wrote it again")
            found = self._fit
        before, self._fit = self._fit, found
        if not (found and found.weights):
            return None
        if self._settings.weights_given and found != before:
            logger.warning(
                "merged gateway: the fit of %s replaces scale and weights until it is given up (fedmoe gateway fit "
                "--remove), so what you gave has no effect: %s",
                found.day,
                ", ".join(self._settings.weights_given),
            )
        return found

    def _settings_text(self, weights: dict[str, float], fit: Fit | None) -> str:
        s = self._settings
        if fit:
            left_out = [name for name, weight in weights.items() if not weight]
            return f"{s.method} fit={fit.id} rank={s.rank}" + (
                f" without={json.dumps(left_out)}" if left_out else ""
            )
        by = json.dumps(weights) if s.weighting == "config" else s.weighting
        return f"{s.method} scale={s.scale:g} rank={s.rank} weights={by}"

    def _build(self, weights: dict[str, float], fit: Fit | None) -> None:
        started = self._clock()
        inputs = read_inputs(self._store, weights, self._settings, fit, self._served)
        spec = inputs.spec
        needs_init = METHODS[self._settings.method].needs_init
        merged = merge(
            inputs.experts,
            method=self._settings.method,
            scale=inputs.scale,
            rank=self._settings.rank or None,
            init=initial_weights(spec.layout, spec.init_seed) if needs_init else None,
        )
        config = spec.adapter_config(rank=merged.rank) | {"lora_alpha": alpha_at(merged.scaling, merged.rank)}
        gateway = MergedMeta(
            built_from=built_from_text(inputs.built_from),
            adapter_config=json.dumps(config),
            method=self._settings.method,
            settings=self._settings_text(weights, fit),
            rank=merged.rank,
            relative_error=merged.relative_error,
            weights=weights_text(inputs.weights),
            fit=fit.id if fit else "",
            updated_at=round(self._clock(), 3),
            build_s=round(self._clock() - started, 3),
            software=software(),
        )
        self._store.write_merged(gateway, merged.buffer.file)
        logger.info(
            "merged gateway: rebuilt from %s%s",
            ", ".join(f"{n} v{p.version}" for n, p in inputs.built_from.items()),
            " by the fit" if fit else "",
        )
