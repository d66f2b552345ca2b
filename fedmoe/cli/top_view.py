"""What `fedmoe top` shows, and what each key does. Pure.

A pane is a table, or the findings. Rows are those of `fedmoe status`, sorted, filtered and scrolled.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedmoe.cli.status import (
    EXPERT_COLUMNS,
    NONE,
    WORKER_COLUMNS,
    expert_rows,
    server_line,
    table,
    worker_rows,
)
from fedmoe.cli.terminal import Line
from fedmoe.protocol.federation import Federation, duration, findings

EXPERTS, WORKERS, REFUSALS, LEFT, FINDINGS = PANES = ("experts", "workers", "refusals", "left", "findings")
COLUMNS = {
    EXPERTS: EXPERT_COLUMNS,
    WORKERS: WORKER_COLUMNS,
    REFUSALS: ("expert", "worker", "update", "reason"),
    LEFT: ("worker", "expert", "how", "ago", "host", "reason"),
    FINDINGS: ("finding",),
}
KEYS = "q quit  Tab 1-5 pane  ↑ ↓ PgUp PgDn scroll  ← → sort by  r reverse  / filter  ? keys"
HELP = (
    "q             quit; so does Ctrl-C",
    "Tab, 1 to 5   next pane, this pane",
    "↑ ↓ j k       scroll by a line",
    "PgUp PgDn     scroll by a page; Home and End by all",
    "← → < >       sort by another column",
    "r             reverse the order",
    "/             show only rows that hold this text; Enter keeps it, Escape shows all rows again",
    "",
    "any key goes back",
)
MIN_LINES = 6
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86_400.0}
_NUMBER = re.compile(r"(-?\d+(?:\.\d+)?)(?: (s|min|h|days))?")


def sort_key(cell: str) -> tuple[int, float, str]:
    """Numbers and durations by value, then texts; what is not known comes last."""
    if cell == NONE:
        return 2, 0.0, ""
    if match := _NUMBER.fullmatch(cell):
        return 0, float(match[1]) * _SECONDS.get(match[2], 1.0), ""
    return 1, 0.0, cell.casefold()


@dataclass(slots=True)
class View:
    """What the user has chosen.

    Args:
        pane: of PANES.
        order: pane → column that it is sorted by, and whether in falling order; without one as read.
        text: rows without it are not shown.
        is_typing: keys go into `text`.
        is_help: the keys are explained.
        first: the first row on the screen; page: number of rows on it, as it was drawn last.
    """

    pane: str = EXPERTS
    order: dict[str, tuple[int, bool]] = field(default_factory=dict)
    text: str = ""
    is_typing: bool = False
    is_help: bool = False
    first: int = 0
    page: int = 1

    def press(self, key: str) -> bool:
        """Do what a key means; False: quit."""
        if self.is_help:
            self.is_help = False
        elif self.is_typing:
            self._type(key)
        elif key in ("q", "Q"):
            return False
        else:
            self._choose(key)
        return True

    def _type(self, key: str) -> None:
        match key:
            case "enter":
                self.is_typing = False
            case "escape":
                self.is_typing, self.text = False, ""
            case "backspace":
                self.text = self.text[:-1]
            case _ if len(key) == 1 and key.isprintable():
                self.text += key
        self.first = 0

    def _choose(self, key: str) -> None:
        match key:
            case "tab" | "shift tab":
                step = 1 if key == "tab" else -1
                self._show(PANES[(PANES.index(self.pane) + step) % len(PANES)])
            case "1" | "2" | "3" | "4" | "5":
                self._show(PANES[int(key) - 1])
            case "up" | "k":
                self.first -= 1
            case "down" | "j":
                self.first += 1
            case "page up":
                self.first -= self.page
            case "page down" | " ":
                self.first += self.page
            case "home" | "g":
                self.first = 0
            case "end" | "G":
                self.first = 10**9
            case "left" | "<":
                self._sort_by(-1)
            case "right" | ">":
                self._sort_by(1)
            case "r":
                column, falls = self.order.get(self.pane, (0, False))
                self.order[self.pane] = column, not falls
            case "/":
                self.is_typing = True
            case "escape":
                self.text = ""
            case "?" | "h":
                self.is_help = True

    def _show(self, pane: str) -> None:
        if pane != self.pane:
            self.pane, self.first = pane, 0

    def _sort_by(self, step: int) -> None:
        count = len(COLUMNS[self.pane])
        column, falls = self.order.get(self.pane, (-1 if step > 0 else 0, False))
        self.order[self.pane] = (column + step) % count, falls

    def chosen(self, rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
        """The rows that hold the text, in the order of the chosen column."""
        wanted = self.text.casefold()
        kept = [row for row in rows if any(wanted in cell.casefold() for cell in row)]
        if self.pane in self.order:
            column, falls = self.order[self.pane]
            kept.sort(key=lambda row: sort_key(row[column]), reverse=falls)
            kept.sort(key=lambda row: row[column] == NONE)  # not known comes last, in either order
        return kept

    def lines(
        self, seen: Federation | None, *, problem: str, now: str, width: int, height: int
    ) -> list[Line]:
        """The screen: at most `height` lines; the first row is moved so that the rows fill it.

        `seen`: the last state that was read, None before the first; `problem`: why there is no newer one.
        """
        if self.is_help:
            return [(text, "") for text in HELP][:height]
        head = [self._title(seen, now), (self._panes(), "reverse")]
        if problem:
            head.append((problem, "red"))
        if height < MIN_LINES:
            return head[:height]
        self.page = max(1, height - len(head) - 2)
        titles, body = self._body(seen, width)
        self.first = max(0, min(self.first, len(body) - self.page))
        shown = body[self.first : self.first + self.page]
        filled = [*shown, *[("", "")] * (self.page - len(shown))]
        return [*head, (titles, "bold"), *filled, (self._foot(len(body), len(shown), width), "dim")]

    def _title(self, seen: Federation | None, now: str) -> Line:
        if seen is None:
            return f"fedmoe top  {now}", "bold"
        counts = (
            f"experts {len(seen.experts)}  workers {len(seen.workers)}  findings {len([*findings(seen)])}"
        )
        return f"fedmoe top  {now}  {counts}  {server_line(seen.server)}", "bold"

    def _panes(self) -> str:
        names = " ".join(
            f"[{n} {name}]" if name == self.pane else f" {n} {name} " for n, name in enumerate(PANES, 1)
        )
        sort = ""
        if self.pane in self.order:
            column, falls = self.order[self.pane]
            sort = f"  sorted by {COLUMNS[self.pane][column]}{' (falling)' if falls else ''}"
        text = f"  filter: {self.text}{'_' if self.is_typing else ''}" if self.text or self.is_typing else ""
        return f"{names}{sort}{text}"

    def _foot(self, count: int, shown: int, width: int) -> str:
        where = f"{self.first + 1}-{self.first + shown} of {count}" if count else "nothing"
        return f"{where}  {KEYS}" if len(where) + 2 + len(KEYS) <= width else f"{where}  q quit  ? keys"

    def _body(self, seen: Federation | None, width: int) -> tuple[str, list[Line]]:
        """The line of titles, and the rows with their styles."""
        if seen is None:
            return "", [("reading ...", "dim")]
        rows = self.chosen(rows_of(seen, self.pane))
        if self.pane == FINDINGS:
            return "", [(line, "yellow") for row in rows for line in textwrap.wrap(row[0], max(width, 20))]
        if not rows:
            return "", []
        titles, *lines = table(COLUMNS[self.pane], rows, width=width)
        odd = _odd(seen, self.pane)
        name = 1 if self.pane == WORKERS else 0
        return titles, [
            (line, "yellow" if tuple(row[: name + 1]) in odd else "")
            for row, line in zip(rows, lines, strict=True)
        ]


def rows_of(seen: Federation, pane: str) -> list[list[str]]:
    """The rows of a pane, a text for each column."""
    match pane:
        case "experts":
            return expert_rows(seen)
        case "workers":
            return worker_rows(seen, limit=None)
        case "refusals":
            return [
                [expert.name, one.worker or NONE, one.seq or one.id, one.reason]
                for expert in seen.experts
                for one in expert.last_dead
            ]
        case "left":
            return [
                [
                    one.name,
                    expert.name,
                    one.how or NONE,
                    duration(one.ago_s),
                    one.host or NONE,
                    one.reason or NONE,
                ]
                for expert in seen.experts
                for one in expert.left
            ]
        case _:
            return [[finding] for finding in findings(seen)]


def _odd(seen: Federation, pane: str) -> set[tuple[str, ...]]:
    """The first cells of the rows that the user should look at."""
    if pane == EXPERTS:
        return {
            (expert.name,)
            for expert in seen.experts
            if expert.problems or expert.lease == "" or (expert.meta and expert.meta.rules.held)
        }
    return (
        {(worker.name, worker.expert) for worker in seen.workers if worker.problem}
        if pane == WORKERS
        else set()
    )
