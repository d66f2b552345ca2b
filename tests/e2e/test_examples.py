"""examples/: each training script as a reader would start it, beside `fedmoe worker run` on the same expert."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.processes import eventually, fedmoe, running, terminate

pytestmark = pytest.mark.one_server

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
ROWS = {
    "trl_worker.py": [{"prompt": f"number {n}", "completion": str(n)} for n in range(40)],
    "own_loop.py": [{"text": f"number {n} is {n}"} for n in range(40)],
}


@pytest.fixture
def kept(tmp_path: Path, redis_url: str, tiny_model_dir: Path, connection: Connection) -> Iterator[Path]:
    """A running aggregator of sql_expert; where it keeps the updates."""
    kept = tmp_path / "kept"
    with running(
        tmp_path / "aggregator.log", "aggregator", "run", "--redis", redis_url, "--expert", "sql_expert",
        "--base-model", str(tiny_model_dir), "--rank", "2", "--sync-interval", "0.4", "--lease", "1",
        "--keep-updates", str(kept),
    ):  # fmt: skip
        eventually("the expert", lambda: GatewayStore(connection).meta("sql_expert"))
        yield kept


def test_sft_trainer_fits_on_a_page() -> None:
    assert len((EXAMPLES / "trl_worker.py").read_text().splitlines()) <= 40


@pytest.mark.timeout(240)
@pytest.mark.parametrize("script", ROWS)
def test_script_trains_beside_a_worker(
    tmp_path: Path, redis_url: str, tiny_model_dir: Path, kept: Path, connection: Connection, script: str
) -> None:
    """Both are applied, and `fedmoe verify` finds the expert equal; started again, the script goes on."""
    rows, ours = tmp_path / "rows.jsonl", tmp_path / "ours.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS[script])))
    ours.write_text("\n".join(map(json.dumps, ROWS["trl_worker.py"])))
    arguments = [
        "--data",
        str(rows),
        "--base-model",
        str(tiny_model_dir),
        "--name",
        "script",
        "--steps",
        "40",
    ]
    log = tmp_path / "script.log"
    store = GatewayStore(connection)

    def is_in_the_log(worker: str) -> bool:
        return any(line["worker"] == worker for line in store.history("sql_expert")[2] if "worker" in line)

    with running(
        tmp_path / "worker.log", "worker", "run", "--redis", redis_url, "--stream", "sql_expert", "--data", str(ours),
        "--name", "plain",
    ) as worker:  # fmt: skip
        eventually("the worker's update", lambda: is_in_the_log("plain"))
        for _ in range(2):
            with running(
                log, *arguments, program=[str(EXAMPLES / script)], FEDMOE_REDIS=redis_url, HOME=str(tmp_path),
                HF_HOME=str(tmp_path), cwd=tmp_path,
            ) as process:  # fmt: skip
                assert process.wait(100) == 0, log.read_text()
        assert terminate(worker) == 0
    assert is_in_the_log("script")
    with running(log, *arguments, "--expert", "other", program=[str(EXAMPLES / script)], FEDMOE_REDIS=redis_url,
                 cwd=tmp_path) as process:  # fmt: skip
        assert process.wait(100) == 2
    assert "there is no expert 'other'; there are: sql_expert" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert store.meta("sql_expert").refused == 0
    lines = [line for line in store.history("sql_expert")[2] if line.get("worker") == "script"]
    assert len({line["run"] for line in lines}) == 1
    done = fedmoe("verify", "--redis", redis_url, "--keep-updates", str(kept))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("equal")
