"""What a gateway that every worker trains is worth, beside merges of experts trained apart and centralised training.

    bash ops/bench.sh --only learning --quick            one seed
    bash ops/bench.sh --only learning --keep DIR         all parts; each run is one file in DIR, a run that is there
                                                         is not made again; --part NAME … makes some parts only
    .venv/bin/python -m ops.bench.learning DIR           the table of what is in DIR

Everything happens in one process on a virtual clock that the seed fixes; ledger, codec, judging and fold are the real
ones, and so are the model (SmolLM2-135M-Instruct), the trainer and the demo's three domains.

    runs      what a run is, the workers' mixes, the parts
    virtual   clock, workers, chains; server: the aggregator's side of a chain
    stage     one base model for all chains; lab: rows and held-out losses
    carry     carries a run out and keeps its outcome; report: table, figures, plot
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from ops.bench.learning.carry import outcomes
from ops.bench.learning.report import Line, figures, lines_of, plot, table
from ops.bench.learning.runs import PARTS
from ops.bench.plan import Plan
from ops.bench.result import Result

TABLE, PICTURE = "learning.txt", "learning.png"


def run(plan: Plan) -> Iterator[Result]:
    """All runs of the plan's parts, then the table; with a directory to keep them in, also the plot."""
    learning = plan.learning
    runs = [run for part in learning.parts for run in PARTS[part](learning.rows, learning.seeds)]
    with ExitStack() as stack:
        keep = learning.keep or Path(stack.enter_context(TemporaryDirectory(prefix="fedmoe-learning-")))
        lines = lines_of(list(outcomes(runs, keep)))
    show(lines, learning.keep)
    yield from figures(lines, short=learning.short)


def show(lines: list[Line], keep: Path | None) -> None:
    """Print the table; with a directory, write it and the plot there too."""
    print(table(lines), flush=True)
    if keep:
        (keep / TABLE).write_text(table(lines) + "\n")
        plot(keep / PICTURE, lines)
