"""Real processes that are told to stop while they load, tokenize, or wait for a Redis that is frozen (SIGSTOP).

The bounds are far above what is promised and far below what it takes without it: for a server that is frozen, each
command would wait for its time-out, 20 s here.
"""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, load_base, load_config, structure
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from tests.federation import first_meta
from tests.processes import environment, eventually, fedmoe, running

BOUND_S = 15.0
DRAIN_S = 2.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    """A server of this test's own, so that it can be frozen."""
    with EmbeddedRedis() as server:
        yield server
        thaw(server)


def freeze(server: EmbeddedRedis) -> None:
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)


def thaw(server: EmbeddedRedis) -> None:
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGCONT)


@pytest.fixture
def store(redis: EmbeddedRedis) -> GatewayStore:
    return GatewayStore(Connection(RedisSettings(url=redis.url)))


def write_rows(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"number {n}", "completion": str(n)}) + "\n" for n in range(count))
    )
    return path


@pytest.fixture
def expert(store: GatewayStore, tiny_model_dir: Path) -> None:
    """The expert `a`, served by nobody."""
    base, lora = str(tiny_model_dir), LoraSettings(rank=2)
    config = load_config(base)
    spec = Spec(
        base_model=base,
        base_config=structure(config),
        layout=adapter_layout(config, lora),
        lora=lora,
    )
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    model = load_base(base, device=torch.device("cpu"))
    rules = RuleSet(sync_interval_s=0.3)
    meta = first_meta(spec, base_fingerprint=fingerprint(model), rules=rules)
    ExpertStore(store.connection, "a").create(spec, meta, buffer.file, gateway_weight=1.0)


@pytest.fixture
def worker(tmp_path: Path, redis: EmbeddedRedis, expert: None) -> list[str]:
    """The command line of a worker of `a` with few rows."""
    return worker_command(redis, write_rows(tmp_path / "few.jsonl", 30))


def worker_command(redis: EmbeddedRedis, data: Path) -> list[str]:
    return [
        "worker", "run", "--redis", redis.url, "--redis-timeout", "20", "--stream", "a", "--data", str(data),
        "--name", "w", "--drain", str(DRAIN_S), "--log-interval", "0.1",
    ]  # fmt: skip


def aggregator_command(redis: EmbeddedRedis, base_model: Path) -> list[str]:
    return [
        "aggregator", "run", "--redis", redis.url, "--redis-timeout", "20", "--expert", "a", "--base-model",
        str(base_model), "--rank", "2", "--sync-interval", "0.3", "--lease", "1",
    ]  # fmt: skip


@contextmanager
def until_said(log: Path, text: str, command: list[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """The command, running, once its log holds `text`."""
    with running(log, *command) as process:
        eventually(text, lambda: text in log.read_text())
        yield process


def stopped(process: "subprocess.Popen[bytes]", number: signal.Signals = signal.SIGTERM) -> int:
    """The exit code after a signal; fails if it takes too long."""
    process.send_signal(number)
    return process.wait(BOUND_S)


def last_line(log: Path) -> str:
    return log.read_text().strip().splitlines()[-1]


@pytest.mark.parametrize("count", [150_000, 400_000])
def test_while_many_rows_are_tokenized(
    tmp_path: Path, redis: EmbeddedRedis, expert: None, count: int
) -> None:
    """They take half a minute, or more on several cores; nothing is trained yet, so nothing is lost or left running."""
    command = worker_command(redis, write_rows(tmp_path / "many.jsonl", count))
    with until_said(tmp_path / "log", "tokenizing", command) as process:
        helpers: list[psutil.Process] = []
        if count > 150_000 and len(os.sched_getaffinity(0)) > 1:
            helpers = eventually("processes", lambda: psutil.Process(process.pid).children())
        assert stopped(process) == 0
        eventually("no process left", lambda: not any(helper.is_running() for helper in helpers))
    assert "nothing was trained yet" in last_line(tmp_path / "log")


def test_while_the_base_model_loads(tmp_path: Path, worker: list[str]) -> None:
    """Loading that cannot be interrupted and never ends: the process ends all the same."""
    code = (
        "import sys, time, producers.material as w, fedmoe.cli.main as m; "
        "w.load_base = lambda *a, **k: (print('loading for ever', flush=True), time.sleep(600)); m.main()"
    )
    with (tmp_path / "log").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *worker], env=environment(), stdout=out, stderr=subprocess.STDOUT
        )
    try:
        eventually("loading", lambda: "loading for ever" in (tmp_path / "log").read_text())
        assert stopped(process) == 0
    finally:
        process.kill()
        process.wait()
    assert last_line(tmp_path / "log") == "stopped before the training began: nothing was trained yet"


