"""The demo's data: split by source, the same for a seed, executable, and clear about what is missing."""

import ast
import json
import sqlite3
import textwrap
from pathlib import Path

import pytest

from fedmoe.demo import corpus
from fedmoe.demo.corpus import DomainFiles, build_corpus
from fedmoe.demo.corpus_docs import docs_rows
from fedmoe.demo.corpus_python import python_rows
from fedmoe.demo.corpus_rows import Row, split_by_source
from fedmoe.demo.corpus_sql import databases, in_words
from fedmoe.errors import DataError
from tests.errors import raises

pytestmark = pytest.mark.slow  # it reads all of Python's library
DOMAINS = ("python_expert", "sql_expert", "docs_expert")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, DomainFiles]]:
    out_dir = tmp_path_factory.mktemp("corpus")
    return out_dir, build_corpus(out_dir)


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_source_is_on_two_sides(built, domain):
    """Training, validation and test rows come from different files, topics or databases."""
    files = built[1][domain]
    train, valid, test = (
        {row["source"] for row in rows(path)} for path in (files.train, files.valid, files.test)
    )
    assert min(len(train), len(valid), len(test)) > 1
    assert len(train | valid | test) == len(train) + len(valid) + len(test)


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_held_out_completion_can_be_read_in_training(built, domain):
    """Text that two sources share is never trained on and tested at once."""
    files = built[1][domain]
    trained_on = files.train.read_text(encoding="utf-8")
    for row in rows(files.valid) + rows(files.test):
        assert json.dumps(row["completion"], ensure_ascii=False)[1:-1] not in trained_on


@pytest.mark.parametrize("domain", DOMAINS)
def test_rows_are_enough_and_short_enough(built, domain):
    """Each domain has rows for 100 steps and a test of 16 to 40 rows, none longer than about 200 tokens."""
    files = built[1][domain]
    train, test = rows(files.train), rows(files.test)
    assert len(train) >= 200
    assert 16 <= len(test) <= 40
    for row in train + test:
        assert row["prompt"].strip()
        assert row["completion"].strip()
        assert len(row["prompt"]) + len(row["completion"]) <= 720


def test_same_seed_same_bytes(built, tmp_path):
    """A second build writes the same files, byte for byte."""
    out_dir, _ = built
    build_corpus(tmp_path / "again")
    for path in out_dir.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_another_seed_splits_differently():
    """The seed decides which sources are held out."""
    found = [Row(prompt=f"p{n}", completion=f"c{n}!", source=f"s{n}") for n in range(50)]
    first, second = (split_by_source(found, seed=seed, train=50, valid=5, test=10) for seed in (0, 1))
    assert len(first.test) == len(second.test) == 10
    assert {row.source for row in first.test} != {row.source for row in second.test}


def test_every_query_returns_rows(built):
    """Each SQL completion runs against its database, whose tables are those of the prompt."""
    files = built[1]["sql_expert"]
    queries = rows(files.train) + rows(files.valid) + rows(files.test)
    ran = 0
    for database in databases():
        for row in queries:
            if row["source"] == database.name:
                assert row["prompt"].startswith(database.ddl)
                assert database.connection.execute(row["completion"]).fetchone()
                ran += 1
    assert ran == len(queries)


def test_sql_is_diverse(built):
    """The queries use joins, groups, subqueries, windows and dates over at least fourteen schemas."""
    train = rows(built[1]["sql_expert"].train)
    text = "\n".join(row["completion"] for row in train)
    for word in ("JOIN", "GROUP BY", "HAVING", "EXISTS", "OVER (", "strftime", "julianday", "WITH ", "CASE "):
        assert text.count(word) >= 8, word
    assert len({row["source"] for row in train}) >= 14
    assert len({row["prompt"] for row in train}) >= 0.95 * len(train)


