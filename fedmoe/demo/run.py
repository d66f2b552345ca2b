"""The demo, from data to results: it runs and prints the same commands that a person would type.

It starts a private Redis, one aggregator and a worker for each domain, which trains its expert and the gateway by turns
for a while, then evaluates and exports.
"""

import shlex
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fedmoe.demo.datasets import DemoData, find_data
from fedmoe.demo.pretrained import ensure_demo_model
from fedmoe.demo.processes import Child, Children
from fedmoe.demo.report import Measured, plot, process_table, write_results
from fedmoe.errors import SettingsError
from fedmoe.protocol.federation import Federation
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import TRAIN_BOTH
from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.inspect import Inspector
from fedmoe.store.remove import remove_federation

Show = Callable[[Federation, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """The settings of the demo.

    Args:
        out: directory of the results.
        cache: directory where the converted model is kept.
        redis: URL of a server to use, "" for a private one. prefix: first part of the keys.
        model: base model, "" for SmolLM2-135M-Instruct.
        data: directory with the user's JSONL files, None for the built-in domains.
        train_s: seconds that the workers train.
        rows: held-out rows to evaluate per domain.
    """

    out: Path
    cache: Path
    redis: str = ""
    prefix: str = "fedmoe-demo"
    model: str = ""
    data: Path | None = None
    train_s: float = 120.0
    rows: int = 16
    learning_rate: float = 1e-3
    gain: float = 2.0
    gateway_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.train_s > 0:
            raise SettingsError(f"--seconds must be more than 0, not {self.train_s!r}", about="seconds")
        if self.rows < 1:
            raise SettingsError(f"--rows must be at least 1, not {self.rows!r}", about="rows")


class Demo:
    """One run of the demo.

    Args:
        report: prints a line.
        show: shows the federation and the remaining seconds of training; called about once a second.
    """

    def __init__(self, settings: DemoSettings, *, report: Callable[[str], None], show: Show) -> None:
        self._settings = settings
        self._report = report
        self._show = show

    def run(self) -> None:
        """Run the demo.

        Raises:
            FedMoEError: one sentence; all processes have ended then, and temporary data are removed.
        """
        settings = self._settings
        started = time.monotonic()
        _make_out(settings.out)
        model = settings.model or str(ensure_demo_model(settings.cache, report=self._report))
        data = find_data(settings.data, settings.out / "data")
        for line in data.lines():
            self._report(line)
        with ExitStack() as stack:
            children = Children(settings.out / "logs")
            redis = self._redis(stack)
            connection = Connection(redis)
            stack.callback(connection.close)
            stack.callback(remove_federation, connection)
            stack.callback(children.kill)
            inspector = Inspector(connection)
            common = ("--redis", redis.url, "--prefix", redis.prefix)
            aggregator, workers = self._start(children, common, model, data, inspector)
            history = self._train(children, inspector)
            self._report("stopping the workers: they publish their last progress")
            children.finish(workers, timeout_s=60)
            children.finish([aggregator], timeout_s=30)
            measured = self._evaluate(children, common, model, data)
            self._finish(
                children,
                common,
                "export",
                "gateway",
                "export",
                "--out",
                str(settings.out / "gateway"),
                "--force",
            )
        plot(settings.out / "losses.png", history, measured)
        write_results(
            settings.out / "results.json", measured, children.all, seconds=time.monotonic() - started
        )
        self._report(process_table(children.all))
        self._report(
            f"{time.monotonic() - started:.0f} s in all; results in {settings.out}/: results.json, losses.png, "
            "gateway/ (a PEFT adapter), data/, logs/"
        )

    def _redis(self, stack: ExitStack) -> RedisSettings:
        """The given server, or a private one that ends with the demo."""
        settings = self._settings
        if settings.redis:
            redis = RedisSettings(url=settings.redis, prefix=settings.prefix)
            connection = Connection(redis)
            connection.ping()
            taken = Inspector(connection).federation().experts
            connection.close()
            if taken:
                raise SettingsError(
                    f"there are experts under the prefix {settings.prefix!r} in {redis.shown} already: "
                    "give the demo another --prefix",
                    about="prefix",
                )
            return redis
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmoe-demo-")))
        server = stack.enter_context(EmbeddedRedis(scratch))
        self._report(f"private server: {server.server}; inspect it with: redis-cli -s {server.socket}")
        return RedisSettings(url=server.url, prefix=settings.prefix)

    def _command(self, *arguments: str) -> tuple[str, ...]:
        self._report(f"$ fedmoe {shlex.join(arguments)}")
        return arguments

    def _start(
        self, children: Children, common: tuple[str, ...], model: str, data: DemoData, inspector: Inspector
    ) -> tuple[Child, list[Child]]:
        """Start the aggregator, wait for its experts, then start a worker for each."""
        experts = [argument for name in data.train for argument in ("--expert", name)]
        aggregator = children.start(
            "aggregator",
            *self._command(
                "aggregator", "run", *common, *experts, "--base-model", model, "--rank", "8", "--alpha", "16",
                "--batch-size", "2", "--max-length", "192", "--warmup-steps", "4",
                "--learning-rate", f"{self._settings.learning_rate:g}",
                "--train", TRAIN_BOTH, "--gain", f"{self._settings.gain:g}",
                "--gateway-scale", f"{self._settings.gateway_scale:g}",
            ),
        )  # fmt: skip
        wanted = {*data.train, GATEWAY}
        while not wanted <= {expert.name for expert in inspector.federation().experts}:
            children.check()
            time.sleep(0.2)
        workers = [
            children.start(
                name,
                *self._command(
                    "worker", "run", *common, "--stream", name, "--data", str(path), "--name", "demo"
                ),
            )
            for name, path in data.train.items()
        ]
        return aggregator, workers

    def _train(self, children: Children, inspector: Inspector) -> dict[str, list[tuple[float, float]]]:
        """Watch until train_s seconds after every expert has a training worker; return (seconds, loss) of versions."""
        history: dict[str, list[tuple[float, float]]] = {}
        seen: dict[str, int] = {}
        started = time.monotonic()
        first: float | None = None
        while first is None or time.monotonic() - first < self._settings.train_s:
            time.sleep(1.0)
            children.check()
            view = inspector.federation()
            now = time.monotonic()
            for expert in view.experts:
                if expert.meta and expert.meta.version > seen.get(expert.name, 0):
                    seen[expert.name] = expert.meta.version
                    history.setdefault(expert.name, []).append((now - started, expert.meta.loss))
            training = [expert.name for expert in view.experts if any(w.step for w in expert.workers)]
            if first is None and len(training) == len(view.experts):
                first = now
            left = self._settings.train_s - (now - first) if first is not None else self._settings.train_s
            self._show(view, left)
        return history

    def _evaluate(self, children: Children, common: tuple[str, ...], model: str, data: DemoData) -> Measured:
        """Run `fedmoe evaluate`, print its table, and return it."""
        file = self._settings.out / "losses.json"
        files = [a for name, path in data.test.items() for a in ("--data", f"{name}={path}")]
        child = self._finish(
            children, common, "evaluate", "evaluate", "--base-model", model, *files,
            "--rows", str(self._settings.rows), "--json", str(file), threads=2,
        )  # fmt: skip
        self._report(child.log.read_text(errors="replace").rstrip())
        return Measured.read(file)

    def _finish(
        self, children: Children, common: tuple[str, ...], name: str, *arguments: str, threads: int = 1
    ) -> Child:
        """Run a command to its end."""
        child = children.start(name, *self._command(*arguments, *common), threads=threads)
        while child.process.poll() is None:
            child.sample()
            time.sleep(0.1)
        children.check()
        return child


def _make_out(out: Path) -> None:
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"the results cannot be written to {out} ({error.strerror}): give --out another directory",
            about="out",
        ) from error
