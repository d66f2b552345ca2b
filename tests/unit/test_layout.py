"""fedmoe.protocol.layout: one flat vector, its tensors, and the safetensors file around it."""

import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given

from fedmoe.errors import SpecError
from fedmoe.protocol.layout import AdapterBuffer, Layout, stamp_of
from tests.errors import raises
from tests.strategies import layouts, randn, seeds

PAIR = Layout.of([("b", (2,)), ("a", (2, 3))])


def filled(layout: Layout, seed: int = 0) -> AdapterBuffer:
    buffer = AdapterBuffer(layout)
    buffer.flat.copy_(randn(seed, layout.numel))
    return buffer


def flat_of(layout: Layout, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    assert tensors.keys() == dict(layout.tensors).keys()
    return torch.cat([tensors[name].flatten() for name, _ in layout.tensors])


@given(layouts(), seeds)
def test_views_cover_the_vector_in_order(layout: Layout, seed: int) -> None:
    """Each value of the flat vector belongs to exactly one tensor."""
    flat = randn(seed, layout.numel)
    views = layout.views(flat)
    assert {name: tuple(view.shape) for name, view in views.items()} == dict(layout.tensors)
    assert torch.equal(flat_of(layout, views), flat)


@given(layouts())
def test_views_write_through(layout: Layout) -> None:
    """Writing to every view writes every value of the flat vector."""
    flat = torch.zeros(layout.numel)
    for view in layout.views(flat).values():
        view.add_(1)
    assert torch.equal(flat, torch.ones(layout.numel))


@given(layouts())
def test_order_of_the_pairs_does_not_matter(layout: Layout) -> None:
    """Every party gets the same layout of the same tensors."""
    assert Layout.of(reversed(layout.tensors)) == layout


@given(layouts(), seeds)
def test_bf16_file_is_what_safetensors_reads(layout: Layout, seed: int) -> None:
    """Each value rounded once, under the same names, with the same stamp."""
    buffer = filled(layout, seed)
    buffer.stamp("0123456789abcdef")
    file = layout.bf16_file(buffer.file)
    tensors = safetensors.torch.load(file)
    assert tensors.keys() == dict(layout.tensors).keys()
    assert torch.equal(flat_of(layout, tensors), buffer.flat.to(torch.bfloat16))
    assert stamp_of(file) == "0123456789abcdef"


@given(layouts(), seeds)
def test_the_file_is_what_safetensors_reads(layout: Layout, seed: int) -> None:
    """The safetensors library reads the buffer's file as exactly the views of the flat vector."""
    buffer = filled(layout, seed)
    tensors = safetensors.torch.load(bytes(buffer.file))
    assert tensors.keys() == dict(layout.tensors).keys()
    assert torch.equal(flat_of(layout, tensors), buffer.flat)
    assert len(buffer.file) == layout.file_bytes


@given(layouts(), seeds)
def test_a_file_can_be_loaded_again(layout: Layout, seed: int) -> None:
    """load(file) takes over the values, and folding into `flat` shows in `file` at once."""
    buffer, copy = filled(layout, seed), AdapterBuffer(layout)
    copy.load(bytes(buffer.file))
    assert copy.file == buffer.file
    copy.flat.add_(1)
    assert torch.equal(flat_of(layout, safetensors.torch.load(bytes(copy.file))), buffer.flat + 1)


def test_loading_makes_no_second_copy() -> None:
    """Taking over a file needs no memory besides the block that is there."""
    layout = Layout.of([("a", (1024, 1024))])
    buffer, file = AdapterBuffer(layout), bytes(filled(layout).file)
    tracemalloc.start()
    try:
        buffer.load(file)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_another_file_is_refused(damage: str) -> None:
    """A file of another layout, or cut off, is no adapter of this spec."""
    file = bytes(filled(PAIR).file)
    other = {"short": file[:-1], "long": file + b"\0", "header": file.replace(b"F32", b"I32"), "empty": b""}
    with raises(SpecError, about="weights"):
        AdapterBuffer(PAIR).load(other[damage])


def test_the_file_cannot_be_written() -> None:
    """What goes to Redis is a read-only view."""
    with pytest.raises(TypeError, match="read-only"):
        AdapterBuffer(PAIR).file[0] = 0


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ((), "targets"),
        ((("a", (1,)), ("a", (2,))), "tensors"),
        ((("a", (0,)),), "shape"),
        ((("a", (-1, 2)),), "shape"),
        ((("a", (1.5,)),), "shape"),
        ((("a", ("x",)),), "shape"),
    ],
)
def test_impossible_layouts_are_refused(tensors: tuple[tuple[str, tuple[int, ...]], ...], about: str) -> None:
    """No tensor, a name twice, a dimension that is not a positive integer."""
    with raises(SpecError, about=about):
        Layout(tensors)


def test_views_need_a_vector_of_the_right_length() -> None:
    """A vector of another length is refused."""
    with raises(SpecError, about="shape"):
        PAIR.views(torch.zeros(7))
