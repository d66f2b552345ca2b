"""fedmoe.protocol.records: what a later or an earlier FedMoE wrote is read as far as it can be, and else named."""

import json
from dataclasses import fields, replace

import pytest

from fedmoe.errors import ProtocolError, SpecError
from fedmoe.protocol import records
from fedmoe.protocol.records import Decided, Meta, read_protocol
from fedmoe.protocol.update import UpdateId
from tests.errors import raises
from tests.federation import first_meta, small_spec

META = first_meta(small_spec(), version=7, loss=1.5, reach=1.0)


def stored(**changes: str) -> dict[bytes, bytes]:
    """META as HGETALL gives it."""
    return {name.encode(): value.encode() for name, value in (META.to_hash() | changes).items()}


def test_meta_without_a_protocol_is_of_the_first() -> None:
    """As every expert was before the field existed."""
    raw = stored()
    del raw[b"protocol"]
    assert Meta.from_hash(raw) == Meta.from_hash(stored(protocol="1"))
    assert Meta.from_hash(raw).protocol == 1


def test_unknown_fields_of_a_later_fedmoe_are_left_alone() -> None:
    """In meta and in a worker's last decided update."""
    assert Meta.from_hash(stored(seats="4")) == Meta.from_hash(stored())
    text = b'{"run": "1-00000001", "seq": 3, "how": "applied", "version": 9, "by": {"key": "x"}}'
    decided = Decided.from_json(text)
    assert replace(decided, unknown="") == Decided(id=UpdateId("1-00000001", 3), how="applied", version=9)
    assert json.loads(decided.to_json())["by"] == {"key": "x"}  # the stamp covers it, so it stays


@pytest.mark.parametrize("name", [f.name for f in fields(Meta) if not f.metadata.get("optional")])
def test_field_that_was_always_there_must_be_there(name: str) -> None:
    """A default in its place would make an expert another one without a word."""
    raw = stored()
    del raw[name.encode()]
    with raises(SpecError, about="meta"):
        Meta.from_hash(raw)


def test_later_protocol_asks_for_an_upgrade_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any other field is looked at: it may have another meaning, or be gone."""
    ours, later = records.PROTOCOL, records.PROTOCOL + 1
    with raises(ProtocolError, about="protocol"):
        Meta.from_hash({b"protocol": b"%d" % later})
    monkeypatch.setattr(records, "PROTOCOL", later)
    assert Meta.from_hash(stored(protocol=str(later))).protocol == later
    assert Meta.from_hash(stored(protocol=str(ours))).protocol == ours


@pytest.mark.parametrize("raw", [b"", b"two", b"1.0", b"\xff"])
def test_protocol_that_is_no_number_is_said(raw: bytes) -> None:
    """It is no reason to upgrade anything."""
    with raises(SpecError, about="protocol") as error:
        read_protocol(raw)
    assert not isinstance(error.value, ProtocolError)
