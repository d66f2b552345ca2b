"""Search federations that are too large for the suite.

python -m tests.protocol                       the small scopes, those of the suite
python -m tests.protocol --scope big           the large ones, some minutes each
python -m tests.protocol --scope "two failovers" --limit 1000000
python -m tests.protocol --broken H2           the trace that a broken rule leads to
"""

import argparse
import gc
import logging
import sys
import warnings

import torch

from tests.protocol.all_broken import ALL_BROKEN
from tests.protocol.scopes import BIG, SMALL
from tests.protocol.search import ViolationError, search
from tests.protocol.state import Scope


def main() -> int:
    """Print a line for each scope; 1 if a violation was found in any."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.protocol", description="Search the protocol's states."
    )
    parser.add_argument("--scope", default="small", help="small, big, or the name of one")
    parser.add_argument("--limit", type=int, default=10**7, help="states to look at, at most")
    parser.add_argument("--broken", default="", help="take out the rules whose name begins so")
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    torch.set_num_threads(1)
    gc.disable()  # nothing of this is cyclic, and there are millions of tuples
    if args.broken:
        chosen = {name: broken for name, broken in ALL_BROKEN.items() if name.startswith(args.broken)}
        if not chosen:
            parser.error(f"no rule begins with {args.broken!r}; there are {', '.join(ALL_BROKEN)}")
        missed = 0
        for name, broken in chosen.items():
            try:
                search(broken.scope, broken.rules, limit=args.limit)
            except ViolationError as found:
                print(f"{name}: {broken.what}\n{found}\n")
            else:
                missed += 1
                print(f"{name}: {broken.what}: NOT found out")
        return int(missed > 0)
    if args.scope not in ("small", "big", *SMALL, *BIG):
        parser.error(f"there is no scope {args.scope!r}; there are small, big, {', '.join(SMALL | BIG)}")
    sets: dict[str, dict[str, Scope]] = {"small": SMALL, "big": BIG}
    scopes = sets.get(args.scope) or {args.scope: (SMALL | BIG)[args.scope]}
    failed = False
    for name, scope in scopes.items():
        gc.collect()
        try:
            found = search(scope, limit=args.limit)
            done = "" if found.exhausted else " (not exhausted)"
            print(f"{name}: {found.states:,} states in {found.seconds:.0f} s{done}", flush=True)
        except ViolationError as violation:
            failed = True
            print(f"{name}: after {violation.states:,} states\n{violation}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
