"""How many prompts the domain vectors route to their own expert, on SmolLM2-135M with the demo's domains.

Nothing is trained: vectors and states are the base model's. Each domain's vector is the mean of 40 of its training
rows, and the prompts are held out. Beside it stand what was not chosen, the mean over the prompt's tokens, and vectors
with noise (mean of 50 draws).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedmoe.data.encode import Example
from fedmoe.model.base import choose_precision, load_base
from fedmoe.model.hidden import hidden_states, last_token, scaled
from fedmoe.protocol.vectors import DomainVector, nearest
from ops.bench.learning.lab import CPU, THREADS, VECTOR_ROWS, demo_rows
from ops.bench.learning.runs import DOMAINS
from ops.bench.plan import Plan
from ops.bench.result import Result, figure
from producers.vector import some_of

NOISES, DRAWS = (0.25, 0.5, 1.0), 50
Pool = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def mean_over_tokens(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean (b, d) of the states of each prompt's tokens."""
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


POOLS: Mapping[str, Pool] = {"last_token": last_token, "mean_over_tokens": mean_over_tokens}


def run(plan: Plan) -> Iterator[Result]:
    """The part of each domain's rows that goes to its own expert."""
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    train, _, test, pad_id, model_dir = demo_rows()
    model = load_base(model_dir, device=CPU, dtype=torch.float32)
    autocast = choose_precision("auto", CPU)

    def states(examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {name: [] for name in POOLS}
        for batch in hidden_states(model, examples, pad_id=pad_id, device=CPU, autocast=autocast):
            for name, pool in POOLS.items():
                found[name].append(scaled(pool(*batch)))
        return {name: torch.cat(parts) for name, parts in found.items()}

    trained = {name: states(some_of(train[name], VECTOR_ROWS)) for name in DOMAINS}
    tested = {name: states(some_of(test[name], plan.learning.rows)) for name in DOMAINS}
    for pool in POOLS:
        sent = [DomainVector.of(trained[name][pool].mean(0), VECTOR_ROWS).tensor() for name in DOMAINS]
        vectors = torch.stack(sent)
        held_out = [tested[name][pool] for name in DOMAINS]
        for name, right in zip(DOMAINS, _right(held_out, vectors), strict=True):
            yield figure(f"routing_{pool}_{name}", [right], "of rows")
        for noise in NOISES if pool == "last_token" else ():
            drawn = [_right(held_out, vectors + _noise(vectors, noise, seed)) for seed in range(DRAWS)]
            mean = torch.tensor(drawn).mean(0).tolist()
            yield figure(f"routing_{pool}_noise_{noise:g}", mean, "of rows", value=sum(mean) / len(mean))


def _right(states: Sequence[torch.Tensor], vectors: torch.Tensor) -> list[float]:
    """By domain, the part of its states that is nearest to its own vector."""
    return [float((nearest(one, vectors) == place).float().mean()) for place, one in enumerate(states)]


def _noise(vectors: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(vectors.shape, generator=generator) * (noise * 2 / VECTOR_ROWS)
