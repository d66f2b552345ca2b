"""`fedmoe gateway follow` as a command: its options, its own rows, and a real process."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, structure
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.spec import Spec
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from tests.adapter_server import stand_in
from tests.federation import make_expert
from tests.following import Gateway, config_in
from tests.processes import eventually, fedmoe_here, running, terminate
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.one_server


def test_the_command_looks_once(connection: Connection, tmp_path: Path) -> None:
    """With rank, dtype and the served base model's name; other options give other names; two servers are too many."""
    Gateway(connection).publish()
    out = tmp_path / "out"
    command = ("gateway", "follow", "--redis", connection.settings.url, "--dir", str(out), "--once")
    plain = fedmoe_here(*command)
    assert (plain.returncode, plain.stderr) == (0, "")
    first = os.readlink(out / "current")
    shaped = fedmoe_here(*command, "--rank", "8", "--dtype", "bf16", "--base-name", "served")
    assert shaped.returncode == 0
    assert os.readlink(out / "current") != first
    config = config_in(out / "current")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (8, 16, "served")
    both = fedmoe_here(*command, "--vllm", "http://127.0.0.1:1", "--run", "true")
    assert both.returncode == 2
    away = fedmoe_here(*command, "--vllm", "http://127.0.0.1:1")
    assert away.returncode == 1
    assert away.stderr == "fedmoe: not all was done; the lines above say why\n"


def test_it_survives_redis_and_ends_at_once(server: EmbeddedRedis, tmp_path: Path) -> None:
    """A real process: Redis goes away and comes back empty of nothing; SIGTERM ends it within three seconds."""
    log = tmp_path / "log"
    with EmbeddedRedis(server=server.server, options=["--appendonly", "no"]) as redis, stand_in() as vllm:
        connection = Connection(RedisSettings(url=redis.url))
        gateway = Gateway(connection)
        gateway.publish()
        options = (
            "--dir",
            str(tmp_path / "out"),
            "--vllm",
            vllm.url,
            "--interval",
            "0.2s",
            "--redis",
            redis.url,
        )
        with running(log, "gateway", "follow", *options) as process:
            eventually("the first version", lambda: [n for n in vllm.adapters if "-v1-" in n])
            assert redis.process
            connection.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            os.kill(redis.process.pid, signal.SIGSTOP)  # it no longer answers
            time.sleep(0.5)
            os.kill(redis.process.pid, signal.SIGCONT)
            gateway.publish()
            eventually("the second version", lambda: [n for n in vllm.adapters if "-v2-" in n])
            eventually("the first one's end", lambda: len(vllm.adapters) == 1)
            eventually("its line", lambda: ": unloaded" in log.read_text())
            began = time.monotonic()
            assert terminate(process) == 0, log.read_text()
            assert time.monotonic() - began < 3.0
        assert "Traceback" not in log.read_text()
        assert log.read_text().count("is the current version now") == 2


def test_the_loss_on_own_rows_is_that_of_evaluate(
    connection: Connection, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """`--data` measures it on the base model; what is worse by it stays unserved, also in another process."""
    config, lora = tiny_config(), LoraSettings(rank=4)
    spec = Spec(
        base_model=str(tiny_model_dir),
        base_config=structure(config),
        layout=adapter_layout(config, lora),
        lora=lora,
    )
    begun = initial_weights(spec.layout, 0)
    pinned = {"base_fingerprint": fingerprint(tiny_model())}
    make_expert(connection, "a", spec=spec, weights=begun, **pinned)
    make_expert(connection, GATEWAY, spec=spec, weights=begun, version=1, **pinned)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"n {n}", "completion": str(n)}) + "\n" for n in range(6)))
    url, out = ("--redis", connection.settings.url), tmp_path / "out"
    command = ("gateway", "follow", *url, "--dir", str(out), "--once", "--data", f"a={rows}")
    assert fedmoe_here(*command).returncode == 0
    first = os.readlink(out / "current")
    assert first.startswith("gateway-v1-")
    measured = json.loads(fedmoe_here("evaluate", *url, "--data", f"a={rows}", "--json", "-").stdout)
    info = json.loads((out / first / "fedmoe.json").read_text())
    assert info["validation_loss"] == pytest.approx(measured["loss"][GATEWAY]["mean"])
    worse = AdapterBuffer(spec.layout)
    worse.flat.copy_(begun).add_(randn(1, spec.layout.numel), alpha=0.5)
    connection.client.delete(*connection.client.keys("fedmoe:{gateway}:*"))
    make_expert(connection, GATEWAY, spec=spec, weights=worse.flat, version=2, **pinned)
    assert fedmoe_here(*command).returncode == 0
    assert os.readlink(out / "current") == first
    assert [path.name for path in out.glob("gateway-*")] == [first]
