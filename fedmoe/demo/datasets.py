"""The files on which the demo trains and tests: the built-in domains, or the user's JSONL files."""

from dataclasses import dataclass
from pathlib import Path

from fedmoe.demo.corpus import build_corpus
from fedmoe.errors import DataError
from fedmoe.protocol.names import clean_name

HELD_OUT = 10  # every tenth row of a user's file is held out


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoData:
    """Training and test file of each expert; the test rows were never trained on."""

    train: dict[str, Path]
    test: dict[str, Path]

    def lines(self) -> list[str]:
        """The files of each expert, as lines for people."""
        return [f"{name}: trains on {self.train[name]}, tested on {self.test[name]}" for name in self.train]


def find_data(directory: Path | None, built: Path) -> DemoData:
    """The built-in domains, built into `built`, or the files of `directory`.

    A directory holds `NAME.train.jsonl` and `NAME.test.jsonl` for each expert, or one `NAME.jsonl`, of which every
    tenth row is held out.

    Raises:
        DataError: if it holds no JSONL file, or a file that cannot be split.
    """
    if directory is None:
        files = build_corpus(built)
        return DemoData(
            train={name: file.train for name, file in files.items()},
            test={name: file.test for name, file in files.items()},
        )
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory: give one that holds a JSONL file for each expert", about="data"
        )
    paired = {
        clean_name(train.name.removesuffix(".train.jsonl")): (train, test)
        for train in sorted(directory.glob("*.train.jsonl"))
        if (test := train.with_name(train.name.replace(".train.", ".test."))).exists()
    }
    if paired:
        return DemoData(train={n: p[0] for n, p in paired.items()}, test={n: p[1] for n, p in paired.items()})
    plain = sorted(directory.glob("*.jsonl"))
    if not plain:
        raise DataError(
            f"{directory} holds no *.jsonl file: give one for each expert, named after it", about="files"
        )
    built.mkdir(parents=True, exist_ok=True)
    split = {name: _split(file, built, name) for file in plain for name in (clean_name(file.stem),)}
    return DemoData(train={n: p[0] for n, p in split.items()}, test={n: p[1] for n, p in split.items()})


def _split(file: Path, out: Path, name: str) -> tuple[Path, Path]:
    """Copy the lines into a training and a test file, with unchanged bytes."""
    try:
        lines = [
            line for line in file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()
        ]
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}", about="file") from error
    if len(lines) < HELD_OUT:
        raise DataError(
            f"{file} has {len(lines)} rows, but at least {HELD_OUT} are needed to hold some out", about="rows"
        )
    train, test = out / f"{name}.train.jsonl", out / f"{name}.test.jsonl"
    train.write_bytes(b"\n".join(line for n, line in enumerate(lines) if n % HELD_OUT) + b"\n")
    test.write_bytes(b"\n".join(lines[::HELD_OUT]) + b"\n")
    return train, test
