"""`fedmoe worker run` as people use it: mistakes are one sentence, a killed worker goes on, a stopped one publishes."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from consumers.create import SpecRequest, ensure_experts
from fedmoe.cli.main import main
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.records import PROTOCOL
from fedmoe.protocol.rules import RuleSet
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.gateway import GatewayStore
from tests.processes import eventually, fedmoe, fedmoe_here, running, terminate
from tests.tiny import save_tiny_model


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"number {n}", "completion": str(n)}) for n in range(30)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def aggregator(
    tmp_path: Path, redis_url: str, tiny_model_dir: Path, connection: Connection
) -> Iterator[GatewayStore]:
    """A running aggregator with the experts a and b."""
    with running(
        tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis_url, "--expert", "a", "--expert", "b",
        "--base-model", str(tiny_model_dir), "--rank", "2", "--sync-interval", "0.4", "--lease", "1",
    ):  # fmt: skip
        store = GatewayStore(connection)
        eventually("the experts", lambda: store.meta("b"))
        yield store


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Run a command that must fail, in this process; its last line on stderr."""
    monkeypatch.setattr(sys, "argv", ["fedmoe", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code in (1, 2)
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


def test_wrong_input_is_one_sentence(
    tmp_path: Path,
    redis_url: str,
    connection: Connection,
    tiny_model_dir: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each mistake is named with what to do, and the exit code is not 0."""
    request = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=2))
    ensure_experts(connection, {"a": 1.0, "b": 1.0}, request)
    other = save_tiny_model(tmp_path / "other", seed=1)
    empty, bad = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("\n\n")
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comp')
    for arguments, expected in (
        (["--stream", "c", "--data", str(rows)], "there are a, b"),
        (["--stream", "a", "--data", str(tmp_path / "none.jsonl")], "none.jsonl"),
        (["--stream", "a", "--data", str(empty)], "empty.jsonl"),
        (["--stream", "a", "--data", str(bad), "--on-bad-row", "fail"], "line 2"),
        (["--stream", "a", "--data", str(bad), "--bad-rows", str(rows)], "holds something else already"),
        (["--stream", "a", "--data", str(rows), "--base-model", str(other)], "fingerprint"),
        (["--stream", "a", "--data", str(rows), "--base-model", str(tmp_path)], "config.json"),
        (["--stream", "a", "--data", str(rows), "--state-dir", str(rows)], "state directory"),
        (["--stream", "a:b", "--data", str(rows)], "cannot be used"),
        (["--stream", "a", "--data", str(rows), "--device", "quantum"], "device"),
        (["--stream", "a", "--data", str(rows), "--redis", "http://here"], "must begin with redis://"),
        (
            ["--stream", "a", "--data", str(rows), "--redis", "redis://127.0.0.1:1", "--no-wait"],
            "cannot be reached",
        ),
    ):
        common = ["worker", "run", "--redis", redis_url, "--max-steps", "1"]
        assert expected in complaint(capsys, monkeypatch, *common, *arguments), arguments


@pytest.mark.timeout(300)
def test_killed_worker_resumes(tmp_path: Path, redis_url: str, aggregator: GatewayStore, rows: Path) -> None:
    """Kill -9, then the same command: the run, its numbers and its data position go on, and every seq counts once."""
    command = [
        "worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--name", "anna",
        "--state-dir", str(tmp_path / "state"), "--log-interval", "0.3",
    ]  # fmt: skip
    with running(tmp_path / "first.log", *command) as first:
        eventually("three updates", lambda: aggregator.meta("a").version >= 3)
        first.kill()
    with running(tmp_path / "second.log", *command) as second:
        eventually("three more", lambda: aggregator.meta("a").version >= 6)
        assert terminate(second) == 0
    log = [line for _, line in aggregator.connection.client.xrange("fedmoe:{a}:log")]
    assert len({line[b"run"] for line in log}) == 1
    assert [int(line[b"seq"]) for line in log] == list(range(1, len(log) + 1))
    resumed = re.search(
        r"resuming run \S+ of \S+ after update (\d+), example (\d+)", (tmp_path / "second.log").read_text()
    )
    assert resumed
    assert "was alive" not in (tmp_path / "second.log").read_text()  # nobody was waited for
    assert int(resumed[1]) >= 3
    assert int(resumed[2]) > 0


@pytest.mark.timeout(300)
def test_template_of_a_base_without_one(
    tmp_path: Path,
    redis_url: str,
    connection: Connection,
    tiny_model_dir: Path,
    rows: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refused before weights load; the first worker's becomes the expert's, is everybody's, and is exported."""
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model_dir, bare)
    (bare / "chat_template.jinja").unlink()
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    store = GatewayStore(connection)
    worker = ["worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--max-steps", "1"]
    with running(
        tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis_url, "--expert", "a",
        "--base-model", str(bare), "--rank", "2", "--lease", "1",
    ):  # fmt: skip
        eventually("the expert", lambda: store.meta("a"))
        with monkeypatch.context() as patch:
            patch.setattr("producers.material.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
            refused = complaint(capsys, monkeypatch, *worker)
        assert "nor expert 'a' has a chat template: give" in refused
        brought = fedmoe_here(*worker, "--chat-template", str(template))
        assert brought.returncode == 0, brought.stderr
        assert store.meta("a").chat_template == template.read_text()
        joined = fedmoe_here(*worker)
        assert joined.returncode == 0, joined.stderr
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    other = complaint(capsys, monkeypatch, *worker, "--chat-template", str(template))
    assert "is not the template that expert 'a' is trained with" in other


@pytest.mark.timeout(300)
def test_worker_of_an_earlier_protocol_ends_and_goes_on_when_it_was_upgraded(
    tmp_path: Path, redis_url: str, aggregator: GatewayStore, rows: Path
) -> None:
    """It keeps its checkpoint, exits 2 with one sentence, and loses nothing."""
    command = [
        "worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--name", "anna",
        "--state-dir", str(tmp_path / "state"),
    ]  # fmt: skip
    redis, meta = aggregator.connection.client, "fedmoe:{a}:meta"
    log = tmp_path / "first.log"
    with running(log, *command) as first:
        eventually("an update", lambda: aggregator.meta("a").version >= 1)
        redis.hset(meta, mapping={"protocol": PROTOCOL + 1, "commit": "later"})
        assert first.wait(60) == 2
    text = log.read_text()
    assert text.splitlines()[-1].endswith(
        f"speaks protocol {PROTOCOL + 1} and the FedMoE on this machine protocol {PROTOCOL}: upgrade the FedMoE on "
        f"this machine; what has no answer yet is kept in {tmp_path / 'state'}, and the next start sends it"
    )
    assert "Traceback" not in text
    assert fedmoe_here(*command).returncode == 2
    before = int(redis.hget(meta, "version"))
    redis.hset(meta, "protocol", PROTOCOL)
    with running(tmp_path / "second.log", *command) as second:
        eventually("what was kept, and another", lambda: aggregator.meta("a").version >= before + 2)
        assert terminate(second) == 0
    lines = [line for _, line in redis.xrange("fedmoe:{a}:log")]
    assert [int(line[b"seq"]) for line in lines] == list(range(1, len(lines) + 1))
    assert len({line[b"run"] for line in lines}) == 1


@pytest.mark.timeout(300)
def test_stopped_worker_publishes_what_it_trained(
    tmp_path: Path, redis_url: str, connection: Connection, tiny_model_dir: Path, rows: Path
) -> None:
    """A worker that ends long before its sync interval has passed still gets its work into the expert."""
    request = SpecRequest(
        base_model=str(tiny_model_dir), lora=LoraSettings(rank=2), rules=RuleSet(sync_interval_s=600.0)
    )
    ensure_experts(connection, {"b": 1.0}, request)
    command = ["worker", "run", "--redis", redis_url, "--stream", "b", "--data", str(rows), "--name", "ben"]
    with running(tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis_url, "--expert", "b"):
        done = fedmoe(*command, "--max-steps", "3")
    assert done.returncode == 0, done.stderr
    assert "done: updates applied: 1" in done.stdout
    assert GatewayStore(connection).meta("b").n_examples == 12
    assert not connection.client.exists("fedmoe:{b}:worker:ben")


@pytest.mark.timeout(300)
def test_what_nobody_decides_is_kept_or_said_to_be_lost(
    tmp_path: Path, redis_url: str, connection: Connection, tiny_model_dir: Path, rows: Path
) -> None:
    """No aggregator at the end: with --state-dir a later run brings it in, without it exit 1 and a sentence."""
    request = SpecRequest(
        base_model=str(tiny_model_dir), lora=LoraSettings(rank=2), rules=RuleSet(sync_interval_s=0.05)
    )
    ensure_experts(connection, {"a": 1.0}, request)
    command = ["worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--drain", "1"]
    lost = fedmoe_here(*command, "--name", "ben", "--max-steps", "100")
    assert lost.returncode == 1
    assert "steps since the last update that is in Redis are lost" in lost.stderr.strip().splitlines()[-1]
    state = ("--name", "anna", "--state-dir", str(tmp_path / "state"))
    kept = fedmoe_here(*command, *state, "--max-steps", "100")
    assert kept.returncode == 0, kept.stderr
    assert "kept in" in kept.stdout
    with running(tmp_path / "log", "aggregator", "run", "--redis", redis_url, "--expert", "a"):
        resumed = fedmoe_here(*command[:-1], "30", *state, "--max-steps", "1")
    assert resumed.returncode == 0, resumed.stderr
    log = [line for _, line in connection.client.xrange("fedmoe:{a}:log") if line[b"worker"] == b"anna"]
    assert sum(int(line[b"n_examples"]) for line in log) == 101 * 4


@pytest.mark.timeout(300)
def test_one_name_runs_once(tmp_path: Path, redis_url: str, aggregator: GatewayStore, rows: Path) -> None:
    """A second process of a living worker's name is refused, and the first goes on."""
    command = ["worker", "run", "--redis", redis_url, "--stream", "a", "--data", str(rows), "--name", "anna"]
    with running(tmp_path / "first.log", *command) as first:
        eventually("an update", lambda: aggregator.meta("a").version >= 1)
        second = fedmoe_here(*command)
        assert second.returncode == 1
        assert "Traceback" not in second.stderr
        assert "is running" in second.stderr.strip().splitlines()[-1]
        version = aggregator.meta("a").version
        eventually("another update", lambda: aggregator.meta("a").version > version)
        assert terminate(first) == 0


@pytest.mark.timeout(300)
def test_training_goes_on_without_redis(
    tmp_path: Path, tiny_model_dir: Path, rows: Path, server: EmbeddedRedis
) -> None:
    """Redis is killed and comes back from its AOF: the worker trained on meanwhile, and catches up."""
    with EmbeddedRedis(server=server.server) as redis:
        store = GatewayStore(Connection(RedisSettings(url=redis.url)))
        with (
            running(
                tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis.url, "--expert", "a",
                "--base-model", str(tiny_model_dir), "--sync-interval", "0.4", "--rank", "2",
            ),
            running(
                tmp_path / "worker.log", "worker", "run", "--redis", redis.url, "--stream", "a", "--data", str(rows),
                "--log-interval", "0.2", "--name", "w",
            ) as worker,
        ):  # fmt: skip
            eventually("two updates", lambda: store.meta("a").version >= 2)
            redis.kill()
            log = tmp_path / "worker.log"
            eventually("training without Redis", lambda: "cannot be reached" in log.read_text())
            before = steps(log)
            eventually("ten more steps", lambda: steps(log) > before + 10)
            redis.start()
            version = eventually("the server", lambda: store.meta("a").version)
            eventually("updates again", lambda: store.meta("a").version > version + 1)
            assert terminate(worker) == 0
        seqs = [int(line[b"seq"]) for _, line in store.connection.client.xrange("fedmoe:{a}:log")]
        assert seqs == list(range(1, len(seqs) + 1))


def steps(log: Path) -> int:
    """The last step that a worker's log names."""
    found = re.findall(r"step (\d+)", log.read_text())
    return int(found[-1]) if found else 0
