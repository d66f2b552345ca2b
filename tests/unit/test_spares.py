"""producers.spares: memory is used again, and never by two at once."""

import pytest
import torch

from producers.spares import KEPT, Spares

SIZE = 4


def test_a_vector_in_use_is_not_handed_out() -> None:
    """Neither one that was taken, nor one that was given back and taken again."""
    spares = Spares(SIZE)
    first, second = spares.take(), spares.take()
    assert first.data_ptr() != second.data_ptr()
    spares.give(first)
    assert spares.take().data_ptr() == first.data_ptr()
    assert spares.take().data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_only_few_are_kept() -> None:
    """What was given back beyond that is memory of nobody."""
    spares = Spares(SIZE)
    given = [torch.empty(SIZE) for _ in range(KEPT + 2)]
    for one in given:
        spares.give(one)
    there = {spares.take().data_ptr() for _ in range(KEPT + 2)}
    assert len(there & {one.data_ptr() for one in given}) == KEPT


def test_what_does_not_fit_is_copied_all_the_same() -> None:
    """Of another size, or another type: in memory of its own, and it is no spare vector afterwards."""
    spares = Spares(SIZE)
    for odd in (torch.arange(3.0), torch.arange(SIZE), torch.tensor(1.0), torch.ones(2, 2)):
        copy = spares.copy(odd)
        assert torch.equal(copy, odd)
        assert copy.data_ptr() != odd.data_ptr()
        spares.give(copy)
        assert spares.take().data_ptr() != copy.data_ptr()


def test_the_copy_is_of_its_own() -> None:
    """It does not move with what it was copied from."""
    spares, vector = Spares(SIZE), torch.arange(float(SIZE))
    copy = spares.copy(vector)
    vector += 1
    assert copy.tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_defaults_of_a_foreign_loop_change_nothing(dtype: torch.dtype) -> None:
    """Loading a model with transformers sets the default dtype meanwhile, and a loop may set the default device."""
    vector, before = torch.tensor([1.0001, 2.0, 3.0, 4.0], dtype=torch.float32), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            spares = Spares(SIZE)
            copy, taken = spares.copy(vector), spares.take()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(copy, vector)
    assert (taken.dtype, taken.device) == (torch.float32, torch.device("cpu"))


def test_a_vector_that_was_made_in_inference_mode_can_be_used_elsewhere() -> None:
    """A loop may leave the federation amid an evaluation; the sync thread, which is in no such mode, writes into it."""
    spares, vector = Spares(SIZE), torch.ones(SIZE)
    with torch.inference_mode():
        spares.give(spares.copy(vector))
    assert torch.equal(torch.sub(vector, vector, out=spares.take()), torch.zeros(SIZE))
