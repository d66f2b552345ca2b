"""JSONL as people have it: what is read, and what is said of the rest."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedmoe.data import jsonl, records
from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import Row, open_data
from fedmoe.data.turns import Turn
from fedmoe.errors import DataError, StoppedError
from tests.errors import raises
from tests.rows import ANSWER, GOOD, lines, read_rows, said, user, write

# Line ends of other standards inside a string: str.splitlines would break the row at each of them.
TEXT = "é 日本 \U0001f600 \u2028\u2029\u0085\x0b\x0c end"


def test_a_row_has_its_line_its_prompt_and_its_answer(tmp_path: Path) -> None:
    """The contract in one row; the digest names the bytes."""
    path = write(tmp_path, "\n" + lines(GOOD))
    rows = read_rows(path)
    turns = Turn(role="user", content="q"), Turn(role="assistant", content="a")
    assert rows.rows == (Row(number=0, line=2, turns=turns),)
    assert rows.problems == ()
    assert rows.data == read_rows(str(path)).data
    assert rows.data.digest != read_rows(write(tmp_path, lines(GOOD))).data.digest
    assert (len(rows.data.digest), rows.data.n_lines) == (16, 2)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_unicode_with_or_without_a_byte_order_mark(tmp_path: Path, encoding: str, packed: bool) -> None:
    """The same rows in every Unicode encoding, plain and gzipped."""
    content = lines({"prompt": TEXT, "completion": "a"}, GOOD, ensure_ascii=False).encode(encoding)
    rows = read_rows(write(tmp_path, gzip.compress(content) if packed else content)).rows
    assert [said(row)[:-1] for row in rows] == [[user(TEXT)], [user("q")]]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\n \t\r\n", ",\n"])
def test_any_line_end(tmp_path: Path, end: str) -> None:
    """Unix, Windows and old Macintosh line ends, blank lines, commas after the row; none after the last."""
    rows = read_rows(write(tmp_path, end.join([json.dumps(GOOD)] * 3)))
    assert len(rows.rows) == 3
    assert rows.problems == ()
    assert rows.rows[2].line == (5 if end.count("\n") == 2 else 3)


def test_files_that_were_joined_with_their_marks(tmp_path: Path) -> None:
    """A byte order mark in the middle, as `cat a.jsonl b.jsonl` leaves it."""
    one = lines(GOOD).encode("utf-8-sig")
    assert len(read_rows(write(tmp_path, one + one)).rows) == 2


@pytest.mark.parametrize("indent", [None, 0, 2])
def test_one_json_array(tmp_path: Path, indent: int | None) -> None:
    """A whole-file array, in one line or printed over many; each row has the line it begins on."""
    rows = read_rows(write(tmp_path, json.dumps([GOOD] * 3, indent=indent)))
    assert [row.line for row in rows.rows] == ([1, 1, 1] if indent is None else [2, 6, 10])
    assert rows.problems == ()


def test_objects_over_several_lines(tmp_path: Path) -> None:
    """Pretty-printed objects one after the other."""
    rows = read_rows(write(tmp_path, "\n".join([json.dumps(GOOD, indent=2)] * 2)))
    assert [row.line for row in rows.rows] == [1, 5]


def test_a_broken_row_of_an_array_costs_no_other(tmp_path: Path) -> None:
    """The rows after it are found again, and an array that was cut off keeps what it had."""
    row = json.dumps(GOOD)
    rows = read_rows(write(tmp_path, f'[\n{row},\n{{"prompt": "q",, "completion": "b"}},\n{row},\n{row[:9]}'))
    assert [row.line for row in rows.rows] == [2, 4]
    assert [problem.line for problem in rows.problems] == [3, 5]


BAD = {
    "half-written": (b'{"prompt": "q", "compl', "not JSON: Unterminated string"),
    "not JSON": (b"prompt,completion", "not JSON: Expecting value (character 1)"),
    "Python": (b"{'prompt': 'q', 'completion': 'a'}", "not JSON: Expecting property name"),
    "two in a line": (b'{"a": 1} {"b": 2}', "not JSON: Extra data"),
    "list": (b"[1]", "it is an array, not a JSON object"),
    "text": (b'"q"', "it is text, not a JSON object"),
    "number": (b"7", "it is a number, not a JSON object"),
    "NaN": (b"NaN", "it is a number, not a JSON object"),
    "null": (b"null", "missing or null, not a JSON object"),
    "NUL bytes": (b"\0" * 64, "NUL bytes"),
    "deep": (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "nested too deeply"),
    "digits": (b'{"prompt": ' + b"9" * 5000 + b"}", "too many digits"),
    "twice": (b'{"prompt": "q", "completion": "a", "prompt": "r"}', "it has a field twice: 'prompt'"),
    "no fields": (b"{}", "its fields are none; it needs 'prompt' and 'completion'"),
    "other fields": (b'{"text": "t", "meta": 1}', "its fields are 'text', 'meta'; it needs"),
    "no answer": (b'{"prompt": "q"}', "its fields are 'prompt'; it needs"),
    "null answer": (b'{"prompt": "q", "completion": null}', "its completion is missing or null, not text"),
    "number answer": (b'{"prompt": "q", "completion": 7}', "its completion is a number, not text"),
    "NaN answer": (b'{"prompt": "q", "completion": NaN}', "its completion is a number, not text"),
    "true": (b'{"prompt": true, "completion": "a"}', "its prompt is true or false, not text"),
    "object": (b'{"prompt": {}, "completion": "a"}', "its prompt is an object, not text"),
    "no messages": (b'{"messages": []}', "no assistant turn"),
    "text messages": (b'{"messages": "hi"}', "its messages is text, not a list of messages"),
    "text message": (b'{"messages": ["hi"]}', "its messages[0] is text, not an object with role and content"),
    "no role": (b'{"messages": [{"content": "a"}]}', "its messages[0] has the role None; it must be system"),
    "odd role": (
        b'{"messages": [{"role": "narrator", "content": "a"}]}',
        "has the role 'narrator'; it must be",
    ),
    "no content": (b'{"messages": [{"role": "user"}]}', "its messages[0].content is missing or null"),
    "only questions": (b'{"messages": [{"role": "user", "content": "q"}]}', "no assistant turn"),
    "only an answer": (
        b'{"messages": [{"role": "assistant", "content": "a"}]}',
        "it has nothing before its answer",
    ),
    "tool call": (
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}',
        "its messages[0] calls a tool",
    ),
    "picture": (
        b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}',
        "its messages[0].content[0] is a part of type 'image_url'; only parts of type 'text'",
    ),
    "history": (
        b'{"instruction": "q", "output": "a", "history": [["x"]]}',
        "its history is not a list of [question, answer] pairs",
    ),
    "weight": (
        b'{"messages": [{"role": "assistant", "content": "a", "weight": 2}]}',
        "its messages[0].weight is 2; it must be a number from 0 to 1, or true or false",
    ),
    "NaN weight": (b'{"prompt": "q", "completion": "a", "weight": NaN}', "its weight is nan; it must be"),
    "text weight": (b'{"prompt": "q", "completion": "a", "weight": "0"}', "its weight is '0'; it must be"),
    "tools": (b'{"prompt": "q", "completion": "a", "tools": ["w"]}', "its tools are not a list of objects"),
    "tools that are no JSON": (b'{"prompt": "q", "completion": "a", "tools": "{"}', "its tools are not JSON"),
    "tools in Latin-1": (
        b'{"prompt": "q", "completion": "a", "tools": [{"name": "caf\xe9"}]}',
        "its tools holds the byte 0xe9",
    ),
    "thoughts after the answer": (
        b'{"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "thinking"}]}]}',
        "its messages[0].content[1] is a part of type 'thinking'; only parts of type 'text'",
    ),
    "thoughts of a question": (
        b'{"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "t"}]}]}',
        "its messages[0].content[0] is a part of type 'thinking'",
    ),
    "lone surrogate": (b'{"prompt": "\\ud83d", "completion": "a"}', "half a character (\\ud83d"),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "a"}', "its prompt holds the byte 0xe9, which is not"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    """It is skipped, its neighbours are not; or it is fatal, by option; alone it is fatal in any case."""
    good = lines(GOOD).encode()
    path = write(tmp_path, good + line + b"\n" + good)
    rows = read_rows(path)
    assert [row.line for row in rows.rows] == [1, 3]
    (problem,) = rows.problems
    assert str(problem).startswith(f"{path} line 2: it")
    assert reason in str(problem)
    str(problem).encode()  # can be printed
    with raises(DataError, about=problem.about):
        read_rows(path, fail=True)
    with raises(DataError, about=problem.about):
        read_rows(write(tmp_path, line))


def test_odd_things_beside_the_text_do_no_harm(tmp_path: Path) -> None:
    """NaN, Latin-1 bytes, nulls and raw tabs where nothing depends on them."""
    path = write(
        tmp_path, b'{"prompt": "a\tb", "completion": "c", "score": NaN, "by": "Jos\xe9", "system": null}'
    )
    (row,) = read_rows(path).rows
    assert said(row)[:-1] == [user("a\tb")]


def test_a_hole_at_the_start_costs_one_row(tmp_path: Path) -> None:
    """NUL bytes, as a crash leaves them, are not taken for UTF-32."""
    rows = read_rows(write(tmp_path, b"\0" * 4096 + b"\n" + lines(GOOD).encode()))
    assert [row.line for row in rows.rows] == [2]


def test_a_row_longer_than_the_limit_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one bad row, however many times the limit it is long, and the row after it has the right line."""
    for module in (jsonl, records):
        monkeypatch.setattr(module, "MAX_ROW_CHARS", 100)
    long = lines({"prompt": "x" * 950, "completion": "a"})
    rows = read_rows(write(tmp_path, long + lines(GOOD) + long.rstrip()))
    assert [row.line for row in rows.rows] == [2]
    assert [str(p.line) + p.reason for p in rows.problems] == [
        f"{line}it is longer than 100 characters" for line in (1, 3)
    ]


