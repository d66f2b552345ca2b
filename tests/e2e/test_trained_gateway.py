"""Workers of two experts train the gateway beside their own expert, as real processes."""

import json
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedmoe.protocol.names import GATEWAY, domain_of
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.e2e.test_training import write_rows
from tests.processes import eventually, fedmoe, running, terminate


@pytest.mark.timeout(300)
def test_gateway_knows_both_domains_after_all_were_killed_once(
    tmp_path: Path, redis_url: str, connect: Callable[[], Connection], tiny_model_dir: Path
) -> None:
    """Switched on with a command; killed and started again; every expert replays; the export is the gateway."""
    store = GatewayStore(connect())
    at = ("--redis", redis_url)
    rows = {
        "red": write_rows(tmp_path / "red.jsonl", "colour", "red red red"),
        "blue": write_rows(tmp_path / "blue.jsonl", "what", "blue blue"),
    }
    aggregate = (
        "aggregator", "run", *at, "--expert", "red", "--expert", "blue", "--base-model", str(tiny_model_dir),
        "--rank", "4", "--sync-interval", "0.5", "--learning-rate", "0.003", "--gateway-interval", "0.3",
        "--keep-updates", str(tmp_path / "kept"), "--lease", "1",
    )  # fmt: skip

    def work(stack: ExitStack, name: str) -> subprocess.Popen[bytes]:
        return stack.enter_context(
            running(
                tmp_path / f"{name}.log", "worker", "run", *at, "--stream", name, "--data", str(rows[name]),
                "--name", "host", "--state-dir", str(tmp_path / name), "--log-interval", "0.5",
                "--checkpoint-interval", "1",
            )
        )  # fmt: skip

    with ExitStack() as stack:
        aggregator = stack.enter_context(running(tmp_path / "aggregator.log", *aggregate))
        eventually("the experts", lambda: set(store.experts()) == set(rows), timeout_s=60)
        for name in rows:
            done = fedmoe("expert", "set", *at, name, "--train", "both")
            assert (done.returncode, "train expert -> both" in done.stdout) == (0, True), done.stderr
        workers = [work(stack, name) for name in rows]
        eventually("four versions", lambda: store.meta(GATEWAY).version >= 4, timeout_s=90)
        for process in (*workers, aggregator):
            process.kill()
            process.wait()
        aggregator = stack.enter_context(running(tmp_path / "aggregator2.log", *aggregate))
        before = store.meta(GATEWAY).version
        workers = [work(stack, name) for name in rows]
        eventually(
            "twenty versions of the gateway",
            lambda: store.meta(GATEWAY).version >= before + 20,
            timeout_s=120,
        )
        shown = json.loads(fedmoe("status", *at, "--json").stdout)
        alive = {one["name"]: {worker["name"] for worker in one["workers"]} for one in shown["experts"]}
        assert alive == {"red": {"host"}, "blue": {"host"}, "gateway": {"red.host", "blue.host"}}
        assert [terminate(worker) for worker in workers] == [0, 0]
        assert terminate(aggregator) == 0
    _, _, lines = store.history(GATEWAY)
    assert {domain_of(line["worker"]) for line in lines} == set(rows)
    done = fedmoe("verify", *at, "--keep-updates", str(tmp_path / "kept"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines() if ", equal" in line] == [
        "blue",
        "gateway",
        "red",
    ]
    files = [word for name, path in rows.items() for word in ("--data", f"{name}={path}")]
    done = fedmoe("evaluate", *at, *files, "--rows", "10", "--json", "-")
    assert done.returncode == 0, done.stderr
    losses = json.loads(done.stdout)["loss"]
    assert list(losses) == ["base", "blue", "red", "routed by domain vectors", "arrow", "gateway", "merged"]
    assert [set(store.vectors(name)) for name in ("blue", "red", GATEWAY)] == [{"host"}, {"host"}, set()]
    for name in rows:
        assert losses["gateway"][name] < losses["base"][name] - 0.2, losses
    done = fedmoe("gateway", "export", *at, "--out", str(tmp_path / "gw"))
    assert "gateway (rank 4, " in done.stdout, done.stderr
    assert f"built from gateway v{store.meta(GATEWAY).version}" in done.stdout
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert PeftModel.from_pretrained(base, str(tmp_path / "gw")).peft_config["default"].r == 4