def test_python_completions_are_the_bodies_of_their_functions(built):
    """Signature, docstring and completion together are a function that parses."""
    for row in rows(built[1]["python_expert"].train):
        head = row["prompt"].split("\n\n", 1)[1]
        (function,) = ast.parse(f"{head}\n{textwrap.indent(row['completion'], ' ' * 4)}").body
        assert isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        assert ast.get_docstring(function)
        assert len(function.body) >= 2


def test_odd_files_are_passed_over(tmp_path):
    """A file that cannot be decoded or parsed costs only itself; a coding line is honoured."""
    body = (
        'def f(x):\n    """Return x, or nothing at all."""\n'
        '    if x is None:\n        return "nichts für ungut, sagte er"\n    return x\n'
    )
    (tmp_path / "bad_bytes.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "bad_syntax.py").write_text("def f(:\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n" + body.encode("latin-1"))
    (tmp_path / "plain.py").write_text(body, encoding="utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_it.py").write_text(body, encoding="utf-8")
    found = list(python_rows(tmp_path))
    assert [row.source for row in found] == ["latin.py", "plain.py"]
    assert all("für ungut" in row.completion for row in found)


def test_docs_rows_stay_in_their_section():
    """A pair never crosses a heading, and tables are no paragraphs."""
    first, second, third = (f"{word} " * 12 for word in ("alpha", "beta", "gamma"))
    table = "+-----+------+\n" * 6
    text = f"Title\n*****\n\n{first}\n\n{second}\n\nNext\n====\n\n{third}\n\n{table}\n\n{first}"
    found = list(docs_rows({"topic": text}))
    assert [(row.completion, '"Title"' in row.prompt) for row in found] == [(second, True)]


def test_shared_text_counts_once():
    """A completion that twenty sources have is one row, not twenty."""
    shared = [Row(prompt=f"p{n}", completion="the same text", source=f"s{n}") for n in range(20)]
    split = split_by_source(shared, seed=0, train=20, valid=5, test=5)
    assert [row.source for row in split.train + split.valid + split.test] == ["s0"]


def test_text_inside_a_training_row_is_not_held_out():
    """A held-out completion that a training prompt contains is dropped; the others stay."""
    plain = [Row(prompt=f"p{n}", completion=f"<{n}>", source=f"s{n}") for n in range(20)]
    kept = {row.completion for row in split_by_source(plain, seed=0, train=20, valid=5, test=5).test}
    leaky = [
        Row(
            prompt=row.prompt if row.completion in kept else " ".join(kept),
            completion=row.completion,
            source=row.source,
        )
        for row in plain
    ]
    assert len(kept) == 4
    assert not split_by_source(leaky, seed=0, train=20, valid=5, test=5).test


def test_words_of_identifiers():
    """Column names are spoken as English in the questions."""
    assert [in_words(name) for name in ("CreditLimit", "power_kw", "placed_on")] == [
        "credit limit",
        "power kw",
        "placed",
    ]


def test_a_python_without_sources_is_named(monkeypatch, tmp_path):
    """A stripped Python gives one sentence that names the domain and the way out, not an empty file."""
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path / "nowhere"))
    with raises(DataError, about="python_expert"):
        build_corpus(tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    """A file where the directory should be gives one sentence with its name."""
    (tmp_path / "file").write_text("")
    with raises(DataError, about="out", cause=OSError):
        build_corpus(tmp_path / "file")


def test_readme_counts_are_true(built):
    """The README tells origin, licence and the counts of rows that the files have."""
    out_dir, files = built
    text = (out_dir / "README.md").read_text(encoding="utf-8")
    assert "PSF licence" in text
    for domain in DOMAINS:
        assert f"- test: {len(rows(files[domain].test))} rows of" in text.split(f"## {domain}")[1]


def test_schemas_differ():
    """No two databases share a table name, so a test schema cannot be met in training under another name."""
    names = [table.name for database in databases() for table in (database.parent, database.child)]
    assert len(set(names)) == len(names)
    assert sqlite3.sqlite_version_info >= (3, 25), "window functions need SQLite 3.25"
