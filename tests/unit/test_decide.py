"""consumers.decide.judge_payload: an update that is folded part by part gives the same bits as one folded whole."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from consumers.decide import Outcome, Verdict, Workspace, judge_payload
from consumers.fold import fold
from fedmoe.codec import FORMATS, decode, scratch_values
from fedmoe.layout import Layout
from fedmoe.spec import MergeRules, Spec
from fedmoe.update import Part, make_run
from producers.ledger import Ledger, Outgoing, Trained
from tests.federation import first_meta, small_spec
from tests.strategies import randn

FACTOR = 0.3217
VERDICT = Verdict(Outcome.APPLIED, factor=FACTOR)


def update_of(delta: torch.Tensor, wire_format: str) -> tuple[Spec, Outgoing]:
    spec = small_spec(
        layout=Layout.of([("a", (len(delta),))]), merge=MergeRules(max_norm=1e9), wire_format=wire_format
    )
    ledger = Ledger(base=torch.zeros(len(delta)), meta=first_meta(spec), run=make_run(1, "00000001"))
    return spec, ledger.cut(
        ledger.progress(delta), Trained(steps=1), wire_format=wire_format, fingerprint="f"
    )


def space_for(weights: torch.Tensor) -> Workspace:
    scratch = torch.full((scratch_values(len(weights)),), torch.nan)
    return Workspace(weights, torch.full_like(weights, torch.nan), scratch)


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_parts_give_the_same_bits_as_the_whole(wire_format: str) -> None:
    """Three parts, the last one odd; the weights that it was folded from stay as they are."""
    numel = 2 * FORMATS[wire_format].values_per_part + 77
    delta, weights = randn(1, numel), randn(2, numel)
    spec, update = update_of(delta, wire_format)
    assert len(update.parts) == 3
    space = space_for(weights.clone())
    verdict = judge_payload(update.header, VERDICT, iter(update.parts), spec, space)
    assert verdict.outcome is Outcome.APPLIED
    assert torch.equal(space.weights, weights)
    decode(update.parts, wire_format, delta)
    assert verdict.norm == pytest.approx(
        float(torch.linalg.vector_norm(delta, dtype=torch.float64)), rel=1e-4
    )
    fold(weights, delta, FACTOR)
    assert torch.equal(space.out, weights)


def test_no_more_than_one_part_is_asked_for_at_a_time() -> None:
    """The first part is folded before the second is read: memory does not grow with the adapter."""
    numel = 3 * FORMATS["fp32"].values_per_part
    spec, update = update_of(torch.ones(numel), "fp32")
    space = space_for(torch.zeros(numel))

    def parts() -> Iterator[bytes]:
        for number, part in enumerate(update.parts):
            done = number * FORMATS["fp32"].values_per_part
            assert space.out[:done].eq(FACTOR).all()
            assert space.out[done:].isnan().all()
            yield part

    assert judge_payload(update.header, VERDICT, parts(), spec, space).outcome is Outcome.APPLIED


@pytest.mark.parametrize(
    ("number", "damage", "outcome", "reason"),
    [
        (0, b"", Outcome.UNDECIDABLE, "part 0 of 3 is missing"),
        (2, b"", Outcome.UNDECIDABLE, "part 2 of 3 is missing"),
        (1, b"\x00" * 100, Outcome.UNDECIDABLE, "part 1 of 3 is damaged"),
    ],
)
def test_update_that_is_not_whole_is_undecidable(
    number: int, damage: bytes, outcome: Outcome, reason: str
) -> None:
    """Whichever part it is."""
    numel = 3 * FORMATS["fp32"].values_per_part
    spec, update = update_of(torch.ones(numel), "fp32")
    parts = list(update.parts)
    parts[number] = damage
    verdict = judge_payload(update.header, VERDICT, parts, spec, space_for(torch.zeros(numel)))
    assert (verdict.outcome, verdict.reason) == (outcome, reason)


def test_part_that_its_header_names_and_the_layout_does_not_is_refused() -> None:
    """Two parts in each other's place: their worker announced them so, and sending again would change nothing."""
    numel = 3 * FORMATS["fp32"].values_per_part
    spec, update = update_of(torch.ones(numel), "fp32")
    parts = [update.parts[1], update.parts[0], update.parts[2]]
    header = replace(update.header, parts=tuple(Part.of(part) for part in parts))
    verdict = judge_payload(header, VERDICT, parts, spec, space_for(torch.zeros(numel)))
    assert verdict.outcome is Outcome.REFUSED
    assert "part 0 says first" in verdict.reason
