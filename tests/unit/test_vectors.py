"""fedmoe.protocol.vectors: what a worker tells of its domain, and which expert a prompt is routed to."""

import base64
import json
from dataclasses import replace

import pytest
import torch

from fedmoe.errors import UpdateError
from fedmoe.protocol.vectors import (
    MAX_VECTOR_BYTES,
    MAX_VECTOR_ROWS,
    WITHHELD,
    DomainVector,
    mean_of,
    nearest,
    of_domain,
    stored_text,
    text_in,
    width_of,
)
from tests.errors import raises
from tests.federation import small_spec
from tests.record_cases import HEADER

SPEC = small_spec()  # of hidden size 8


def vector(*values: float, rows: int = 40) -> DomainVector:
    return DomainVector.of(torch.tensor(values), rows)


def test_a_vector_survives_redis() -> None:
    """As fp16, which is exact to three digits; readable with redis-cli but for its values."""
    made = vector(0.1, -2.0, 3e-4, rows=7)
    text = made.to_json()
    assert json.loads(text)["rows"] == 7
    assert len(base64.b64decode(json.loads(text)["fp16"])) == 6
    read = DomainVector.from_json(text.encode())
    assert read == made
    assert read.tensor().dtype == torch.float32
    assert torch.allclose(read.tensor(), torch.tensor([0.1, -2.0, 3e-4]), rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "rows", "about"),
    [
        (bytes(14), 40, "vector"),  # seven values
        (bytes(15), 40, "vector"),  # not two bytes a value
        (bytes(MAX_VECTOR_BYTES + 2), 40, "vector"),
        (bytes(14) + b"\x00\x7c", 40, "vector"),  # infinity
        (bytes(14) + b"\x00\x7e", 40, "vector"),  # NaN
        (bytes(16), 0, "rows"),
        (bytes(16), MAX_VECTOR_ROWS + 1, "rows"),
    ],
)
def test_a_vector_that_cannot_be_used_is_told_from_one_that_can(values: bytes, rows: int, about: str) -> None:
    """By length, values and rows; a replay leaves out the same ones."""
    header = replace(HEADER, vector=values, vector_rows=rows)
    with raises(UpdateError, about=about):
        stored_text(header, SPEC)
    assert text_in(header, SPEC) is None


def test_an_update_tells_a_vector_or_that_it_is_withheld_or_nothing() -> None:
    """Three different things: only the second removes what is there."""
    told = vector(*range(8))
    assert stored_text(replace(HEADER, vector=told.values, vector_rows=told.rows), SPEC) == told.to_json()
    assert stored_text(replace(HEADER, vector=WITHHELD.values, vector_rows=WITHHELD.rows), SPEC) == ""
    assert stored_text(replace(HEADER, vector=None, vector_rows=0), SPEC) is None
    assert width_of(SPEC) == 8


def test_what_cannot_be_published_is_refused_where_it_is_made() -> None:
    """A state that fp16 cannot hold, and one that is too long."""
    with raises(UpdateError, about="vector"):
        vector(1e6)
    with raises(UpdateError, about="vector"):
        DomainVector.of(torch.zeros(MAX_VECTOR_BYTES), 40)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rows": 1}', '{"rows": "x", "fp16": ""}', '{"rows": 1, "fp16": "!"}']
)
def test_a_malformed_record_is_said(text: str) -> None:
    """Somebody edited it by hand."""
    with raises(UpdateError, about="vector"):
        DomainVector.from_json(text)


def test_an_experts_vector_is_the_mean_of_its_workers_by_rows() -> None:
    """A worker of three times the rows counts three times."""
    mean = mean_of([vector(1.0, 0.0, rows=30), vector(0.0, 4.0, rows=10)])
    assert mean.tolist() == [0.75, 1.0]


def test_a_prompt_goes_to_the_nearest() -> None:
    """A shift that all share changes nothing, nor does the order of the prompts; the first wins a tie."""
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    states = torch.tensor([[0.9, 0.2], [0.1, 0.3], [0.5, 0.5]])
    assert nearest(states, vectors).tolist() == [0, 1, 0]
    assert nearest(states[:2] + 7.0, vectors + 7.0).tolist() == [0, 1]


def test_workers_of_the_gateway_belong_to_the_expert_in_their_names() -> None:
    """What a worker told on its expert's own chain counts before what it told on the gateway's."""
    gateway = {"sql_expert.alice": b"old", "sql_expert.bob": b"b", "docs_expert.alice": b"d", "odd": b"o"}
    assert of_domain("sql_expert", {"alice": b"a"}, gateway) == {"alice": b"a", "bob": b"b"}
    assert of_domain("chat_expert", {}, gateway) == {}
