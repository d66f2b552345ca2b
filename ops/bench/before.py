"""The release before as a contestant, beside the code that is here: `--before REVISION` of the git repository.

Its files and a virtual environment lie under .cache/. The environment sees the packages that are installed here, so
only what that release wants otherwise is installed. Its aggregator, workers and harness are its own; `release.py` lets
it take turns.
"""

import json
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from ops.bench import release
from ops.bench.contest import Sample, take_turns
from ops.bench.plan import Plan
from ops.bench.processes import ROOT, BenchError, clean_environment, finish
from ops.bench.result import Result, figure, ratio

HOME = ROOT / ".cache" / "before"
SERVER = ("aggregator", "redis")
END_S = 60.0  # for a release to end its turn and its processes


class Release:
    """The release of a git revision, installed unless it is there.

    Raises:
        BenchError: if this clone does not have the revision, or it cannot be installed.
    """

    def __init__(self, revision: str) -> None:
        named = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", "--end-of-options"]
        try:
            found = subprocess.run(
                [*named, f"{revision}^{{commit}}"], capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            raise BenchError("the release before is taken from git, which is not installed") from None
        self.commit = found.stdout.strip()
        if found.returncode and found.stderr:  # it is no repository, or not one of this user
            raise BenchError(f"the release before cannot be taken from git: {found.stderr.splitlines()[0]}")
        if found.returncode:
            raise BenchError(
                f"this clone has no revision {revision!r} to be the release before: fetch it, for example with "
                "git fetch --unshallow, or give --before another one"
            )
        self.code = HOME / "code"
        self.python = HOME / "venv" / "bin" / "python"
        self._install()

    def _install(self) -> None:
        stamp, wanted = HOME / "stamp", f"{self.commit} {sys.prefix}"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        stamp.unlink(missing_ok=True)
        print(f"  installing {self.commit[:10]} in {HOME}", flush=True)
        finish(
            "the environment", [sys.executable, "-m", "venv", "--clear", "--without-pip", str(HOME / "venv")]
        )
        with tempfile.TemporaryDirectory(dir=HOME) as directory:
            archive = Path(directory) / "code.zip"
            what = f"the archive of {self.commit[:10]}"
            finish(
                what, ["git", "-C", str(ROOT), "archive", "--format=zip", f"--output={archive}", self.commit]
            )
            fresh = Path(directory) / "code"
            zipfile.ZipFile(archive).extractall(fresh)
            if self.code.exists():
                self.code.rename(Path(directory) / "old")
            fresh.rename(self.code)
        (packages,) = HOME.glob("venv/lib/python3*/site-packages")
        (packages / "installed_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        finish(
            f"the packages of {self.commit[:10]}",
            [*pip, "--no-build-isolation", "--editable", str(self.code)],
        )
        stamp.write_text(wanted)

    def start(self, *arguments: str, errors: Any) -> "subprocess.Popen[str]":
        """Run release.py; `errors` is a file for its stderr."""
        return subprocess.Popen(
            [str(self.python), "-P", release.__file__, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=self.code,
            env=clean_environment() | {"PYTHONPATH": str(self.code)}, start_new_session=True,
        )  # fmt: skip


class Before:
    """A contestant of a release; takes turns as a Contestant does, see `release.contestant`."""

    def __init__(self, installed: Release, *arguments: str) -> None:
        self.name = "_".join(("before", *arguments))
        self._release = installed
        self._arguments = arguments

    def __enter__(self) -> Self:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = self._release.start(*self._arguments, errors=self._errors)
        try:
            self.first = self.answer()
        except BaseException as error:
            self.__exit__(error)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # it ends all that it has started, and itself
        if any(error):
            self._process.terminate()  # the same, but at once
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def answer(self) -> Any:
        """What it says next.

        Raises:
            BenchError: with its last words, if it ends instead.
        """
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip() or "it said nothing").splitlines()[-1]
        raise BenchError(f"{self.name} ended with code {code}: {last}")

    def turn(self, seconds: float) -> Sample:
        """As a Contestant's."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says why
            print(seconds, file=self._process.stdin, flush=True)
        return Sample(**self.answer())


def _contest(
    installed: Release, kinds: Sequence[str], size: str, *, rounds: int, seconds: float
) -> Mapping[tuple[str, str], Sequence[Sample]]:
    """Both releases in turns: samples by ("now" or "before", kind)."""
    contestants = {}
    with ExitStack() as stack:
        for kind in kinds:
            contestants["now", kind] = stack.enter_context(
                release.contestant(kind, size, f"now_{kind}_{size}")
            )
            contestants["before", kind] = stack.enter_context(Before(installed, kind, size))
        samples = take_turns(list(contestants.values()), rounds=rounds, seconds=seconds)
    return {who: samples[one.name] for who, one in contestants.items()}


def run(plan: Plan) -> Iterator[Result]:
    """The ratios now ÷ before."""
    assert plan.before is not None
    installed = Release(plan.before)
    yield from _updates(installed, plan)
    yield from _large(installed, plan)
    yield from _visible(installed, plan)
    with Before(installed, "written", plan.size, str(plan.rounds)) as one:
        yield figure("before_aof_bytes_vs_update", one.first, "x")


def _updates(installed: Release, plan: Plan) -> Iterator[Result]:
    samples = _contest(installed, ("memory", "file"), plan.size, rounds=plan.rounds, seconds=plan.seconds)
    for (when, kind), turns in samples.items():
        name = f"{when}_{kind}_{plan.size}"
        yield figure(f"{name}_updates_per_s", [turn.per_s for turn in turns], "updates/s")
        for role in turns[0].cpu_s:
            yield figure(f"{name}_cpu_ms_{role}", [turn.cpu_ms(role) for turn in turns], "ms/update")
    rates = {who: [turn.per_s for turn in turns] for who, turns in samples.items()}
    now, before = samples["now", "memory"], samples["before", "memory"]
    for name, roles in (("vs_before_server_cpu", SERVER), ("vs_before_cpu", ())):
        yield ratio(name, [turn.cpu_ms(*roles) for turn in now], [turn.cpu_ms(*roles) for turn in before])
    yield ratio("vs_before_updates", rates["now", "memory"], rates["before", "memory"])
    for when in ("now", "before"):
        yield ratio(f"{when}_aof_vs_memory", rates[when, "file"], rates[when, "memory"])


def _large(installed: Release, plan: Plan) -> Iterator[Result]:
    """Of the large adapter the release before makes one update a second, or two: turns are longer."""
    samples = _contest(installed, ("memory",), plan.large, rounds=plan.rounds, seconds=3 * plan.seconds)
    rates = {when: [turn.per_s for turn in samples[when, "memory"]] for when in ("now", "before")}
    for when, per_s in rates.items():
        yield figure(f"{when}_large_updates_per_s", per_s, "updates/s")
        turns = samples[when, "memory"]
        for role in turns[0].cpu_s:
            yield figure(f"{when}_large_cpu_ms_{role}", [turn.cpu_ms(role) for turn in turns], "ms/update")
        for role in turns[0].pages:  # an earlier harness does not count them
            new = [turn.pages[role] / turn.updates for turn in turns]
            yield figure(f"{when}_large_pages_{role}", new, "pages/update")
    yield ratio("vs_before_large_updates", rates["now"], rates["before"])


def _visible(installed: Release, plan: Plan) -> Iterator[Result]:
    samples = _contest(installed, ("idle",), plan.size, rounds=plan.rounds, seconds=plan.seconds)
    medians = {
        when: [statistics.median(turn.update_s) * 1000 for turn in samples[when, "idle"]]
        for when in ("now", "before")
    }
    for when, ms in medians.items():
        yield figure(f"{when}_publish_to_visible_p50_ms", ms, "ms")
    yield ratio("vs_before_visible_p50", medians["now"], medians["before"])