FILES = {
    "empty": (b"", "has no rows: it is empty"),
    "blank": (b"\n \r\n\n", "has no rows: it is empty"),
    "only a mark": (b"\xef\xbb\xbf", "has no rows: it is empty"),
    "Parquet": (b"PAR1\x15\x04", "is a Parquet file: convert it"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "zstd": (b"\x28\xb5\x2f\xfd\x00", "compressed with zstd"),
    "gzip, cut off": (gzip.compress(lines(GOOD).encode() * 99)[:-20], "cannot read .*ended before"),
    "gzip, damaged inside": (gzip.compress(b"")[:10] + b"\xff" * 20, "cannot read .*: Error -3"),
    "gzip, damaged": (b"\x1f\x8bXXXXXXXXXXXXXXXXXX", "cannot read .*"),
    "UTF-16, cut off": ("\ufeff{".encode("utf-16-le") + b"\x22", "line 1: it is not JSON"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_without_rows_says_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    """One sentence, that names the file."""
    with pytest.raises(DataError, match=message) as caught:
        read_rows(write(tmp_path, content))
    assert "rows.jsonl" in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    """A typing mistake in the file, or in its directory."""
    write(tmp_path, "", "train_sql.jsonl")
    with pytest.raises(
        DataError, match=r"there is no file .*train-sql.jsonl; did you mean train_sql.jsonl\?"
    ):
        read_rows(tmp_path / "train-sql.jsonl")
    with raises(DataError, about="parent"):
        read_rows(tmp_path / "nowhere" / "a.jsonl")
    with raises(DataError, about="file"):
        read_rows("nul\0byte")


def test_what_is_no_file(tmp_path: Path) -> None:
    """A directory; a pipe is not opened, which would wait for ever."""
    write(tmp_path, "", "train_sql.jsonl")
    with raises(DataError, about="directory"):
        read_rows(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with raises(DataError, about="pipe"):
        read_rows(tmp_path / "pipe")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's reason, in one sentence."""

    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, lines(GOOD))
    monkeypatch.setattr(Path, "open", refuse)
    with raises(DataError, about="file", cause=PermissionError):
        read_rows(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=4),
    ensure_ascii=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-16-le"]),
)
def test_no_text_is_altered(tmp_path: Path, texts: list[str], ensure_ascii: bool, encoding: str) -> None:
    """Whatever can be written as JSON comes back character by character."""
    rows = [{"prompt": text, "completion": text} for text in texts]
    content = lines(*rows, ensure_ascii=ensure_ascii).encode(encoding)
    assert [row.turns[-1].content for row in read_rows(write(tmp_path, content)).rows] == texts


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_are_fatal_but_by_a_sentence(tmp_path: Path, data: st.DataObject) -> None:
    """Rows with random bytes in them give rows, problems or a DataError, and each can be printed."""
    row = lines({"messages": [user(TEXT), ANSWER]}, GOOD).encode(
        data.draw(st.sampled_from(["utf-8", "utf-16"]))
    )
    at, until = sorted(data.draw(st.tuples(*[st.integers(0, len(row))] * 2)))
    path = write(tmp_path, row[:at] + data.draw(st.binary(max_size=12)) + row[until:])
    try:
        rows = read_rows(path)
        "".join(
            [*map(str, rows.problems), *(turn.content for row in rows.rows for turn in row.turns)]
        ).encode()
    except DataError as error:
        str(error).encode()


def test_reading_can_be_stopped(tmp_path: Path) -> None:
    """Told to stop after some rows, it does not go on to the last."""
    asked = iter([False, False, True])
    with pytest.raises(StoppedError):
        open_data(
            write(tmp_path, lines(*[GOOD] * 6)), BadRows(report=print, fail=True), stopped=lambda: next(asked)
        )


def test_a_file_that_is_changed_meanwhile_is_refused(tmp_path: Path) -> None:
    """Its digest would not be that of what is trained on."""
    path = write(tmp_path, lines(GOOD))
    data = open_data(path, BadRows(report=print))
    data.check_unchanged()
    with path.open("a") as file:
        file.write("\n")
    with raises(DataError, about="change"):
        data.check_unchanged()
