"""The result of one check by `fedmoe doctor`: a line that says what to do."""

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line: `level` is ok, warn or fail, `what` the thing checked, `text` the finding and what to do."""

    level: str
    what: str
    text: str
