"""`fedmoe worker run --validate`, and experts that are held: in real processes, on a real Redis."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.processes import eventually, fedmoe, fedmoe_here, running, terminate

pytestmark = pytest.mark.timeout(600)


def write(path: Path, count: int) -> Path:
    """A file of so many rows, each an arithmetic of its own."""
    lines = [json.dumps({"prompt": f"add {n} and {n}", "completion": str(2 * n)}) for n in range(count)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def store(
    tmp_path: Path, redis_url: str, tiny_model_dir: Path, connection: Connection
) -> Iterator[GatewayStore]:
    """A running aggregator with the expert a."""
    with running(
        tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis_url, "--expert", "a",
        "--base-model", str(tiny_model_dir), "--rank", "2", "--sync-interval", "0.3", "--lease", "1",
    ):  # fmt: skip
        store = GatewayStore(connection)
        eventually("the expert", lambda: store.meta("a"), timeout_s=150)
        yield store


def points(store: GatewayStore) -> list[dict[str, str]]:
    """The lines of the log with a validation loss."""
    return [line for line in store.history("a")[2] if "val_loss" in line]


def test_worker_holds_rows_back_and_publishes_their_loss(
    tmp_path: Path, redis_url: str, store: GatewayStore
) -> None:
    """The log keeps the curve, also over a restart and over rows that were added; status and show tell it."""
    rows = write(tmp_path / "rows.jsonl", 100)
    command = [
        "worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--name", "anna",
        "--state-dir", str(tmp_path / "state"), "--validate", "10%", "--batch-size", "16",
    ]  # fmt: skip

    def train(log: str, wanted: int) -> list[str]:
        with running(tmp_path / log, *command) as worker:
            eventually("losses", lambda: len(points(store)) >= wanted, timeout_s=120)
            assert terminate(worker) == 0
        return (tmp_path / log).read_text().splitlines()

    first = train("first.log", 2)
    held = re.search(
        r"(\d+) of 100 different rows are held back for validation: they are not", "\n".join(first)
    )
    assert held
    assert any("validation loss " in line for line in first)
    seen = points(store)
    assert {line["val_rows"] for line in seen} == {held[1]}
    versions = [int(line["val_version"]) for line in seen]
    assert versions == sorted(set(versions))
    assert all(int(line["val_version"]) < int(line["version"]) for line in seen)
    second = train("second.log", len(seen) + 1)
    assert any("resuming run" in line for line in second)
    assert not any("differ from those of the checkpoint" in line for line in second)
    assert {line["val_set"] for line in points(store)} == {seen[0]["val_set"]}  # the same rows as before
    write(rows, 140)
    third = train("third.log", len(points(store)) + 1)
    assert re.search(r"(\d+) of 140 different rows", "\n".join(third))
    assert len({line["val_set"] for line in points(store)}) == 2
    shown = fedmoe("expert", "show", "a", "--redis", redis_url)
    assert "validation loss, best at version" in shown.stdout
    told = json.loads(fedmoe("expert", "show", "a", "--redis", redis_url, "--json").stdout)["validation"]
    assert [point["version"] for point in told["curve"]] == [
        int(line["val_version"]) for line in points(store)
    ]
    assert told["workers"][0]["worker"] == "anna"
    status = fedmoe("status", "--redis", redis_url)
    assert "a: validation loss best at version" in status.stdout
    assert json.loads(fedmoe("status", "--redis", redis_url, "--json").stdout)["experts"][0]["curves"]


def test_split_that_leaves_nothing_is_one_sentence(
    tmp_path: Path, redis_url: str, store: GatewayStore
) -> None:
    """Before anything is trained."""
    rows = write(tmp_path / "rows.jsonl", 5)
    command = [
        "worker",
        "run",
        "--redis",
        redis_url,
        "--stream",
        "a",
        "--data",
        str(rows),
        "--max-steps",
        "1",
    ]
    for wanted, sentence in (
        ("5", "leaves no row of"),
        ("100%", "leaves no row to train on"),
        ("x", "must be a share"),
    ):
        done = fedmoe_here(*command, "--validate", wanted)
        assert done.returncode != 0
        assert sentence in done.stderr.strip().splitlines()[-1]
        assert "Traceback" not in done.stderr
    assert fedmoe_here(*command, "--validate", "0").returncode == 0


def test_held_expert_waits_and_loses_nothing(
    tmp_path: Path, redis_url: str, store: GatewayStore, connection: Connection
) -> None:
    """By an operator: the worker trains on and says why nothing is decided; after the release all of it counts."""
    rows = write(tmp_path / "rows.jsonl", 30)
    command = ["worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--name", "ben"]
    with running(tmp_path / "worker.log", *command) as worker:
        eventually("it trains", lambda: store.meta("a").version >= 2, timeout_s=150)
        said = fedmoe("expert", "hold", "a", "--redis", redis_url, "--reason", "odd data")
        assert said.stdout == "a: held; its updates wait until `fedmoe expert release a`\n"
        assert "held already: odd data" in fedmoe("expert", "hold", "a", "--redis", redis_url).stdout
        eventually("an update waits", lambda: connection.client.xlen("fedmoe:{a}:updates"))
        version = store.meta("a").version
        eventually(
            "the worker says so",
            lambda: "is held, and updates wait: odd data" in (tmp_path / "worker.log").read_text(),
        )
        assert store.meta("a").version == version
        assert "a: held, its updates wait: odd data" in fedmoe("status", "--redis", redis_url).stdout
        assert (
            "released (it was held: odd data)"
            in fedmoe("expert", "release", "a", "--redis", redis_url).stdout
        )
        assert "it is not held" in fedmoe("expert", "release", "a", "--redis", redis_url).stdout
        eventually("it goes on", lambda: store.meta("a").version >= version + 2)
        assert terminate(worker) == 0
    lines = [line for line in store.history("a")[2] if "worker" in line]
    assert [int(line["seq"]) for line in lines] == list(range(1, len(lines) + 1))
    steps = re.findall(r"step (\d+) ", (tmp_path / "worker.log").read_text())
    assert store.meta("a").n_examples == 4 * int(steps[-1])
    changes = [line["changed"] for line in store.history("a")[2] if "changed" in line]
    assert changes == ["held: odd data", "released"]
