"""Write what tests compare with.

python -m tests.golden records-2     after a release that changes what is written: each record as this release writes
                                     it, in a directory of its own, which is never changed afterwards
python -m tests.golden trace-1       after a change that is meant to change what an aggregation does: what comes of that
                                     trace now; `git diff` shows what changed. A new trace gets the inputs of trace.py
"""

import json
import sys
from pathlib import Path

from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from tests.golden.trace import make_inputs, play
from tests.record_cases import CASES, HEADER, make_checkpoint

HERE = Path(__file__).parent


def write_trace(directory: Path) -> None:
    """Play a trace, new or not, and keep its outcome."""
    if not directory.exists():
        make_inputs(directory)
    (directory / "out").mkdir(exist_ok=True)
    with EmbeddedRedis() as server:
        connection = Connection(RedisSettings(url=server.url))
        for name, content in play(connection, directory).items():
            (directory / "out" / name).write_bytes(content)
        connection.close()


def write_records(directory: Path) -> None:
    """Refuses a directory that is there."""
    directory.mkdir()
    for name, case in CASES.items():
        if name == "header":
            (directory / "header.msgpack").write_bytes(HEADER.pack())
        else:
            (directory / f"{name}.json").write_text(json.dumps(dict(case.stored), indent=1) + "\n")
    make_checkpoint(directory / "checkpoint")
    for not_a_record in ("lock", "id"):
        (directory / "checkpoint" / not_a_record).unlink()


def main() -> None:
    """Write the directory that is named."""
    name = sys.argv[1]
    write = write_trace if name.startswith("trace-") else write_records
    write(HERE / name)


if __name__ == "__main__":
    main()
