"""Routers: which expert answers a prompt. By domain vectors, or by peft's Arrow from the adapters alone.

    domain   the expert whose domain vector is nearest to the base model's hidden state of the prompt answers all of it
    arrow    in each layer, each token takes the expert whose strongest input direction it is most like (peft)

Neither is trained nor needs data. Source of arrow: arXiv 2405.11157.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from fedmoe.errors import SettingsError, UpdateError
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.vectors import DomainVector, mean_of, nearest, of_domain, width_of
from fedmoe.store.gateway import GatewayStore

BY_VECTORS, BY_ARROW = "routed by domain vectors", "arrow"  # rows of `fedmoe evaluate`
LEAST = 2  # experts that a router chooses among
# A token takes one expert: of 1, 2 and 3 the best on the demo's domains. The seed is that of the power iteration which
# finds each adapter's strongest input direction.
ARROW = {"top_k": 1, "rng_seed": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """The domain vectors of experts.

    Args:
        experts: names; row i of `vectors` belongs to the i-th.
        vectors: (e, d) fp32.
        workers, rows: by expert, how many workers' rows its vector is the mean of.
    """

    experts: tuple[str, ...]
    vectors: torch.Tensor
    workers: Mapping[str, int]
    rows: Mapping[str, int]

    def choose(self, states: torch.Tensor) -> list[str]:
        """The expert for each of the prompts' states (n, d), see `fedmoe.model.hidden`."""
        return [self.experts[place] for place in nearest(states, self.vectors).tolist()]


def read_router(store: GatewayStore, specs: Mapping[str, Spec], report: Callable[[str], None]) -> Router:
    """The router of these experts, from the vectors that their workers published.

    `report` is called with a sentence for each expert and each worker that is left out.

    Raises:
        SettingsError: if fewer than two of the experts have a vector.
    """
    gateway = store.vectors(GATEWAY)
    found: dict[str, list[DomainVector]] = {}
    for name, spec in specs.items():
        records = of_domain(name, store.vectors(name), gateway)
        found[name] = list(_usable(name, records, spec, report))
    known = [name for name, vectors in found.items() if vectors]
    if len(known) < LEAST:
        raise SettingsError(_too_few(known, list(specs)), about="vectors")
    for name in found.keys() - set(known):
        report(
            f"{name} has no domain vector, so no prompt is routed to it: none of its workers published one"
        )
    return Router(
        experts=tuple(known),
        vectors=torch.stack([mean_of(found[name]) for name in known]),
        workers={name: len(found[name]) for name in known},
        rows={name: sum(one.rows for one in found[name]) for name in known},
    )


def _usable(
    name: str, records: Mapping[str, bytes], spec: Spec, report: Callable[[str], None]
) -> Iterator[DomainVector]:
    for worker, text in sorted(records.items()):
        try:
            vector = DomainVector.from_json(text)
            vector.check(width_of(spec))
        except UpdateError as error:
            report(f"the domain vector of worker {worker} of {name} is left out: {error}")
        else:
            yield vector


def _too_few(known: Sequence[str], asked: Sequence[str]) -> str:
    what = f"only {known[0]} has" if known else "no expert has"
    return (
        f"{what} a domain vector, and a router chooses among two experts or more ({', '.join(asked)}): a worker "
        "publishes its vector with the first update after its start, unless it has --no-domain-vector"
    )


def check_number(experts: Collection[str]) -> None:
    """Raise SettingsError unless there are two experts or more to choose among."""
    if len(experts) < LEAST:
        raise SettingsError(
            f"a router chooses among two experts or more, and there is {', '.join(experts) or 'none'}",
            about="experts",
        )


def check_alike(specs: Mapping[str, Spec], prints: Mapping[str, str]) -> None:
    """Raise SettingsError unless these experts are adapters of one base model.

    `prints`: the fingerprint of each one's base model, "" if it is not known yet.
    """
    first = next(iter(specs))
    for name, spec in specs.items():
        if spec.base_config != specs[first].base_config or len({prints[name], prints[first]} - {""}) > 1:
            raise SettingsError(
                f"{name} is an adapter of another base model than {first}: leave one of them out (--leave-out {name})",
                about="base_model",
            )


def check_arrow(layouts: Mapping[str, Layout], remedy: str) -> None:
    """Raise SettingsError unless the adapters of these experts have equal tensors, as arrow needs.

    `remedy`: what to do; `{name}` in it is an expert to leave out.
    """
    first = next(iter(layouts))
    for name, layout in layouts.items():
        if layout.tensors != layouts[first].tensors:
            raise SettingsError(
                f"arrow needs adapters of equal rank and targets, and those of {name} and {first} differ: "
                + remedy.format(name=name),
                about="rank",
            )


def routed_losses(
    router: Router, states: Mapping[str, torch.Tensor], losses: Mapping[str, Mapping[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, int]]]:
    """The loss of each example with the expert that it is routed to, by domain; and how many went to which expert.

    Args:
        router: of these experts, or of some of them.
        states: domain -> (n, d), the states of its examples' prompts.
        losses: of each expert on each example.
    """
    chosen = {domain: router.choose(of) for domain, of in states.items()}
    routed = {
        domain: torch.stack([losses[name][domain][place] for place, name in enumerate(names)])
        for domain, names in chosen.items()
    }
    went = {domain: {name: names.count(name) for name in router.experts} for domain, names in chosen.items()}
    return routed, went
