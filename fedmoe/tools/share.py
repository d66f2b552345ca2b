"""The share of the experts' own gain that each row of the matrix has. Pure.

Perfect routing answers the rows of each domain with that domain's own expert. Its gain over the base model is what the
experts are worth. The share of a row is the part of that gain which the row has:

    share = (base - row) / (base - routed), of the losses' means over all domains that have an expert
"""

import math
from collections.abc import Collection, Mapping, Sequence

from fedmoe.tools.evaluate import BASE, MEAN, Matrix

ROUTED = "routed"
Row = Mapping[str, float | None]  # column -> loss; None if there is none


def routed_losses(matrix: Matrix, experts: Collection[str]) -> dict[str, float | None]:
    """Each domain's loss with its own expert, None without one; the mean is None unless all domains have one."""
    domains = [column for column in matrix[BASE] if column != MEAN]
    own = {domain: matrix[domain][domain] if domain in experts else None for domain in domains}
    known = [loss for loss in own.values() if loss is not None]
    return own | {MEAN: sum(known) / len(known) if len(known) == len(domains) else None}


def shares(matrix: Matrix, experts: Sequence[str]) -> dict[str, float | None]:
    """Each row's share, also that of `routed`, in the order of the table; None where it is undefined.

    It is undefined if no domain has an expert, or the experts gain nothing on their own domains.
    """
    own = {name: loss for name, loss in routed_losses(matrix, experts).items() if loss is not None}
    domains = [name for name in own if name != MEAN]

    def mean(row: Mapping[str, float]) -> float:
        return sum(row[domain] for domain in domains) / len(domains)

    def share(row: Mapping[str, float]) -> float | None:
        if not domains or not (gain := mean(matrix[BASE]) - mean(own)) > 0:
            return None
        value = (mean(matrix[BASE]) - mean(row)) / gain
        return value if math.isfinite(value) else None

    found = {name: share(row) for name, row in matrix.items()}
    before = [BASE, *(name for name in experts if name in matrix)]
    first = {name: found.pop(name) for name in before}
    return first | ({ROUTED: share(own)} if domains else {}) | found


def table_rows(matrix: Matrix, routed: Row, share: Mapping[str, float | None]) -> dict[str, Row]:
    """The rows of the table, with `routed` among them, in the order of `share`."""
    return {name: routed if name == ROUTED else matrix[name] for name in share}


def format_share(share: float | None) -> str:
    """For people, for example `62%`; `-` if it is undefined."""
    return "-" if share is None else f"{round(100 * share)}%"


def format_table(matrix: Matrix, routed: Row, share: Mapping[str, float | None]) -> str:
    """The table as aligned text, one line per row; a star marks the best model of each column."""
    columns = list(matrix[BASE])
    best = {column: min(row[column] for row in matrix.values()) for column in columns}
    width = max(5, *map(len, columns))
    first = max(map(len, share))
    lines = [" " * first + "".join(f"  {column:>{width}} " for column in columns) + "  share"]
    for name, row in table_rows(matrix, routed, share).items():
        cells = []
        for column in columns:
            loss = row[column]
            star = "*" if name != ROUTED and loss == best[column] else " "
            cells.append(f"  {'-' if loss is None else f'{loss:.3f}':>{width}}{star}")
        lines.append(f"{name:<{first}}{''.join(cells)}  {format_share(share[name]):>5}")
    return "\n".join(lines)
