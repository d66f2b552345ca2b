"""What an expert costs that is too long for one Redis string: seconds, and the peak memory of each process.

    .venv/bin/python -m ops.bench.large --mib 828

It needs about eight times that memory, so it is no part of `ops/bench.sh`. Each step runs in a process of its own.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable

from consumers.compaction import compact
from consumers.expert import Expert
from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.protocol.records import PROTOCOL, Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import RedisSettings
from fedmoe.store.backup import BackupStore
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import new_id
from fedmoe.store.worker import WorkerStore
from producers.pull import pull

NAME = "large"
MIB = 2**20


def spec_of(mib: int) -> Spec:
    """An expert whose weights weigh so much, in 64 tensors."""
    layout = Layout.of([(f"t{number}", (mib * MIB // 4 // 64,)) for number in range(64)])
    return Spec(base_model="large", base_config={}, layout=layout, wire_format="int4")


def create(connection: Connection, spec: Spec) -> None:
    """An aggregator creates the expert."""
    commit = new_id()
    meta = Meta(lineage=new_id(), commit=commit, weights_commit=commit, spec=spec.digest, protocol=PROTOCOL)
    assert ExpertStore(connection, NAME).create(spec, meta, AdapterBuffer(spec.layout).file)


def load(connection: Connection, spec: Spec) -> None:
    """An aggregator loads it."""
    Expert(ExpertStore(connection, NAME), spec, aggregator="one").load()


def load_and_write(connection: Connection, spec: Spec) -> None:
    """The same, and it writes the weights again."""
    expert = Expert(ExpertStore(connection, NAME), spec, aggregator="one")
    expert.load()
    compact(expert)


def pull_exact(connection: Connection, spec: Spec) -> None:
    """A worker pulls the exact weights, not those that are packed."""
    WorkerStore(connection, NAME, "w").pull_exact(spec)


def pull_packed(connection: Connection, spec: Spec) -> None:
    """A worker pulls as usual."""
    assert pull(WorkerStore(connection, NAME, "w"), spec, known="").weights is not None


def back_up(connection: Connection, spec: Spec) -> None:
    """An operator reads it."""
    BackupStore(connection).read(NAME)


def _measured(step: Callable[[Connection, Spec], None], url: str, mib: int) -> None:
    connection, spec = Connection(RedisSettings(url=url, timeout_s=60.0)), spec_of(mib)
    connection.ping()
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    step(connection, spec)
    took_s = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    memory = connection.client.info("memory")
    print(
        f"{step.__name__:<15} {took_s:6.1f} s  {peak:6.0f} MiB, {peak / mib:.2f} times the weights;  "
        f"Redis {memory['used_memory'] / MIB:6.0f} MiB, at most {memory['used_memory_peak'] / MIB:.0f}",
        flush=True,
    )


def main() -> None:
    """Print a line for each step."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=828, help="size of the weights in MiB  [828]")
    mib = parser.parse_args().mib
    spawn = multiprocessing.get_context("spawn")
    with EmbeddedRedis(options=["--appendonly", "no", "--save", ""]) as redis:
        for step in (create, load, load_and_write, pull_exact, pull_packed, back_up):
            process = spawn.Process(target=_measured, args=(step, redis.url, mib))
            process.start()
            process.join()
            assert process.exitcode == 0, step.__name__


if __name__ == "__main__":
    main()
