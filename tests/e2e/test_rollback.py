"""An operator rolls an expert back while two aggregators and two workers run, each a process of its own."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from tests.e2e.test_training import write_rows
from tests.processes import eventually, fedmoe, running, terminate

NAME = "red"


@pytest.mark.timeout(300)
def test_rollback_under_load(
    tmp_path: Path, redis_url: str, connect: Callable[[], Connection], tiny_model_dir: Path
) -> None:
    """Twice; what was trained on what is gone is refused, workers go on, decisions stay, and the expert replays."""
    store, expert = GatewayStore(connect()), ExpertStore(connect(), NAME)
    at, kept = ("--redis", redis_url), ("--keep-updates", str(tmp_path / "kept"))
    rows = write_rows(tmp_path / "rows.jsonl", "colour", "red red red")
    aggregate = (
        "aggregator", "run", *at, "--expert", NAME, "--base-model", str(tiny_model_dir), "--rank", "4",
        "--sync-interval", "0.2", "--learning-rate", "0.003", "--gateway-interval", "0.3", *kept, "--lease", "1",
    )  # fmt: skip
    with ExitStack() as stack:
        aggregators = [stack.enter_context(running(tmp_path / "aggregator0.log", *aggregate))]
        eventually("the expert", lambda: NAME in store.experts(), timeout_s=90)
        aggregators.append(stack.enter_context(running(tmp_path / "aggregator1.log", *aggregate)))
        workers = [
            stack.enter_context(
                running(
                    tmp_path / f"{name}.log", "worker", "run", *at, "--stream", NAME, "--data", str(rows),
                    "--name", name, "--state-dir", str(tmp_path / name), "--log-interval", "0.5",
                )
            )
            for name in ("alice", "bob")
        ]  # fmt: skip
        for to in (2, 4):
            before = store.meta(NAME).version
            eventually("six updates more", lambda v=before: store.meta(NAME).version >= v + 6, timeout_s=90)
            done = fedmoe("expert", "rollback", *at, NAME, "--to", str(to), *kept)
            assert done.returncode == 0, done.stderr
            (made,) = re.findall(rf"red: version (\d+) has the weights of version {to}; ", done.stdout)
            eventually(
                "updates after it", lambda v=int(made): store.meta(NAME).version >= v + 4, timeout_s=90
            )
        assert [terminate(worker) for worker in workers] == [0, 0]
        assert [terminate(aggregator) for aggregator in aggregators] == [0, 0]
    meta = store.meta(NAME)
    assert [one.to for one in meta.rolled_back.intervals] == [2, 4]
    assert meta.version == meta.applied + 2
    assert meta.refused > 0
    done = fedmoe("verify", *at, *kept)
    told = f"red: replayed {meta.version} of {meta.version} versions, 2 of them rollbacks, equal\n"
    assert (done.returncode, done.stdout) == (0, told)
    decided = expert.load().decided
    assert set(decided) == {"alice", "bob"}
    logs = "".join((tmp_path / f"{name}.log").read_text() for name in ("alice", "bob"))
    assert f"an operator rolled expert '{NAME}' back to version 2" in logs
    assert "Traceback" not in logs + "".join((tmp_path / f"aggregator{n}.log").read_text() for n in range(2))
