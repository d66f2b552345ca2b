"""`bash ops/chaos.sh`: kill everything again and again, then count."""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from fedmoe.embedded import EmbeddedRedis


def main() -> int:
    """Run it; 0 if nothing was lost, nothing doubled, and the replay is equal."""
    parser = argparse.ArgumentParser(prog="ops/chaos.sh", description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="end after so many kill -9  [60]")
    parser.add_argument("--seed", type=int, default=0, help="of the dice; the timing is the machine's  [0]")
    parser.add_argument("--dir", type=Path, help="keep all files here  [a temporary directory]")
    parser.add_argument("--without", default="", choices=["", "commit-check", "prev", "checkpoint-first"],
                        help="do without a rule of the protocol, to see what happens")  # fmt: skip
    options = parser.parse_args()

    from tests.chaos.actors import Place
    from tests.chaos.ledger import settle
    from tests.chaos.scheduler import Chaos
    from tests.proxy import Proxy

    directory = options.dir or Path(tempfile.mkdtemp(prefix="fedmoe-chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        parser.error(f"{directory} is not empty")
    rows = [json.dumps({"prompt": str(n), "completion": str(n)}) for n in range(100)]
    (directory / "rows.jsonl").write_text("\n".join(rows))
    (directory / "redis").mkdir()
    began = time.monotonic()
    with EmbeddedRedis(directory / "redis") as server, Proxy(server.socket) as proxy:
        print(f"{server.server}, two aggregators, six workers; files in {directory}", flush=True)
        place = Place(directory, proxy.url)
        dice = random.Random(options.seed)  # dice, not a secret
        run = Chaos(
            place, server, proxy, dice, kills=options.kills, say=lambda line: print(line, flush=True),
            without=options.without,
        )  # fmt: skip
        run.run()
        books = settle(run.connection, place)
    for name, count in sorted(run.counts.items()):
        if not name.startswith("at "):
            print(f"{name}: {count}")
    points = [name for name in run.counts if name.startswith("at ")]
    print(
        f"failpoints: {len(points)} places, {', '.join(sorted(p.removeprefix('at ') for p in points)[:200])}"
    )
    print(f"proxy: {dict(proxy.hits)}")
    print(run.takeovers)
    print(run.restarts)
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
