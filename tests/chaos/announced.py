"""What the processes of a run said when Redis had an older state: the sentences of their logs, counted."""

import re
from collections.abc import Iterable
from pathlib import Path

_WRITTEN_BACK = re.compile(r"this aggregator wrote it back from memory")
_MISSING = re.compile(r"(\d+) updates are missing, (\d+) of them are resent")
_RESENT = re.compile(r"version \d+ now; this worker sends (\d+) updates? again")
_LOST = re.compile(r"the updates (after \S+ up to \S+) are lost")


def announced(logs: Iterable[Path]) -> str:
    """One line: how often memory was written back, what was missing where it could not be, and who sent again."""
    text = "\n".join(log.read_text(errors="replace") for log in logs if log.exists())
    missing = [tuple(map(int, found)) for found in _MISSING.findall(text)]
    resent = [int(found) for found in _RESENT.findall(text)]
    lost = _LOST.findall(text)
    what = [
        f"written back from memory {len(_WRITTEN_BACK.findall(text))} times",
        f"{len(missing)} times somebody had committed first",
        f"then {sum(n for n, _ in missing)} updates were missing, {sum(n for _, n in missing)} were sent again",
        f"workers sent {sum(resent)} again and announced {len(lost)} losses",
        *lost,
    ]
    return f"older states: {'; '.join(what)}"
