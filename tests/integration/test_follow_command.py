"""`fedmoe gateway follow` as a command: its options, its own rows, and a real process."""

import json
import logging
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


def test_the_command_looks_once(
    connection: Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    ran = tmp_path / "ran"
    with caplog.at_level(logging.INFO):
        fedmoe_here(
            *command, "--rank", "8", "--dtype", "bf16", "--base-name", "served", "--run", f"touch {ran}"
        )
    said = f"{os.readlink(out / 'current')} is current already: the command runs for each version after it"
    assert said in caplog.messages
    assert not ran.exists()
    both = fedmoe_here(*command, "--vllm", "http://127.0.0.1:1", "--run", "true")
    assert both.returncode == 2
    away = fedmoe_here(*command, "--vllm", "http://127.0.0.1:1")
    assert away.returncode == 1
    assert away.stderr == "fedmoe: not all was done; the lines above say why\n"


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--api-key", "K"), 2, "--api-key is for a server only"),
        (("--api-key", "K", "--run", "true"), 2, "--api-key is for a server only"),
        (("--base-model", "X"), 2, "--base-model is for --data only"),
        (("--data", "nowhere"), 2, "there is no 'nowhere': --data takes a directory, or EXPERT=FILE"),
        (("--data", "a=nowhere"), 1, "nowhere"),
        (("--data", "{empty}"), 1, "holds none of a.test.jsonl"),
        (("--data", "a={unusable}"), 1, "no usable row"),
    ],
)
@pytest.mark.parametrize("once", [("--once",), ()])
def test_what_cannot_be_used_is_one_sentence_at_the_start(
    connection: Connection,
    tmp_path: Path,
    options: tuple[str, ...],
    code: int,
    said: str,
    once: tuple[str, ...],
) -> None:
    """Nothing is dropped without a word, and nothing is tried again for ever."""
    make_expert(connection, "a")
    Gateway(connection).publish()
    (tmp_path / "empty").mkdir()
    (tmp_path / "unusable").write_text('{"prompt": 1}\n')
    given = [one.format(empty=tmp_path / "empty", unusable=tmp_path / "unusable") for one in options]
    url, out = connection.settings.url, tmp_path / "out"
    done = fedmoe_here("gateway", "follow", "--redis", url, "--dir", str(out), *once, *given)
    assert done.returncode == code
    last = done.stderr.splitlines()[-1]  # after the rows that cannot be used
    assert last.startswith("fedmoe: ")
    assert said in last
    assert "trying again" not in done.stderr + done.stdout
    assert not out.exists()


def test_a_base_model_that_is_not_there_is_found_out_at_the_start(
    connection: Connection, tmp_path: Path
) -> None:
    """The rows cannot be measured without it."""
    make_expert(connection, "a")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "n", "completion": "1"}\n')
    url, out = ("--redis", connection.settings.url), ("--dir", str(tmp_path / "out"))
    data = ("--data", f"a={rows}", "--base-model", str(tmp_path / "nowhere"))
    done = fedmoe_here("gateway", "follow", *url, *out, *data)
    assert done.returncode == 1
    assert done.stderr.startswith("fedmoe: ")
    assert "trying again" not in done.stderr + done.stdout


def test_it_waits_for_redis_before_its_rows_are_read(server: EmbeddedRedis, tmp_path: Path) -> None:
    """Redis is away at the start, or has no experts yet; a file that there is not is found out all the same."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "n", "completion": "1"}\n')
    command = (
        "gateway",
        "follow",
        "--redis",
        "redis://127.0.0.1:1",
        "--dir",
        str(tmp_path / "out"),
        "--once",
    )
    away = fedmoe_here(*command, "--data", f"a={rows}")
    assert (away.returncode, away.stderr) == (1, "fedmoe: not all was done; the lines above say why\n")
    assert "nowhere" in fedmoe_here(*command, "--data", "a=nowhere").stderr
    none_yet = fedmoe_here(
        *command[:3], server.url, *command[4:], "--data", str(tmp_path), "--prefix", "another"
    )
    assert (none_yet.returncode, none_yet.stderr) == (1, away.stderr)


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
