"""What a gateway that every worker trains is worth, beside merges of experts trained apart and centralised training.

    bash ops/bench.sh --only learning --quick            one seed
    bash ops/bench.sh --only learning --keep DIR         all parts; each run is one file in DIR, a run that is there
                                                         is not made again; --part NAME … makes some parts only
    .venv/bin/python -m ops.bench.learning DIR           the table of what is in DIR

A run happens in one process on a virtual clock that the seed fixes; ledger, codec, judging and fold are the real ones,
and so are the model (SmolLM2-135M-Instruct), the trainer and the demo's three domains. The runs of the part `real`
start real processes.

    runs      what a run is, the workers' mixes, the parts
    virtual   clock, workers, chains; server: the aggregator's side of a chain; rounds: workers that wait
    real      the same in real processes
    stage     one base model for all chains; lab: rows and held-out losses
    carry     carries a run out and keeps its outcome; report: table, figures, plot; times: when a loss is reached
    curves    plots losses over time, also those of `ops.bench.race`
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from ops.bench.learning.carry import Found, outcomes
from ops.bench.learning.curves import plot_times
from ops.bench.learning.report import figures, lines_of, plot, table
from ops.bench.learning.runs import PARTS
from ops.bench.learning.times import arrivals, time_figures, time_table, traced
from ops.bench.plan import Plan
from ops.bench.race_kept import kept_races
from ops.bench.result import Result

TABLE, PICTURE, TIMES = "learning.txt", "learning.png", "learning-time.png"


def run(plan: Plan) -> Iterator[Result]:
    """All runs of the plan's parts, then the table; with a directory to keep them in, also the plots."""
    learning = plan.learning
    runs = [run for part in learning.parts for run in PARTS[part](learning.rows, learning.seeds)]
    with ExitStack() as stack:
        keep = learning.keep or Path(stack.enter_context(TemporaryDirectory(prefix="fedmoe-learning-")))
        found = list(outcomes(runs, keep))
    show(found, learning.keep)
    yield from figures(lines_of(found), short=learning.short)
    yield from time_figures(arrivals(found))


def show(found: Found, keep: Path | None) -> None:
    """Print the tables; with a directory, write them and the plots there too."""
    lines = lines_of(found)
    text = "\n".join(part for part in (table(lines), time_table(arrivals(found))) if part)
    print(text, flush=True)
    if keep:
        (keep / TABLE).write_text(text + "\n")
        plot(keep / PICTURE, lines)
        plot_times(keep / TIMES, traced(found), kept_races(keep.glob("race-*.json")))
