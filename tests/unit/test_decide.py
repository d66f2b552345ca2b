"""consumers.decide: what is refused and why, what an update counts for, and that parts give the bits of the whole."""

import math
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from consumers.decide import (
    COUNTED_STEPS,
    Admission,
    Outcome,
    Payload,
    counts_of,
    judge_header,
    judge_payload,
)
from consumers.payload import MANY_PARTS, Workspace, fold_payload
from fedmoe.protocol.balance import Peers
from fedmoe.protocol.codec import decode, scratch_values
from fedmoe.protocol.fold import Values, fold
from fedmoe.protocol.formats import FORMATS
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.rules import SERVER_OPTIMIZERS, AggregationRules, TrainingSettings
from fedmoe.protocol.server import ServerStep
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Part, make_run
from fedmoe.util.threads import ALONE, Threads
from producers.ledger import Ledger, Outgoing, Trained
from tests.federation import FINGERPRINT, admission, aggregating, first_meta, small_spec
from tests.strategies import randn

FACTOR = 0.3217
ADMISSION = admission(factor=FACTOR)


def update_of(delta: torch.Tensor, wire_format: str, layout: Layout | None = None) -> tuple[Spec, Outgoing]:
    spec = small_spec(
        layout=layout or Layout.of([("a", (len(delta),))]),
        wire_format=wire_format,
    )
    ledger = Ledger(base=torch.zeros(len(delta)), meta=first_meta(spec), run=make_run(1, "00000001"))
    return spec, ledger.make_update(ledger.cut(delta, wire_format), Trained(steps=1), fingerprint="f")


def space_for(weights: torch.Tensor) -> Workspace:
    scratch = torch.full((scratch_values(len(weights)),), torch.nan)
    unused = torch.full_like(weights, torch.nan)  # a server state: sgd reads and writes none
    return Workspace(Values(weights, unused), Values(torch.full_like(weights, torch.nan), unused), scratch)


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
def test_parts_give_the_same_bits_as_the_whole(wire_format: str) -> None:
    """Three parts, the last one odd; the weights that it was folded from stay as they are."""
    numel = 2 * FORMATS[wire_format].values_per_part + 77
    delta, weights = randn(1, numel), randn(2, numel)
    spec, update = update_of(delta, wire_format)
    assert len(update.parts) == 3
    space = space_for(weights.clone())
    verdict = fold_payload(update.header, ADMISSION, iter(update.parts), spec, space)
    assert verdict.outcome is Outcome.APPLIED
    assert torch.equal(space.now.weights, weights)
    decode(update.parts, wire_format, delta)
    assert verdict.norm == pytest.approx(
        float(torch.linalg.vector_norm(delta, dtype=torch.float64)), rel=1e-4
    )
    fold(Values(weights, weights), delta, ADMISSION.step)
    assert torch.equal(space.out.weights, weights)


LARGE = (MANY_PARTS - 1) * FORMATS["int4"].values_per_part + 77


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    """Threads, more than this machine has cores."""
    with ThreadPoolExecutor(3) as executor:
        yield executor


@pytest.mark.parametrize("optimizer", SERVER_OPTIMIZERS)
def test_threads_give_the_same_bits(pool: Executor, optimizer: str) -> None:
    """Each part has its own place, and norms are added up in order of the parts."""
    weights, state = randn(2, LARGE), randn(3, LARGE).abs()
    spec, update = update_of(randn(1, LARGE), "int4")
    assert len(update.parts) == MANY_PARTS
    step = ServerStep(AggregationRules(server_optimizer=optimizer, max_norm=1e9), FACTOR, ends_round=True)
    admitted = replace(ADMISSION, step=step)
    found = []
    for threads in (ALONE, Threads(pool, 3)):
        out = Values(torch.empty(LARGE), torch.zeros(LARGE))
        space = Workspace(Values(weights, state), out, torch.empty(scratch_values(LARGE)), threads)
        verdict = fold_payload(update.header, admitted, iter(update.parts), spec, space)
        assert verdict.outcome is Outcome.APPLIED
        found.append((verdict.norm, out))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1].weights, found[1][1].weights)
    assert torch.equal(found[0][1].state, found[1][1].state)


def test_the_first_wrong_part_decides_whichever_thread_is_first(pool: Executor) -> None:
    """Undecidable or refused, as one thread finds it."""
    spec, update = update_of(torch.ones(LARGE), "int4")
    parts = list(update.parts)
    parts[2], parts[5] = b"damaged", parts[4]
    announced = [*update.header.parts[:5], Part.of(parts[5]), *update.header.parts[6:]]
    header = replace(update.header, parts=tuple(announced))
    space = replace(space_for(torch.zeros(LARGE)), threads=Threads(pool, 3))
    assert fold_payload(header, ADMISSION, parts, spec, space).outcome is Outcome.UNDECIDABLE
    parts[2] = update.parts[2]
    verdict = fold_payload(header, ADMISSION, parts, spec, space)
    assert verdict.outcome is Outcome.REFUSED
    assert "part 5 says first" in verdict.reason


def test_no_more_than_one_part_is_asked_for_at_a_time() -> None:
    """The first part is folded before the second is read: memory does not grow with the adapter."""
    numel = 3 * FORMATS["fp32"].values_per_part
    spec, update = update_of(torch.ones(numel), "fp32")
    space = space_for(torch.zeros(numel))

    def parts() -> Iterator[bytes]:
        for number, part in enumerate(update.parts):
            done = number * FORMATS["fp32"].values_per_part
            assert space.out.weights[:done].eq(FACTOR).all()
            assert space.out.weights[done:].isnan().all()
            yield part

    assert fold_payload(update.header, ADMISSION, parts(), spec, space).outcome is Outcome.APPLIED


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
    verdict = fold_payload(update.header, ADMISSION, parts, spec, space_for(torch.zeros(numel)))
    assert (verdict.outcome, verdict.reason) == (outcome, reason)


