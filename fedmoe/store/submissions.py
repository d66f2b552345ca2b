"""What the workers of an expert write beside its stream, as an aggregator reads it."""

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.tail import Copy
from fedmoe.protocol.update import MAX_HEADER_BYTES, Part
from fedmoe.store.copies import copy_commands, is_copied
from fedmoe.store.lifecycle import ExpertLifecycle

_LINEAGE = re.compile(r"[0-9a-f]{16}")
_AT_ONCE = 1000  # heartbeats in a pipeline
_AHEAD = 8  # commands in flight while parts are copied; a part needs two


class Submissions(ExpertLifecycle):
    """Reads the heartbeats of workers, and the headers and parts of their updates.

    Workers may write anything under these keys, so a key of the wrong type counts as missing.
    """

    def lineages(self) -> dict[str, str]:
        """The lineages that living workers name in their heartbeats: worker -> lineage."""
        named = {worker: beat.lineage for worker, beat in self.heartbeats(["lineage"]).items()}
        return {worker: lineage for worker, lineage in named.items() if _LINEAGE.fullmatch(lineage)}

    def heartbeats(self, names: Sequence[str]) -> dict[str, Beat]:
        """These fields of the heartbeats of all living workers, by name of the worker."""
        prefix = self.keys.worker("")
        with self.connection.errors():
            keys = list(self._redis.scan_iter(match=f"{prefix}*", count=1000))
        workers = [key.decode(errors="backslashreplace").removeprefix(prefix) for key in keys]
        found: dict[str, Beat] = {}
        for first in range(0, len(workers), _AT_ONCE):
            some = workers[first : first + _AT_ONCE]
            found |= zip(some, self._heartbeats(some, names), strict=True)
        return found

    def headers(self, updates: Sequence[tuple[str, str, int]]) -> list[bytes]:
        """The headers of updates (worker, run, seq), each at most MAX_HEADER_BYTES + 1 bytes; b"" for a missing one."""
        if not updates:
            return []
        with self.connection.errors(), self._redis.pipeline(transaction=False) as pipe:
            for update in updates:
                pipe.getrange(self.keys.header(*update), 0, MAX_HEADER_BYTES)
            return [_absent_if_wrong_type(reply) for reply in pipe.execute(raise_on_error=False)]

    def heartbeat(self, worker: str, names: Sequence[str]) -> Beat:
        """These fields of a worker's heartbeat."""
        return self._heartbeats([worker], names)[0]

    def _heartbeats(self, workers: Sequence[str], names: Sequence[str]) -> list[Beat]:
        with self.connection.errors(), self._redis.pipeline(transaction=False) as pipe:
            for worker in workers:
                for name in names:
                    pipe.hget(self.keys.worker(worker), name)
            values = [_absent_if_wrong_type(reply) or None for reply in pipe.execute(raise_on_error=False)]
        each = [values[first : first + len(names)] for first in range(0, len(values), len(names))]
        return [Beat.read(dict(zip(names, one, strict=True))) for one in each]

    def parts(
        self, worker: str, run: str, seq: int, parts: Sequence[Part], copy: Copy | None = None
    ) -> Generator[bytes, None, None]:
        """The payload, part by part: b"" for a missing part, at most one byte more than its header announces.

        With a `copy`, Redis copies each part first, and what is read is the copy. From the first part on that cannot be
        copied, the worker's own are read, and the copy is not whole.

        Call no other method before the generator is closed: the replies with the next parts are in flight.
        """
        names = [self.keys.part(worker, run, seq, index) for index in range(len(parts))]
        with self.connection.errors():
            if copy is not None:
                with closing(self._copied(names, parts, copy)) as copied:
                    yield from copied
            first = copy.n_made if copy else 0
            commands = [
                ("GETRANGE", names[index], 0, parts[index].length) for index in range(first, len(parts))
            ]
            with closing(self.connection.stream(commands)) as replies:
                for reply in replies:
                    yield _absent_if_wrong_type(reply)

    def _copied(
        self, names: Sequence[str], parts: Sequence[Part], copy: Copy
    ) -> Generator[bytes, None, None]:
        """The parts as they were copied, until one cannot be copied."""
        copies = zip(names, copy.keys(self.keys), parts, strict=True)
        commands = [
            command for name, key, part in copies for command in copy_commands(name, key, part.length)
        ]
        with closing(self.connection.stream(commands, ahead=_AHEAD)) as replies:
            for reply in replies:
                if not is_copied(reply, copy):
                    return
                copy.n_made += 1
                yield _absent_if_wrong_type(next(replies))

    @contextmanager
    def removed_after_failure(self, copies: Sequence[Copy]) -> Iterator[None]:
        """Remove these copies if the body fails, so that repeated attempts do not fill Redis with them.

        The body must not commit. If Redis cannot be reached, the copies are left to expire.
        """
        try:
            yield
        except RedisUnavailableError:
            raise
        except Exception:
            with suppress(RedisUnavailableError), self.connection.errors():
                for copy in copies:
                    if left := copy.left_over(self.keys):
                        self._redis.unlink(*left)
            raise

    def payload_keys(self, worker: str, run: str, seq: int, n_parts: int) -> list[str]:
        """The keys of an update's header and parts."""
        return [
            self.keys.header(worker, run, seq),
            *(self.keys.part(worker, run, seq, index) for index in range(n_parts)),
        ]


def _absent_if_wrong_type(reply: Any) -> Any:
    """A reply about a key that workers write; a key of the wrong type counts as missing, so it cannot stop others."""
    if not isinstance(reply, Exception):
        return reply
    if "WRONGTYPE" not in str(reply):
        raise reply
    return b""
