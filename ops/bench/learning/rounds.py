"""Synchronous rounds on the virtual clock: federated averaging, to compare with.

In each round every worker begins with the same weights and takes the same number of steps. The round ends when the
last worker's weights have come; the mean of all then becomes the new weights (McMahan et al. 2017, arXiv 1602.05629,
with equal numbers of rows), or `gain` times as far. Weights travel exactly, in fp32. A worker keeps its optimizer's
moments from round to round.
"""

import random

from ops.bench.learning.runs import GATEWAY, Run
from ops.bench.learning.server import Server
from ops.bench.learning.virtual import Make, Watch


def play_rounds(run: Run, server: Server, make: Make, *, watch: Watch | None = None) -> int:
    """Play the whole run; returns the optimizer steps of all workers together.

    Args:
        run: `sync_s` is the number of steps of each worker in a round.
        server: of the gateway; holds the result.
        make: makes each worker's learner.
        watch: called at the beginning and after each round.
    """
    plans, draw, now = run.workers(), random.Random(f"{run.seed}"), 0.0
    n_steps = round(run.sync_s)
    learners = [make(plan, GATEWAY, server.weights.clone()) for plan in plans]
    n_rounds = round(run.steps / n_steps)
    if watch is not None:
        watch(now)
    for _ in range(n_rounds):
        for learner in learners:
            learner.flat.copy_(server.weights)
            for _ in range(n_steps):
                learner.step()
        server.average([learner.flat for learner in learners], gain=run.gain)
        now += max(
            n_steps / plan.speed + draw.uniform(*run.delay_s) + draw.uniform(*run.delay_s) for plan in plans
        )
        if watch is not None:
            watch(now)
    return n_rounds * n_steps * len(plans)
