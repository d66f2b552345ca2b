"""What becomes of a validation loss: a worker's curve, a warning, and a hold if workers agree. Pure.

One worker, and so one forged loss, never holds an expert: `AGREEING` workers must measure a worse loss, each compared
with itself. What is decided depends on the header, the versions and the committed state only, never on clocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmoe.protocol.balance import active_of
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rollback import NEVER, RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.update import Header
from fedmoe.protocol.validation import AGREEING, HOLD, Curve, Measured, advance, checked


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What an applied update says of the expert's validation loss.

    Args:
        measured: the measurement, None if there is none that counts.
        odd: why a measurement does not count, as what the worker claims; "" otherwise.
        curve: the worker's curve after it, as JSON; "" for none.
        got_worse: the worker's loss has just become worse, as a sentence; "" otherwise.
    """

    measured: Measured | None = None
    odd: str = ""
    curve: str = ""
    got_worse: str = ""


def counts_since(rules: RuleSet, rolled_back: RolledBack) -> int:
    """The version from which on measurements count: that of the last release or rollback, 0 without one.

    An operator who goes back to an earlier version accepts its losses, also if later versions had lower ones.
    """
    return max(rules.released, rolled_back.made)


def judge(
    header: Header, head: Decided | None, version: int, rules: RuleSet, rolled_back: RolledBack = NEVER
) -> Judged:
    """Judge the validation loss in the header of an update that is applied to this version of the expert.

    `head` is the worker's last decided update, which has the curve before it; `rolled_back` are the expert's rollbacks.
    """
    before, text = (head.curve, head.validation) if head else (None, "")
    found = checked(header.val_loss, header.val_version, header.val_rows, header.val_set, at_most=version)
    if not isinstance(found, Measured):
        return Judged(odd=found or "", curve=text)
    after = advance(before, found, since=counts_since(rules, rolled_back))
    if after is None or after == before:
        return Judged(measured=found, curve=text)
    is_new = after.is_worse and not (before and before.is_worse and before.since == after.since)
    return Judged(measured=found, curve=after.to_json(), got_worse=str(after) if is_new else "")


def reason_to_hold(
    decided: Mapping[str, Decided], version: int, rules: RuleSet, rolled_back: RolledBack = NEVER
) -> str:
    """Why the expert is to be held from this version on, "" if it is not.

    Only workers count that are active (see `fedmoe.protocol.balance`) and measured since the last release or rollback.
    """
    since = counts_since(rules, rolled_back)
    if rules.on_worse != HOLD or rules.held:
        return ""
    worse: dict[str, Curve] = {}
    for name, last in sorted(active_of(decided, version).items()):
        curve = last.curve
        if curve is not None and curve.is_worse and curve.since == since:
            worse[name] = curve
    if len(worse) < AGREEING:
        return ""
    told = "; ".join(f"{name}: {curve}" for name, curve in list(worse.items())[:AGREEING])
    more = f"; and {len(worse) - AGREEING} more" if len(worse) > AGREEING else ""
    return f"the validation loss is worse ({told}{more})"