def test_worker_that_joins_a_frozen_redis(tmp_path: Path, redis: EmbeddedRedis, worker: list[str]) -> None:
    """Before it has joined there is nothing to lose."""
    with until_said(tmp_path / "log", "loading", worker) as process:
        freeze(redis)
        time.sleep(3.0)  # it may have come to any step of joining
        assert stopped(process) == 0
    assert "stopped" in last_line(tmp_path / "log")


def test_worker_whose_redis_is_frozen_keeps_all(
    tmp_path: Path, redis: EmbeddedRedis, store: GatewayStore, worker: list[str], tiny_model_dir: Path
) -> None:
    """With a state directory it exits 0, and a later start brings every row of it into the expert."""
    state = ["--state-dir", str(tmp_path / "state")]
    with until_said(tmp_path / "log", "step 5", worker + state) as process:
        freeze(redis)
        assert stopped(process) == 0
    assert "what has no answer yet is kept in" in last_line(tmp_path / "log")
    steps = [
        line.split()[1] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("step")
    ]
    thaw(redis)
    with until_said(tmp_path / "aggregator", "serving", aggregator_command(redis, tiny_model_dir)):
        again = fedmoe(*worker, *state, "--drain", "30", "--max-steps", "1")
    assert again.returncode == 0, again.stderr
    assert store.meta("a").n_examples == (int(steps[-1]) + 1) * 4


def test_worker_whose_redis_is_frozen_says_what_is_lost(
    tmp_path: Path, redis: EmbeddedRedis, worker: list[str]
) -> None:
    """Without a state directory: exit 1, how many steps are lost, why, and what would have kept them."""
    with until_said(tmp_path / "log", "step 5", worker) as process:
        freeze(redis)
        assert stopped(process) == 1
    last = last_line(tmp_path / "log")
    assert "steps since the last update that is in Redis are lost" in last
    assert "had not answered when it was time to stop" in last
    assert "--state-dir" in last


def test_worker_that_waits_in_vain_is_recorded_as_stopped(
    tmp_path: Path, store: GatewayStore, worker: list[str]
) -> None:
    """No aggregator decides its update: it waits for the whole drain, and still says how it left."""
    with until_said(tmp_path / "log", "step 5", [*worker, "--state-dir", str(tmp_path / "state")]) as process:
        assert stopped(process) == 0
    trace = store.connection.client.hgetall(store.connection.keys.expert("a").trace("w"))
    assert trace.get(b"how") == b"stopped"


@pytest.mark.parametrize("text", ["looking at the base model", "serving from version"])
def test_aggregator_whose_redis_is_frozen(
    tmp_path: Path, redis: EmbeddedRedis, tiny_model_dir: Path, text: str
) -> None:
    """While it makes its experts, and while it serves them."""
    with until_said(tmp_path / "log", text, aggregator_command(redis, tiny_model_dir)) as process:
        children = psutil.Process(process.pid).children()
        freeze(redis)
        time.sleep(1.0)
        assert stopped(process) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not any(child.is_running() for child in children)


def test_aggregator_that_waits_for_heartbeats(
    tmp_path: Path, redis: EmbeddedRedis, store: GatewayStore, tiny_model_dir: Path
) -> None:
    """Told to stop before it has created its experts, it creates none."""
    with until_said(
        tmp_path / "log", "looking at the base", aggregator_command(redis, tiny_model_dir)
    ) as process:
        assert stopped(process) == 0
    assert last_line(tmp_path / "log") == "stopped before it served any expert: nothing is lost"
    assert not store.experts()


def test_lost_terminal(
    tmp_path: Path, redis: EmbeddedRedis, store: GatewayStore, worker: list[str], tiny_model_dir: Path
) -> None:
    """An ssh that drops: SIGHUP, and no line can be written any more; the worker publishes what it has trained."""
    with until_said(tmp_path / "aggregator", "serving", aggregator_command(redis, tiny_model_dir)):
        with in_terminal([*worker, "--drain", "30"]) as (process, read):
            eventually("training", lambda: b"step " in read())
            trained = store.meta("a").n_examples
        assert process.wait(30.0 + BOUND_S) == 0
        assert store.meta("a").n_examples > trained
    assert not store.connection.client.exists("fedmoe:{a}:worker:w")


@contextmanager
def in_terminal(
    command: list[str],
) -> Iterator[tuple["subprocess.Popen[bytes]", Callable[[], bytes]]]:
    """A command in a terminal of its own, and what it has written so far; at the end the terminal goes away."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fedmoe.cli.main", *command], env=environment(), start_new_session=True,
        stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509  # no thread holds a lock here
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)
    seen = b""

    def read() -> bytes:
        nonlocal seen
        seen += os.read(ours, 65536)
        return seen

    try:
        yield process, read
        os.close(ours)
    except BaseException:
        process.kill()
        raise
