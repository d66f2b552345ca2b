"""Records that grow: what the next release adds and what the last one did not write yet harms no reader."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from fedmoe.errors import ProtocolError, SpecError
from fedmoe.protocol import features
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.integrity import restamp
from fedmoe.protocol.lines import read_line
from fedmoe.protocol.merged import MergedMeta
from fedmoe.protocol.records import NO_DECISIONS, Decided, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import HEADER_FORMAT, ForeignHeaderError, Header
from fedmoe.store.archive import Anchor, Archive
from tests.errors import raises
from tests.record_cases import CASES, DECIDED, HEADER, SPEC


def without_unknown(record: Any) -> Any:
    """The record as this release knows it."""
    names = {one.name for one in dataclasses.fields(record)}
    if "unknown" not in names:
        return record
    return dataclasses.replace(record, unknown=type(record.unknown)())


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read(name: str) -> None:
    """Every field, by the class that wrote it."""
    case = CASES[name]
    assert case.read(case.stored) == case.record


@pytest.mark.parametrize("name", CASES)
def test_field_of_the_next_release_is_left_alone(name: str) -> None:
    """It changes nothing for a reader of this one."""
    case = CASES[name]
    read = case.read({**case.stored, "added_later": "x"})
    assert without_unknown(read) == case.record


@pytest.mark.parametrize("name", CASES)
def test_field_that_the_last_release_did_not_write_has_its_default(name: str) -> None:
    """One after the other, of those that may be missing."""
    case = CASES[name]
    optional = [one for one in dataclasses.fields(case.record) if one.metadata.get("optional")]
    for one in optional:
        read = case.read({key: value for key, value in case.stored.items() if key != one.name})
        assert read == dataclasses.replace(case.record, **{one.name: one.default})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refusal])
def test_record_that_needs_more_is_refused_with_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And read by the release that knows it."""
    case = CASES[name]
    content = {**case.stored, "requires": "signing"}
    assert case.refusal is not None
    with raises(case.refusal, about="requires"):
        case.read(content)
    monkeypatch.setattr(features, "FEATURES", frozenset({"signing"}))
    assert case.read(content) == dataclasses.replace(case.record, requires="signing")


def test_what_is_not_known_keeps_its_digest() -> None:
    """Of a spec, a decided update and a header: whoever reads one and writes it again changes nothing."""
    content = json.loads(SPEC.to_json())
    content["added_later"] = {"x": [1]}
    content["lora"]["added_later"] = 2
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert Spec.from_json(text).to_json() == text
    assert Spec.from_json(text).digest != SPEC.digest
    later = json.dumps({"added_later": 1, **json.loads(DECIDED.to_json())})
    read = Decided.from_json(later.encode())
    assert json.loads(read.to_json()) == json.loads(later)
    other = json.dumps(dict(reversed(json.loads(later).items())))  # as another release orders it
    stamps = {restamp(NO_DECISIONS, "w", None, Decided.from_json(text.encode())) for text in (later, other)}
    assert len(stamps) == 1
    header = msgpack.packb({**msgpack.unpackb(HEADER.pack()), "added_later": [1, b"x"]})
    assert msgpack.unpackb(Header.unpack(header).pack()) == msgpack.unpackb(header)


def test_names_of_features_are_safe_to_show() -> None:
    """Anybody may have written them."""
    with pytest.raises(ProtocolError, match=r"^the expert needs \\x1b\[2J, a, b, c, d, which") as caught:
        features.check_requires("a b c d e f \x1b[2J" + " g" * 1000, "the expert")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", ["nan", "inf", "x", "", "1e999", "9" * 99])
def test_heartbeat_with_no_number_where_one_belongs_says_nothing(value: str) -> None:
    """Anybody may have written it; the rest is read."""
    assert Beat.read({"pid": value, "run": "1-0123abcd"}) == Beat(run="1-0123abcd")


@pytest.mark.parametrize("name", ["chat_template", "commit", "version"])
def test_meta_that_is_no_text_is_malformed(name: str) -> None:
    """It is not taken for another text, with which workers would train and which the next commit would keep."""
    raw = {key.encode(): value.encode() for key, value in CASES["meta"].stored.items()}
    with raises(SpecError, about="meta"):
        Meta.from_hash(raw | {name.encode(): b"a\xffb"})


def test_what_a_record_requires_is_looked_at_first() -> None:
    """A later release may write another kind of line or header altogether."""
    with raises(ProtocolError, about="requires"):
        read_line({"version": "3", "rules": "2", "requires": "rules"})
    with raises(ForeignHeaderError, about="requires") as caught:
        Header.unpack(msgpack.packb({"header_format": HEADER_FORMAT, "requires": "rules"}))
    assert caught.value.needs == "rules"


@pytest.mark.parametrize("version", ["Infinity", "[]", '"x"'])
def test_gateway_built_from_nonsense_is_said(version: str) -> None:
    """Whoever edited it by hand."""
    meta = MergedMeta(built_from='{"a": {"version": ' + version + ', "weights_commit": "c"}}')
    with raises(SpecError, about="experts"):
        assert meta.experts


def test_anchor_of_the_next_release_is_used(tmp_path: Path) -> None:
    """A replay begins there."""
    archive = Archive(tmp_path)
    archive.keep_anchor(Anchor(version=1, lineage="l", run="r", seq=1, weights="w" * 64, at=1.0))
    (file,) = archive.anchors()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"added_later": 1}))
    assert list(archive.anchors()) == [file]
