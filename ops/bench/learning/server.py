"""The aggregator's side of one chain: weights, server state, version and heads, by the real rules and the real fold."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from consumers.decide import Admission, Outcome, judge_header
from consumers.payload import Workspace, fold_payload
from fedmoe.protocol.balance import peers_of
from fedmoe.protocol.codec import decode, scratch_values
from fedmoe.protocol.fold import Values, fold
from fedmoe.protocol.formats import EXACT
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.names import domain_of
from fedmoe.protocol.packed import chunks, pack, unpack
from fedmoe.protocol.records import PROTOCOL, Decided, Meta
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.protocol.server import ServerStep, first_value
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from ops.bench.fedmoe_side import FINGERPRINT
from ops.bench.processes import BenchError


class Server:
    """One chain.

    Args:
        name: of the chain; it is also its lineage.
        rules: how its updates are aggregated.
    """

    def __init__(self, name: str, spec: Spec, rules: AggregationRules) -> None:
        self.name, self.spec = name, spec
        self._now = Values(
            initial_weights(spec.layout, spec.init_seed).clone(),
            torch.full((spec.layout.numel,), first_value(rules)),
        )
        self.decided: dict[str, Decided] = {}
        self.staleness: list[int] = []
        self._applied: list[tuple[str, ServerStep, Sequence[bytes]]] = []
        self.meta = Meta(
            lineage=f"{name[:16]:0>16}",
            commit=_commit(0),
            weights_commit=_commit(0),
            spec=spec.digest,
            rules=RuleSet(aggregation=rules),
            protocol=PROTOCOL,
            base_fingerprint=FINGERPRINT,
        )
        self._out = Values(torch.empty_like(self.weights), torch.empty_like(self.weights))
        self._scratch = torch.empty(scratch_values(spec.layout.numel))

    @property
    def weights(self) -> torch.Tensor:
        """The weights (numel,) fp32."""
        return self._now.weights

    def decide(self, worker: str, header: Header, parts: Sequence[bytes]) -> None:
        """Apply an update; anything but applied is an error here.

        Raises:
            BenchError: if it is not applied.
        """
        peers = peers_of(self.name, worker, self.decided, self.meta.version, self.meta.rules.aggregation)
        judged = judge_header(header, self.decided.get(worker), self.meta, self.spec, peers)
        if not isinstance(judged, Admission):
            raise BenchError(f"update {header.id} of {worker} was {judged.outcome.value}: {judged.reason}")
        space = Workspace(self._now, self._out, self._scratch)
        verdict = fold_payload(header, judged, parts, self.spec, space)
        if verdict.outcome is not Outcome.APPLIED:
            raise BenchError(f"update {header.id} of {worker} was {verdict.outcome.value}: {verdict.reason}")
        self._now, self._out = self._out, self._now
        version = self.meta.version + 1
        self.meta = replace(
            self.meta,
            version=version,
            commit=_commit(version),
            weights_commit=_commit(version),
            round_version=version if verdict.ends_round else self.meta.round_version,
        )
        self.decided[worker] = Decided(
            id=header.id, how="applied", version=version, staleness=verdict.staleness
        )
        self.staleness.append(verdict.staleness)
        self._applied.append((worker, judged.step, parts))

    def average(self, locals_: Sequence[torch.Tensor], *, gain: float) -> None:
        """Move the weights `gain` times as far as the mean of these weights (numel,) is away: no ledger, no format."""
        mean = torch.stack(list(locals_)).mean(0)
        self._now.weights.lerp_(mean, gain)
        self.meta = replace(self.meta, version=self.meta.version + 1)
        self.staleness.append(0)

    def without(self, domain: str) -> torch.Tensor:
        """The weights (numel,) fp32 of a replay that leaves the updates of one domain's workers out.

        The other updates are folded as they were decided: with kept updates an operator could do the same.
        """
        rules = self.meta.rules.aggregation
        first = initial_weights(self.spec.layout, self.spec.init_seed).clone()
        now, delta = Values(first, torch.full_like(first, first_value(rules))), torch.empty_like(first)
        for worker, step, parts in self._applied:
            if domain_of(worker) != domain:
                decode(parts, self.spec.wire_format, delta)
                fold(now, delta, step)
        return now.weights

    def pulled(self) -> torch.Tensor:
        """A copy of the weights (numel,) fp32 as a worker pulls them: in the wire format."""
        if self.spec.wire_format == EXACT:
            return self.weights.clone()
        whole = pack(self.weights, self.spec, self.meta.weights_commit)
        content = [whole[first : last + 1] for first, last in chunks(self.spec)]
        weights = unpack(content, self.spec, self.meta.weights_commit)
        assert weights is not None
        return weights


def _commit(version: int) -> str:
    return f"{version:016x}"
