"""fedmoe.tools.card and .losses: which losses are known of a version."""

import pytest

from fedmoe.protocol.rollback import RolledBack
from fedmoe.tools.card import card, max_lora_rank
from fedmoe.tools.export import Export
from fedmoe.tools.losses import Validation, training_loss, validation
from tests.federation import first_meta, small_spec


def test_a_training_loss_is_a_number_or_unknown() -> None:
    """A new expert has none."""
    assert training_loss(first_meta(small_spec())) is None
    assert training_loss(first_meta(small_spec(), loss=1.5)) == 1.5


def line(worker: str, loss: object, version: object, rows: str = "r") -> dict[str, str]:
    """A line of the log with a validation loss, as Redis has it."""
    return {"worker": worker, "val_loss": str(loss), "val_version": str(version), "val_set": rows}


def test_the_validation_loss_is_the_last_that_each_worker_measured() -> None:
    """At this version or before; what cannot be read does not count, and without any there is none."""
    lines = [line("a", 3.0, 1), line("b", 2.0, 2), line("a", 1.0, 4), line("b", 9.0, 8), {"worker": "c"}]
    found = validation([*lines, line("d", "x", 3), line("e", "nan", 3)], 5)
    assert found == Validation(version=4, losses={"a r": 1.0, "b r": 2.0})
    assert found.mean == 1.5
    assert Validation.from_json(found.to_json()) == found
    assert validation(lines[4:], 5) is None
    assert validation(lines, 0) is None
    for junk in (None, {}, {"version": 1, "losses": {}}, {"version": 1, "losses": {"a": "x"}}):
        assert Validation.from_json(junk) is None


def test_what_was_rolled_back_is_not_the_validation_loss() -> None:
    """Version 3 has the weights of version 1; the loss of version 2 is of training that is gone."""
    lines = [line("a", 3.0, 1), line("a", 9.0, 2)]
    rolled_back = RolledBack().and_also(1, 2)
    assert validation(lines, 3, rolled_back) == Validation(version=1, losses={"a r": 3.0})
    lines.append(line("a", 2.0, 3))
    assert validation(lines, 4, rolled_back) == Validation(version=3, losses={"a r": 2.0})


def test_a_path_writes_nothing_into_the_card() -> None:
    """A path with line breaks or backticks adds no line and no markup to the card."""
    base = "a`<b>`\n```\n# Heading\n"
    export = Export(
        name="a", file=b"", config={"r": 8, "lora_alpha": 16}, built_from={}, behind={}, info={"base_model": base}
    )  # fmt: skip
    text = card(export)
    assert "# Heading" not in text.splitlines()
    assert "`<b>`" not in text.split("```")[0]
    assert sum(line.startswith("```") for line in text.splitlines()) == 4


def test_losses_on_other_rows_are_not_compared() -> None:
    """Only what both measured counts; nothing in common is no gain and no loss."""
    before = Validation(version=1, losses={"a r": 2.0, "b r": 1.0})
    after = Validation(version=2, losses={"a r": 1.5, "b s": 9.0})
    assert after.gain_over(before) == 0.5
    assert after.gain_over(Validation(version=1, losses={"c r": 1.0})) is None


@pytest.mark.parametrize(("rank", "fits"), [(1, 8), (8, 8), (17, 32), (257, 320), (512, 512), (513, None)])
def test_the_option_that_vllm_needs(rank: int, fits: int | None) -> None:
    """The smallest of its ranks that is enough."""
    assert max_lora_rank(rank) == fits
