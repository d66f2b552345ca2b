"""What a decided entry leaves: the meta after an applied update, its line of the log, or a dead letter. Pure."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from consumers.decide import Counts, Verdict
from fedmoe.protocol.lines import AppliedLine, DeadLetter, Line
from fedmoe.protocol.records import Entry, Meta
from fedmoe.protocol.update import Header
from fedmoe.protocol.validation import Measured

logger = logging.getLogger(__name__)


def meta_after(meta: Meta, header: Header, verdict: Verdict, counts: Counts) -> Meta:
    """The meta after an applied update that counts so many rows and tokens; the commit id is not changed."""
    return replace(
        meta,
        version=meta.version + 1,
        applied=meta.applied + 1,
        staleness_sum=meta.staleness_sum + verdict.staleness,
        loss=header.loss,
        n_examples=meta.n_examples + counts.n_examples,
        n_tokens=meta.n_tokens + counts.n_tokens,
        round_version=meta.version + 1 if verdict.ends_round else meta.round_version,
    )


def line_of(
    worker: str, meta: Meta, header: Header, verdict: Verdict, counts: Counts,
    *, measured: Measured | None, kept: str,
) -> AppliedLine:  # fmt: skip
    """The line of the log.

    Args:
        worker: whose update it is.
        meta: after the update.
        header: of the update.
        verdict: of the update.
        counts: rows and tokens that it counts for.
        measured: the validation loss that it brought, if there is one.
        kept: digest of the kept update, "" if it was not kept.
    """
    is_clamped = _is_clamped(header, counts)
    return AppliedLine(
        version=meta.version,
        worker=worker,
        run=header.run,
        seq=header.seq,
        base_version=header.base_version,
        staleness=verdict.staleness,
        factor=verdict.factor,
        weight=verdict.weight,
        ends_round=int(verdict.ends_round),
        new_state=int(verdict.new_state),
        norm=verdict.norm,
        loss=header.loss,
        n_examples=counts.n_examples,
        rules=meta.rules.number,
        prev=str(header.prev or ""),
        claimed_examples=header.n_examples if is_clamped else None,
        claimed_tokens=header.n_tokens if is_clamped else None,
        **(measured.fields if measured else {}),
        update=kept,
    )


def _is_clamped(header: Header, counts: Counts) -> bool:
    return counts != (header.n_examples, header.n_tokens)


def letter_of(worker: str, header: Header, reason: str) -> DeadLetter:
    """The dead letter of a refused update."""
    return DeadLetter(
        reason=reason, worker=worker, run=header.run, seq=header.seq, loss=header.loss, n_examples=header.n_examples,
    )  # fmt: skip


def letter_of_garbage(entry: Entry, reason: str) -> DeadLetter:
    """The dead letter of an entry that is no update, with the beginning of its first fields."""
    fields = ", ".join(f"{name}={value}"[:80] for name, value in list(entry.fields.items())[:8])
    return DeadLetter(reason=reason, entry=entry.id, fields=fields[:400])


def tell_clamped(expert: str, worker: str, header: Header, counts: Counts) -> None:
    """Warn if an update claims more rows or tokens than it counts for."""
    if _is_clamped(header, counts):
        logger.warning(
            "%s: worker %s claims %d rows and %d tokens in one update; it is applied, but counts as only %d rows "
            "and %d tokens: check that worker",
            expert, worker, header.n_examples, header.n_tokens, *counts,
        )  # fmt: skip


def tell_applied(expert: str, log: Sequence[Line]) -> None:
    """Say of each update in these lines of the log that it was applied."""
    for line in log:
        if "worker" in line:
            logger.info(
                "%s version %s: %s seq %s, staleness %s, factor %.3g, norm %s, loss %s", expert, line["version"],
                line["worker"], line["seq"], line["staleness"], float(line["factor"]), line["norm"], line["loss"],
            )  # fmt: skip
