"""The strings of weights that are too long for one."""

import pytest

import fedmoe.protocol.weights_parts
from fedmoe.errors import SettingsError
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.weights_parts import WeightsParts, header_bytes, values_parts
from tests.errors import raises

GIB = 2**30


def spec(values: int, wire_format: str) -> Spec:
    layout = Layout.of([("x", (values,))])
    return Spec(base_model="m", base_config={}, layout=layout, wire_format=wire_format)


def test_header_and_parts_are_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the longest length is one string, and one byte more makes parts."""
    layout = Layout.of([("x", (7,))])
    file = layout.header + bytes(range(28))
    monkeypatch.setattr(fedmoe.protocol.weights_parts, "PART_BYTES", 12)
    assert [len(part) for part in values_parts(file)] == [12, 12, 4]
    assert b"".join((header_bytes(file), *values_parts(file))) == file
    monkeypatch.setattr(fedmoe.protocol.weights_parts, "WHOLE_BYTES", len(file))
    assert not WeightsParts.of("c", file)
    monkeypatch.setattr(fedmoe.protocol.weights_parts, "WHOLE_BYTES", len(file) - 1)
    parts = WeightsParts.of("c", file)
    assert parts == WeightsParts(commit="c", count=3, n_bytes=len(file))
    assert WeightsParts.from_json(parts.to_json()) == parts
    assert WeightsParts.in_meta({b"parts": parts.to_json().encode()}) == parts


@pytest.mark.parametrize(
    "text", ["[]", "x", "{}", '{"commit": 1}', '{"commit": "c", "count": -1, "n_bytes": 1}', '{"count": 1.5}']
)
def test_a_malformed_field_is_no_parts(text: str) -> None:
    """Parsing meta fails then; a reader of parts takes it for a snapshot without parts."""
    with pytest.raises(ValueError, match=r"parts|Expecting"):
        WeightsParts.from_json(text)
    assert not WeightsParts.in_meta({b"parts": text.encode()})


@pytest.mark.parametrize(
    ("gib", "wire_format", "fits"),
    [
        (0.81, "fp32", True), (0.81, "bf16", True), (1.0, "fp32", False), (1.01, "bf16", False),
        (1.8, "int8", True), (1.95, "int8", False), (1.99, "int4", True), (2.1, "int4", False),
    ],
)  # fmt: skip
def test_what_is_too_large_is_said_at_creation(gib: float, wire_format: str, fits: bool) -> None:
    """828 MiB, one expert of a model of 70B, fit in each format."""
    values = int(gib * GIB / 4)
    if fits:
        assert spec(values, wire_format).layout.numel == values
        return
    with raises(SettingsError, about="layout") as caught:
        spec(values, wire_format)
    assert f"too large for format {wire_format}" in str(caught.value)
