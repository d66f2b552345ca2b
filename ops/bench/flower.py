"""Flower, in deployment mode: a SuperLink, three SuperNodes, FedAvg of the same arrays.

Installed in a virtual environment of its own under .cache/, since its pinned dependencies would fight ours. A turn is
one round: three updates, averaged, timed by its server itself. `flower_app/` is the app.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import psutil

from fedmoe.protocol.layout import Layout
from ops.bench.adapters import LAYOUTS
from ops.bench.contest import Sample, side_by_side
from ops.bench.fedmoe_side import DEFAULT_FORMAT, FedMoE
from ops.bench.plan import Plan
from ops.bench.processes import ROOT, BenchError, Processes, clean_environment, finish, free_port
from ops.bench.result import Result

VERSION = "1.42.0"
VENV = ROOT / ".cache" / "flower"
APP = Path(__file__).parent / "flower_app"
CLIENTS = 3
ROUND_TIMEOUT_S = 90.0


def install() -> None:
    """Make the virtual environment, unless it is there.

    Raises:
        BenchError: with what pip said last.
    """
    stamp = VENV / "version"
    if stamp.exists() and stamp.read_text() == VERSION:
        return
    print(f"  installing Flower {VERSION} in {VENV}", flush=True)
    python = str(VENV / "bin" / "python")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        [python, "-m", "pip", "install", "--quiet", f"flwr=={VERSION}"],
    ):
        finish("Flower", command)
    stamp.write_text(VERSION)


def start_flower(processes: Processes, home: Path, app: Path, run_config: str, *, clients: int) -> None:
    """Start a SuperLink and SuperNodes, numbered from 0 as their `partition-id`, and let them run an app.

    `home` is a directory for what Flower keeps, `app` that of the app, `run_config` its configuration for `flwr run`.

    Raises:
        BenchError: if Flower does not take the app.
    """
    home.mkdir(parents=True, exist_ok=True)
    bin_directory = VENV / "bin"
    superlink = f"127.0.0.1:{(port := free_port())}"
    own = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{bin_directory}:{clean_environment().get('PATH', '')}",
    }
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "{superlink}"\ninsecure = true\n'
    )
    processes.command(
        "superlink", str(bin_directory / "flower-superlink"), "--insecure", "--host", "127.0.0.1",
        "--port", str(port), "--disable-runtime-dependency-installation", **own,
    )  # fmt: skip
    for number in range(clients):
        processes.command(
            "supernodes", str(bin_directory / "flower-supernode"), "--insecure",
            "--superlink", superlink, "--port", str(free_port()), "--node-config", f"partition-id={number}", **own,
        )  # fmt: skip
    submit = [str(bin_directory / "flwr"), "run", str(app), "bench", "--run-config", run_config]

    def submitted() -> bool:
        done = subprocess.run(
            submit, env=clean_environment() | own, capture_output=True, text=True, check=False, timeout=60
        )
        return done.returncode == 0

    processes.until("its SuperLink to take the app", submitted)


class Flower:
    """A SuperLink and SuperNodes with an app that runs; takes turns as a Contestant does."""

    def __init__(self, name: str, layout: Layout) -> None:
        self.name = name
        self.layout = layout
        self.processes = Processes(name)
        self._directory = tempfile.TemporaryDirectory(prefix="fedmoe-flower-")
        self.directory = Path(self._directory.name)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._directory.cleanup)
            stack.enter_context(self.processes)
            self._start()
            self.turn(0.0)  # the first round waits until all have connected
            stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.processes.__exit__(*error)
        self._directory.cleanup()

    def _start(self) -> None:
        shapes = [[name, list(shape)] for name, shape in self.layout.tensors]
        (self.directory / "layout.json").write_text(json.dumps(shapes))
        config = f'directory="{self.directory}" clients={CLIENTS}'
        start_flower(self.processes, self.directory, APP, config, clients=CLIENTS)

    def _rounds(self) -> list[str]:
        path = self.directory / "rounds"
        return path.read_text().splitlines() if path.exists() else []

    def _cpu_s(self) -> dict[str, float]:
        """Of all processes and all that they started, ended ones included: Flower starts one for each message."""
        total = 0.0
        for pid in self.processes.pids:
            root = psutil.Process(pid)
            for process in (root, *root.children(recursive=True)):
                try:
                    total += sum(process.cpu_times()[:4])
                except psutil.NoSuchProcess:
                    continue
        return {"flower": total}

    def turn(self, seconds: float) -> Sample:
        """One round, however long it takes."""
        before, cpu = len(self._rounds()), self._cpu_s()
        (self.directory / "go").touch()
        self.processes.until("a round", lambda: len(self._rounds()) > before, timeout_s=ROUND_TIMEOUT_S)
        updates, began, ended = self._rounds()[before].split()
        if int(updates) != CLIENTS:
            raise BenchError(f"{self.name}: a round had {updates} of {CLIENTS} updates")
        used = {role: s - cpu[role] for role, s in self._cpu_s().items()}
        return Sample(int(updates), float(ended) - float(began), used)


def run(plan: Plan) -> Iterator[Result]:
    """FedMoE in its default format and Flower, in turns."""
    install()
    layout = LAYOUTS[plan.size]
    fedmoe = FedMoE(f"beside_flower_fedmoe_{plan.size}", layout, DEFAULT_FORMAT)
    flower = Flower(f"flower_{plan.size}", layout)
    with fedmoe, flower:
        yield from side_by_side(
            fedmoe,
            flower,
            rounds=plan.rounds,
            seconds=plan.seconds,
            rates="flower_updates",
            costs="flower_cpu",
        )
