"""`python -m ops.bench.learning DIR`: the table and the plot of the runs that are kept in DIR."""

import sys
from pathlib import Path

from ops.bench.learning import show
from ops.bench.learning.carry import kept


def main(arguments: list[str]) -> int:
    """Print the table; 2 if there is nothing to show."""
    found = kept(Path(arguments[0])) if len(arguments) == 1 else []
    if not found:
        print("ops.bench.learning: give one directory that `ops/bench.sh --keep` wrote", file=sys.stderr)
        return 2
    show(found, Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
