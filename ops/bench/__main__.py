"""`bash ops/bench.sh`: measure, print a table, write JSON."""

import argparse
import importlib
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

BENCHMARKS = (
    "wire",
    "machine",
    "codec",
    "stages",
    "throughput",
    "latency",
    "file",
    "growth",
    "overlap",
    "turns",
)
ON_REQUEST = (
    "size",
    "quality",
    "learning",
    "routing",
    "flower",
    "race",
    "tls",
    "scale",
    "cluster",
    "exchange",
    "before",
)  # take gigabytes, minutes, an environment of its own
EVERYTHING = ", ".join((*BENCHMARKS, *ON_REQUEST))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ops/bench.sh", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="what the bars need, in at most eight minutes")
    size.add_argument("--tiny", action="store_true", help="a test of the harness: its numbers mean nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"among {EVERYTHING}  [all but {', '.join(ON_REQUEST)}]",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="learning and race: keep each run in DIR; runs that are there are not repeated",
    )
    parser.add_argument(
        "--part",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="learning: only these parts of the full form",
    )
    parser.add_argument(
        "--before",
        metavar="REV",
        help="also compare with the release before: a git revision, which is installed beside this one",
    )
    parser.add_argument("--rows", type=int, metavar="N", help="learning: held-out rows of each domain")
    parser.add_argument("--out", type=Path, default=Path("bench.json"), help="the results  [bench.json]")
    return parser.parse_args()


def _refuse(sentence: str) -> int:
    print(f"ops/bench.sh: {sentence}", file=sys.stderr)
    return 2


def main() -> int:
    """Run it; 0 if all was measured, 1 if something broke, 2 if it cannot be done as asked."""
    options = _parse()
    names = options.only or BENCHMARKS
    if unknown := [name for name in names if name not in (*BENCHMARKS, *ON_REQUEST)]:
        return _refuse(f"there is no benchmark {unknown[0]!r}: choose among {EVERYTHING}")
    if options.before:
        names = ("before", *names)  # first: a missing revision ends the run before anything is measured
    elif "before" in names:
        return _refuse("the benchmark 'before' needs the release to compare with: --before REV")
    if options.out.is_dir() or not os.access(options.out.absolute().parent, os.W_OK):
        return _refuse(f"{options.out} cannot be written: give --out another file")

    import redis

    from fedmoe.errors import FedMoEError
    from fedmoe.store.embedded import find_server
    from ops.bench import plan as plans
    from ops.bench.fedmoe_side import DEFAULT_FORMAT
    from ops.bench.processes import BenchError
    from ops.bench.result import BARS, Result, write_json

    plan = plans.QUICK if options.quick else plans.TINY if options.tiny else plans.FULL
    if odd := [part for part in options.part or () if part not in plan.learning.parts]:
        return _refuse(f"there is no part {odd[0]!r}: choose among {', '.join(plan.learning.parts)}")
    parts = tuple(dict.fromkeys(options.part or plan.learning.parts))
    rows = options.rows or plan.learning.rows
    learning = replace(plan.learning, parts=parts, rows=rows, keep=options.keep)
    plan = replace(plan, before=options.before, learning=learning)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes are ended first
    results: list[Result] = []
    began = time.monotonic()
    try:
        print(f"{find_server()}, all over loopback TCP; {os.cpu_count()} cores, load average "
              f"{' '.join(f'{load:.2f}' for load in os.getloadavg())}; default format {DEFAULT_FORMAT}")  # fmt: skip
        for name in dict.fromkeys(names):
            print(f"\n{name}", flush=True)
            for result in importlib.import_module(f"ops.bench.{name}").run(plan):
                print(f"  {result}", flush=True)
                results.append(result)
    except (BenchError, FedMoEError, redis.RedisError, OSError) as error:
        print(f"ops/bench.sh: {error}; all processes were ended, nothing is written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ops/bench.sh: interrupted, nothing is written", file=sys.stderr)
        return 130
    barred = [result for result in results if result.bar]
    print(f"\n{sum(bool(r.met) for r in barred)} of {len(barred)} bars met, {time.monotonic() - began:.0f} s")
    if missing := [name for name in BARS if name not in {result.name for result in results}]:
        print(f"not measured here: {', '.join(missing)}")
    for result in barred:
        print(f"  {result}")
    write_json(options.out, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
