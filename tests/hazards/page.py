"""Renders docs/hazards.md from the table of hazards: `python -m tests.hazards.page > docs/hazards.md`."""

import re
from collections.abc import Iterator
from itertools import groupby

from tests.hazards import test_hazards
from tests.hazards.hazard import Hazard
from tests.hazards.table import HAZARDS

HEAD = """# The rules of the protocol

Rendered from the tests' own table by `python -m tests.hazards.page`; a test holds this page equal to the table.

Each row is one way in which a looser protocol fails, and the rule that prevents it. The scenario plays it on a real
server. The suite runs every scenario twice: with all rules, where it must hold, and with only this rule taken out,
where it must fail with the expected sentence. So every rule here is needed.

```sh
.venv/bin/python -m tests.hazards H05
```

prints, for each hazard whose name begins with `H05`, what goes wrong, the rule, and the outcome with and without the
rule; without a name it plays all hazards. [protocol.md](protocol.md) explains the words and the two chains.
"""


COLUMNS = ("| | what goes wrong without the rule | rule | scenario |", "| --- | --- | --- | --- |")


def page() -> str:
    """The page as Markdown: a section for each number, a row for each hazard."""
    parts = [HEAD]
    for number, names in groupby(sorted(HAZARDS), lambda name: name[:3]):
        rows = [_row(name, HAZARDS[name]) for name in names]
        parts.append(f"## {number}: {dict(_titles())[number]}\n\n" + "\n".join([*COLUMNS, *rows]) + "\n")
    return "\n".join(parts)


def _titles() -> Iterator[tuple[str, str]]:
    """Number and title, from the docstring of the tests of the hazards."""
    for line in (test_hazards.__doc__ or "").splitlines():
        if found := re.fullmatch(r"(H\d\d)  (.+)", line):
            yield found[1], found[2]


def _row(name: str, hazard: Hazard) -> str:
    """One row, with a link to the file of the scenario."""
    function = hazard.scenario
    file = f"tests/hazards/{function.__module__.rpartition('.')[2]}.py"
    scenario = f"[`{function.__name__}`](../{file})"
    return f"| {name} | {_cell(hazard.wrong)} | {_cell(hazard.rule)} | {scenario} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(), end="")
