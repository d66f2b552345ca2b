"""Play every hazard with and without its rule, on a server of its own.

python -m tests.hazards            all hazards, in some seconds
python -m tests.hazards H05 H11    only hazards whose name begins with H05 or H11
python -m tests.hazards --server /path/to/valkey-server
"""

import argparse
import shutil
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import redis
import torch

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.embedded import EmbeddedRedis
from tests.hazards.hazard import Hazard, Patch
from tests.hazards.play import play, unexpected_errors
from tests.hazards.table import HAZARDS
from tests.hazards.units import HazardError
from tests.hazards.world import World


def outcome(hazard: Hazard, url: str, *, without: bool) -> tuple[str, set[str]]:
    """Play a hazard on an empty server.

    Returns:
        The message with which its assertion fails, "" if it holds; and the unexpected errors of the processes.
    """
    with redis.Redis.from_url(url) as client:
        client.flushall()
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        for one in hazard.without if without else ():
            stack.enter_context(patch.object(*one))
        world = World(url, Path(directory))
        stack.callback(world.close)
        errors = stack.enter_context(unexpected_errors())
        try:
            play(hazard, world)
        except HazardError as error:
            return str(error), errors - hazard.errors
    return "", errors


def describe(what: Patch) -> str:
    """Describe a patch: what it replaces, and the replacement."""
    where, name, replacement = what
    by = getattr(replacement, "__qualname__", str(replacement))
    told = replacement.__doc__ if str(getattr(replacement, "__module__", "")).startswith("tests.") else ""
    return f"{where.__name__}.{name} = {by}" + (f": {told}" if told else "")


def main() -> int:
    """Print four lines per hazard; return 1 if one does not hold, or does not fail as expected without its rule."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.hazards", description="Show that each rule is needed."
    )
    parser.add_argument("names", nargs="*", default=["H"], help="prefixes of names, for example H05")
    parser.add_argument("--server", help="path of the server program; by default the first that is found")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = {name: hazard for name, hazard in HAZARDS.items() if name.startswith(tuple(args.names))}
    if not chosen:
        parser.error(f"no hazard's name begins with {' or '.join(args.names)}")
    wrong = []
    began = time.monotonic()
    if args.server and not shutil.which(args.server):
        parser.error(
            f"{args.server!r} is not an executable program: give --server a redis-server or valkey-server"
        )
    with EmbeddedRedis(server=args.server, options=["--appendonly", "no"]) as server:
        for name, hazard in chosen.items():
            held, errors = outcome(hazard, server.url, without=False)
            failed, more = outcome(hazard, server.url, without=True)
            errors |= more
            wrong += [name] if held or hazard.symptom not in failed or errors else []
            print(f"{name:6}{hazard.wrong}")
            print(f"      rule     {hazard.rule}")
            print(f"      with     {'NO: ' + held if held else 'holds'}")
            print(f"      without  {failed or 'NOTHING GOES WRONG'}")
            print(*(f"      ERROR    {error}\n" for error in errors), end="", sep="")
            print(*(f"               {describe(what)}\n" for what in hazard.without), sep="", flush=True)
    print(
        f"{len(chosen)} hazards in {time.monotonic() - began:.0f} s; "
        + (f"WRONG: {', '.join(wrong)}" if wrong else "all as expected")
    )
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RedisUnavailableError as error:
        sys.exit(f"tests.hazards: {error}")
