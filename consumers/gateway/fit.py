"""The job of `fedmoe gateway fit`: reads experts and validation rows, and fits the weights of the merged gateway."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from consumers.gateway.inputs import as_input
from consumers.gateway.merge import MergeInput
from consumers.gateway.search import Objective, loaded, search
from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import open_data
from fedmoe.errors import DataError, FedMoEError, SpecError, UnknownExpertError
from fedmoe.protocol.fit import Fit, FitRows, FittedOn, Weights, weights_text
from fedmoe.protocol.identity import expert_template
from fedmoe.protocol.merged import MergedMeta
from fedmoe.protocol.merged_view import weights_line
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import FitSettings
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.base import load
from fedmoe.tools.rows import Encoder, find_validation_files
from fedmoe.util.software import software


@dataclass(frozen=True, slots=True, kw_only=True)
class _Experts:
    """The experts to fit, by name."""

    specs: Mapping[str, Spec]
    metas: Mapping[str, Meta]
    inputs: Mapping[str, MergeInput]


def fit_gateway(
    store: GatewayStore,
    settings: FitSettings,
    *,
    report: Callable[[str], None],
    clock: Callable[[], float] = time.time,
) -> Fit:
    """Fit the weights of the merged gateway, and write them to Redis.

    `report` is called with a line for everything that is read, left out or computed.

    Raises:
        FedMoEError: if settings, data, base model and experts do not fit together; nothing was written then.
    """
    store.check_may_write_fit()  # before a search that may take hours
    bad_rows = BadRows(report=report, file=settings.bad_rows)
    experts = _read(store, report)
    files = find_validation_files(settings.data, list(experts.specs))
    if files.keys() <= experts.specs.keys():  # else some rows are pooled, and may be of any domain
        for name in sorted(experts.specs.keys() - files.keys()):
            report(
                f"no validation rows of {name} are given: its weight is chosen by the other domains, and may become 0 "
                f"(add --data {name}=FILE)"
            )
    data = {domain: open_data(file, bad_rows) for domain, file in files.items()}
    templates = {name: expert_template(spec, experts.metas[name]) for name, spec in experts.specs.items()}
    base = load(settings, experts.specs, experts.metas, templates, report)
    encoder = Encoder(
        tokenizer=base.tokenizer,
        config=base.config,
        templates=templates,
        max_length=max(meta.rules.training.max_length for meta in experts.metas.values()),
        learn=settings.learn,
        bad_rows=bad_rows,
        report=report,
    )
    domains = {name: encoder.examples(name, file, sample=settings.rows) for name, file in data.items()}
    first = next(iter(experts.specs.values()))
    with (
        loaded(base, experts.inputs, first) as model,
        Objective(
            model, experts.inputs, domains,
            pad_id=base.pad_id, batch_size=settings.batch_size, device=base.device, autocast=base.autocast,
            report=report,
        ) as objective,
    ):  # fmt: skip
        found = search(
            objective, n_groups=settings.layer_groups, max_passes=settings.max_passes, present=_present(store)
        )
    if not any(weight for weights in found.weights.values() for weight in weights):
        raise DataError(
            "no expert lowers the loss on these rows, all weights would be 0: nothing was written; are they rows of "
            "the experts' domains?",
            about="weights",
        )
    fit = Fit(
        weights=weights_text(found.weights),
        fitted_on=json.dumps(
            {n: FittedOn(m.version, m.weights_commit, m.lineage)._asdict() for n, m in experts.metas.items()}
        ),
        data=json.dumps({n: FitRows(len(rows), data[n].digest)._asdict() for n, rows in domains.items()}),
        loss=found.loss,
        before=json.dumps(found.before),
        fitted_at=round(clock(), 3),
        software=software(),
    )
    try:
        store.write_fit(fit)
    except FedMoEError:  # the search may have taken hours
        report(f"found, but not written: loss {found.loss:.4f}, weights {weights_line(fit.by_expert)}")
        raise
    return fit


def _read(store: GatewayStore, report: Callable[[str], None]) -> _Experts:
    """The experts that have a gateway weight and were trained; the others are reported and left out."""
    specs, metas, inputs = {}, {}, {}
    for name, weight in store.experts().items():
        if name == GATEWAY:
            continue
        if not weight:
            report(f"{name} is left out: its gateway weight is 0")
            continue
        spec = store.spec(name)
        meta, file = store.read(name)
        if not meta.version:
            report(f"{name} is left out, also of the gateway until the next fit: it was not trained yet")
            continue
        specs[name], metas[name], inputs[name] = spec, meta, as_input(spec, file)
    if not inputs:
        raise UnknownExpertError(
            "there are no trained experts to merge yet: train some first", about="experts"
        )
    return _Experts(specs=specs, metas=metas, inputs=inputs)


def _present(store: GatewayStore) -> Weights:
    """The weights by which the merged gateway is built now; empty if there is none, or they are unknown."""
    try:
        return (store.merged() or MergedMeta()).by_expert
    except SpecError:
        return {}
