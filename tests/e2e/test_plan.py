"""`fedmoe plan` beside a real federation: processes, a real server with its append-only file, a tiny model."""

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from fedmoe.protocol.plan import DISK, IN, MEMORY, OUT, Shape, terms, total
from fedmoe.settings import RedisSettings
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis, find_server
from fedmoe.tools.backup import back_up
from fedmoe.tools.plan import PlanSettings, shape_of
from tests.documents import ROOT
from tests.processes import eventually, running, terminate
from tests.tiny_federation import write_rows

EXPERTS = ("red_expert", "blue_expert")
INTERVAL_S, REBUILD_S, WINDOW_S = 1.0, 2.0, 24.0  # tails fill up three times
AGREES = 0.1  # the promise


def settings(model: Path) -> PlanSettings:
    """As the processes below are started; the adapter is large enough for the bytes around it not to count."""
    return PlanSettings(
        experts=2, workers=2, base_model=str(model), rank=256, wire_format="int8", sync_interval_s=INTERVAL_S,
        gateway_interval_s=REBUILD_S,
    )  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """With our redis.conf."""
    data = tmp_path / "redis"
    data.mkdir()
    options = ["--include", str(ROOT / "ops" / "redis.conf"), "--port", "0"]
    with EmbeddedRedis(data, server=find_server(), options=options) as running_server:
        yield running_server


class Meter:
    """What a server says of itself."""

    def __init__(self, connection: Connection, server: EmbeddedRedis) -> None:
        self.connection, self.redis, self._server = connection, connection.client, server

    def counters(self) -> dict[str, float]:
        """Bytes received and sent since its start, bytes of the append-only file, updates applied, seconds."""
        info = self.redis.info("stats")
        files = [path for path in self._server.directory.rglob("*.aof") if path.is_file()]
        versions = [self.redis.hget(self.connection.keys.expert(name).meta, "version") for name in EXPERTS]
        return {
            IN: info["total_net_input_bytes"], OUT: info["total_net_output_bytes"],
            "file": sum(path.stat().st_size for path in files), "updates": sum(map(int, versions)),
            "s": time.monotonic(),
        }  # fmt: skip

    def memory(self) -> dict[str, int]:
        """Bytes by the kind of key."""
        found: dict[str, int] = {}
        for key in self.redis.scan_iter(count=1000):
            name = key.decode()
            kind = "merged gateway" if "{merged}" in name else name.partition("}:")[2].split(":")[0]
            found[kind] = found.get(kind, 0) + self.redis.memory_usage(key, samples=0)
        return found


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def differences(measured: Mapping[str, float], predicted: Mapping[str, float]) -> dict[str, float]:
    """By which share the measured value is off, where that is more than promised."""
    ratios = {name: measured[name] / predicted[name] - 1 for name in predicted}
    print({name: f"{ratio:+.1%}" for name, ratio in ratios.items()})
    return {name: ratio for name, ratio in ratios.items() if abs(ratio) > AGREES}


@pytest.mark.timeout(300)
def test_a_real_federation_needs_what_the_plan_says(
    server: EmbeddedRedis, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Memory by the kind of key, network in both directions, the append-only file, a backup, a state directory."""
    planned = settings(tiny_model_dir)
    shape = shape_of(planned)
    with ExitStack() as stack:
        redis = RedisSettings(url=server.url)
        meter = Meter(Connection(redis), server)
        stack.callback(meter.connection.close)
        names = [word for name in EXPERTS for word in ("--expert", name)]
        aggregator = stack.enter_context(running(
            tmp_path / "aggregator.log", "aggregator", "run", "--redis", server.url, *names,
            "--base-model", planned.base_model, "--rank", str(planned.rank), "--wire-format", planned.wire_format,
            "--sync-interval", str(INTERVAL_S), "--gateway-interval", str(REBUILD_S), "--batch-size", "1",
        ))  # fmt: skip
        for name in EXPERTS:
            rows = write_rows(tmp_path / f"{name}.jsonl", name, 20)
            stack.enter_context(running(
                tmp_path / f"{name}.log", "worker", "run", "--redis", server.url, "--stream", name,
                "--data", str(rows), "--state-dir", str(tmp_path / name), "--validate", "0", "--no-domain-vector",
            ))  # fmt: skip

        def versions() -> list[int]:
            keys = [meter.connection.keys.expert(name).meta for name in EXPERTS]
            return [int(meter.redis.hget(key, "version")) for key in keys]

        def rebuilds() -> int:
            return (tmp_path / "aggregator.log").read_text().count("merged gateway: rebuilt")

        eventually("both train", lambda: min(versions()) >= 3, timeout_s=150)
        built, before = rebuilds(), meter.counters()
        eventually("the window is over", lambda: time.monotonic() - before["s"] > WINDOW_S)
        after, built = meter.counters(), rebuilds() - built
        moved = {name: after[name] - before[name] for name in after}

        assert terminate(aggregator) == 0
        streams = [meter.connection.keys.expert(name).updates for name in EXPERTS]
        eventually("both wait for a decision", lambda: all(meter.redis.xlen(key) for key in streams))
        held = meter.memory()
        back_up(BackupStore(meter.connection), tmp_path / "backup")

    # No worker publishes earlier than it should; on a busy machine it is later.
    updates_per_s = moved["updates"] / moved["s"]
    assert updates_per_s < shape.updates_per_s * 1.1
    compare(
        replace(
            shape,
            sync_interval_s=shape.memberships / updates_per_s,
            gateway_interval_s=moved["s"] / built,  # on a slow machine it rests longer
            keep=0,
        ),
        moved,
        held,
        tmp_path,
    )


def compare(shape: Shape, moved: Mapping[str, float], held: Mapping[str, int], place: Path) -> None:
    """The plan at the pace that was measured."""
    found = terms(shape)
    amount = {(term.part, term.name): term.amount for term in found}
    measured = {
        "weights": held["weights"],
        "packed weights": held["packed"],
        "merged gateway": held["merged gateway"],
        "undecided updates": held["payload"],
    }
    assert 0 <= held.get("tail", 0) < 1.2 * amount[MEMORY, "tails, when full"]
    predicted = {name: amount[MEMORY, name] for name in measured}
    measured |= {part: moved[part] / moved["s"] for part in (IN, OUT)}
    predicted |= {part: total(found, part) for part in (IN, OUT)}
    measured |= {
        "written": moved["file"] / moved["s"] * 86_400,
        "backup": size_of(place / "backup"),
        "checkpoints": 2 * sum((place / name / "worker.safetensors").stat().st_size for name in EXPERTS),
        "an update on disk": mean([path.stat().st_size for path in place.glob("*/updates/*.update")]),
    }
    predicted |= {
        "written": amount[DISK, "Redis: written a day"],
        "backup": amount[DISK, "backups"],
        "checkpoints": amount[DISK, "workers: checkpoints, old and new"],
        "an update on disk": shape.update,
    }
    assert differences(measured, predicted) == {}
