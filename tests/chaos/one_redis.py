"""The one Redis of a run, behind a proxy: it is killed, its files are damaged, its connections are cut and frozen."""

import time
from collections.abc import Callable
from pathlib import Path

from fedmoe.store.embedded import EmbeddedRedis
from tests.chaos.files import RedisFiles
from tests.chaos.scheduler import TICK_S, Chaos
from tests.proxy import Proxy


class OneRedis:
    """One server and the proxy in front of it.

    Args:
        server: the Redis itself.
        copies: where copies of its files are kept.
        is_readable: the proxy can read what it carries; over TLS it cannot.
    """

    down = "Redis answers again"

    def __init__(self, server: EmbeddedRedis, proxy: Proxy, copies: Path, *, is_readable: bool) -> None:
        self.url = server.url
        self._server = server
        self._proxy = proxy
        self._files = RedisFiles(server.directory, copies)
        self._is_readable = is_readable
        self._cut_bytes_of_file = 0
        self._ages_s: list[float] = []  # of the older files that were brought back

    def faults(self, run: Chaos) -> dict[str, tuple[int, Callable[[], None]]]:
        """Its faults."""
        return {
            "kill -9 redis": (5, lambda: self._kill(run)),
            "kill -9 redis, last second gone": (4, lambda: self._kill(run, self._cut_its_file)),
            "kill -9 redis, an older file": (4, lambda: self._kill(run, self._bring_back_older_file)),
            "cut all connections": (6, self._proxy.cut),
            "cut in a payload": (6, lambda: self._cut_bytes(run)),
            "lose a reply": (10, lambda: self._lose_reply(run)),
            "freeze the network": (3, lambda: self._freeze(run)),
        }

    def _kill(self, run: Chaos, damage: Callable[[Chaos], None] = lambda _: None) -> None:
        self._server.kill()
        run.kills += 1
        run.killed["redis"] += 1
        damage(run)
        time.sleep(run.dice.choice((0.0, 0.2, 1.0)))
        self._server.start()
        run.watch(run.restarts, time.monotonic())

    def _cut_its_file(self, run: Chaos) -> None:
        self._cut_bytes_of_file += self._files.cut(run.dice)

    def _bring_back_older_file(self, run: Chaos) -> None:
        self._ages_s.append(self._files.bring_back(run.dice, time.monotonic()))

    def _cut_bytes(self, run: Chaos) -> None:
        self._proxy.cut_after(run.dice.randint(1, 4_000_000), run.dice.choice(("up", "down")))

    def _freeze(self, run: Chaos) -> None:
        self._proxy.freeze()
        time.sleep(run.dice.uniform(0.2, 1.5 * TICK_S + 2.5))
        self._proxy.thaw()

    def _lose_reply(self, run: Chaos) -> None:
        if not self._is_readable:  # any byte of a reply, which are few
            self._proxy.cut_after(run.dice.randint(1, 2000), "down")
            return
        self._proxy.on(
            run.dice.choice((b"EXEC", b"XADD", b"SET")),
            run.dice.choice(("cut_before", "cut_in_middle", "cut_after", "late")),
            skip=run.dice.randint(0, 20),
        )

    def tick(self, now: float) -> None:
        """Note the size of its files, and copy them now and then."""
        self._files.note(now)

    def calm(self) -> None:
        """Let the network carry again."""
        self._proxy.thaw()

    def disturbances(self) -> int:
        """Cuts, delays and freezes, without cuts that the killed server itself made."""
        hits = self._proxy.hits
        return sum(n for how, n in hits.items() if how.startswith(("cut", "late", "frozen")))

    def report(self) -> list[str]:
        """What its files lost, and what became of connections."""
        return [
            f"bytes that the append-only file of Redis lost: {self._cut_bytes_of_file}",
            "seconds that the older files which it came back from were old: "
            + (", ".join(f"{age:.0f}" for age in self._ages_s) or "-"),
            "connections: " + ", ".join(f"{how} {count}" for how, count in sorted(self._proxy.hits.items())),
        ]
