"""Write each record as this release writes it into a directory of its own, which is never changed afterwards.

python -m tests.golden records-2     after a release that changes what is written
"""

import json
import sys
from pathlib import Path

from tests.record_cases import CASES, HEADER, make_checkpoint

HERE = Path(__file__).parent


def main() -> None:
    """Refuses a directory that is there."""
    directory = HERE / sys.argv[1]
    directory.mkdir()
    for name, case in CASES.items():
        if name == "header":
            (directory / "header.msgpack").write_bytes(HEADER.pack())
        else:
            (directory / f"{name}.json").write_text(json.dumps(dict(case.stored), indent=1) + "\n")
    make_checkpoint(directory / "checkpoint")
    for not_a_record in ("lock", "id"):
        (directory / "checkpoint" / not_a_record).unlink()


if __name__ == "__main__":
    main()