def test_part_that_its_header_names_and_the_layout_does_not_is_refused() -> None:
    """Two parts in each other's place: their worker announced them so, and sending again would change nothing."""
    numel = 3 * FORMATS["fp32"].values_per_part
    spec, update = update_of(torch.ones(numel), "fp32")
    parts = [update.parts[1], update.parts[0], update.parts[2]]
    header = replace(update.header, parts=tuple(Part.of(part) for part in parts))
    verdict = fold_payload(header, ADMISSION, parts, spec, space_for(torch.zeros(numel)))
    assert verdict.outcome is Outcome.REFUSED
    assert "part 0 says first" in verdict.reason


TENSORS = Layout.of(
    [("a", (64,)), ("b", (8, 40)), ("c", (64,))]
)  # b has most values; a border lies within a block


@pytest.mark.parametrize("wire_format", sorted(FORMATS))
@pytest.mark.parametrize("value", [1e9, 1e30, 3e38])
def test_enormous_update_breaks_the_norm_bound(wire_format: str, value: float) -> None:
    """Its norm, or the square of it, is beyond fp32; every value is finite, so that is not what the reason says."""
    spec, update = update_of(torch.full((TENSORS.numel,), value), wire_format, TENSORS)
    space = space_for(torch.zeros(TENSORS.numel))
    verdict = fold_payload(update.header, ADMISSION, update.parts, spec, space)
    assert verdict.outcome is Outcome.REFUSED
    assert "is above max_norm 1e+09, largest in tensor 'b': check" in verdict.reason
    norm = float(verdict.reason.split()[2])
    assert norm == pytest.approx(value * math.sqrt(TENSORS.numel), rel=0.01)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensor_that_is_not_finite_is_named(value: float) -> None:
    """One value of the last tensor, while another is larger than all that is finite there."""
    delta = torch.full((TENSORS.numel,), 1e30)
    delta[-1] = value
    spec, update = update_of(delta, "fp32", TENSORS)
    verdict = fold_payload(
        update.header, ADMISSION, update.parts, spec, space_for(torch.zeros(TENSORS.numel))
    )
    assert verdict.outcome is Outcome.REFUSED
    assert verdict.reason.startswith("holds NaN or infinity, first in tensor 'c': check")


@pytest.mark.parametrize(
    ("claimed", "counted"),
    [
        ((0, 0), (0, 0)),
        ((84, 4000), (84, 4000)),
        ((2**53, 2**53), (COUNTED_STEPS * 6, COUNTED_STEPS * 6 * 32)),
        ((2**53, 5), (COUNTED_STEPS * 6, 5)),
    ],
)
def test_an_update_counts_for_a_bounded_number_of_rows(
    claimed: tuple[int, int], counted: tuple[int, int]
) -> None:
    """The bound is the rules' batch times a constant: claiming more steps changes nothing."""
    training = TrainingSettings(batch_size=3, accumulate=2, max_length=32)
    _, update = update_of(torch.ones(4), "fp32")
    for steps in (1, 2**53):
        header = replace(update.header, n_examples=claimed[0], n_tokens=claimed[1], steps=steps)
        assert counts_of(header, training) == counted


@pytest.mark.parametrize(
    ("base_version", "admitted"),
    [(7, True), (10, True), (13, True), (14, False), (2**53, False), (6, False)],
)
def test_base_may_be_as_far_ahead_as_behind(base_version: int, admitted: bool) -> None:
    """Expert at version 10, bound 3. After a failover, what is sent again is ahead; it has staleness 0."""
    spec = small_spec()
    meta = first_meta(spec, version=10, rules=aggregating(max_staleness=3))
    ledger = Ledger(base=torch.zeros(spec.layout.numel), meta=meta, run=make_run(1, "00000001"))
    update = ledger.make_update(
        ledger.cut(torch.ones(spec.layout.numel), "fp32"), Trained(), fingerprint=FINGERPRINT
    )
    judged = judge_header(replace(update.header, base_version=base_version), None, meta, spec, Peers(1))
    assert judged.staleness == max(0, 10 - base_version)
    assert isinstance(judged, Admission) == admitted
    if not isinstance(judged, Admission):
        assert judged.outcome is Outcome.REFUSED
    if base_version > 13:
        assert judged.reason.startswith(
            f"it started from version {base_version}, but the expert is at version 10"
        )


@pytest.mark.parametrize(
    ("payload", "outcome"),
    [
        (Payload(norm=2.0), Outcome.APPLIED),
        (Payload(norm=2.5, largest="a"), Outcome.REFUSED),
        (Payload(norm=math.inf, largest="a"), Outcome.REFUSED),
        (Payload(norm=math.nan, largest="a"), Outcome.REFUSED),
        (Payload(malformed="part 0 says count 1, expected 2"), Outcome.REFUSED),
        (Payload(not_whole="part 0 of 1 is missing"), Outcome.UNDECIDABLE),
    ],
)
def test_payload_is_judged_by_what_it_turned_out_to_be(payload: Payload, outcome: Outcome) -> None:
    """Only what is not whole is its worker's to send again; a refusal keeps the staleness, and names its reason."""
    verdict = judge_payload(admission(staleness=3, factor=0.5, max_norm=2.0), payload)
    assert verdict.outcome is outcome
    assert payload.not_whole in verdict.reason
    assert payload.malformed in verdict.reason
    assert payload.largest in verdict.reason
    assert verdict.staleness == (0 if outcome is Outcome.UNDECIDABLE else 3)
    assert verdict.factor == (0.5 if outcome is Outcome.APPLIED else 0.0)
