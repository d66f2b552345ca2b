"""The heartbeats of all aggregators: one hash, in which each has a field, so one command writes and reads them.

A field begins with the time at which it expires, by the server's clock (milliseconds since 1970), so that no two
clocks are compared.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fedmoe.errors import RedisUnavailableError
from fedmoe.protocol.assignment import AggregatorBeat
from fedmoe.protocol.federation import AggregatorView
from fedmoe.store.connection import Connection
from fedmoe.util.text import printable

# The hash expires after so many times a heartbeat's; a heartbeat that ends later means that the clock was set back.
_LONGEST_TTLS = 10
# It also works on a full Redis: only an aggregator that serves an expert frees memory.
_BEAT = """#!lua flags=allow-oom
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('HSET', KEYS[1], ARGV[1], string.format('%d %s', now + ARGV[2], ARGV[3]))
redis.call('PEXPIRE', KEYS[1], ARGV[4])
local living = {}
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local ends = tonumber(string.match(all[i + 1], '^%d+') or 0)
  if ends > now and ends <= now + ARGV[4] then
    living[#living + 1] = all[i]
    living[#living + 1] = all[i + 1]
  else
    redis.call('HDEL', KEYS[1], all[i])
  end
end
return living"""


class Aggregators:
    """Redis commands for the heartbeats of the federation's aggregators.

    Args:
        connection: of the thread that sends the heartbeats.
        holder: unique name of this process.
        ttl_ms: a heartbeat expires after this time.
    """

    def __init__(self, connection: Connection, *, holder: str, ttl_ms: int) -> None:
        self.connection = connection.at(connection.keys.aggregators)
        self._holder = holder
        self._ttl_ms = ttl_ms
        self._beat = self.connection.client.register_script(_BEAT)

    def beat(self, beat: AggregatorBeat) -> dict[str, AggregatorBeat]:
        """Write this aggregator's heartbeat; returns the heartbeats of all that live, this one included."""
        with self.connection.errors():
            found = self._beat(
                keys=[self.connection.keys.aggregators],
                args=[self._holder, self._ttl_ms, beat.to_json(), _LONGEST_TTLS * self._ttl_ms],
            )
        beats = zip(found[::2], found[1::2], strict=True)
        return {_text(name): _read(field) for name, field in beats}

    def others_answer(self) -> bool:
        """True if another master of the Redis Cluster answers than the heartbeats' own."""
        if self.connection.cluster is None:
            return False
        try:
            masters = self.connection.masters()
        except RedisUnavailableError:
            return False
        for master in masters:
            with suppress(RedisUnavailableError):
                master.ping()
                return True
        return False

    def leave(self) -> None:
        """Remove the heartbeat, so that the others need not wait for its expiry."""
        with self.connection.errors():
            self.connection.client.hdel(self.connection.keys.aggregators, self._holder)


def views(raw: Mapping[bytes, bytes] | Exception, now_s: float) -> tuple[AggregatorView, ...]:
    """The aggregators that live at this time of the server (seconds since 1970), by name, from the whole hash.

    Empty if the hash could not be read: without the right, it is only not shown.
    """
    if isinstance(raw, Exception):
        return ()
    beats = {
        printable(name): _read(field) for name, field in sorted(raw.items()) if _ends(field) > now_s * 1000
    }
    return tuple(
        AggregatorView(
            name=name,
            serves=tuple(map(printable, sorted(beat.serves))),
            overdue=tuple(map(printable, sorted(beat.overdue))),
            limit=beat.limit,
            since=beat.since,
            software=printable(beat.software),
        )
        for name, beat in beats.items()
    )


def _ends(field: bytes) -> int:
    number = field.partition(b" ")[0]
    return int(number) if number.isdigit() and len(number) < 16 else 0


def _read(field: bytes) -> AggregatorBeat:
    return AggregatorBeat.read(field.partition(b" ")[2])


def _text(raw: Any) -> str:
    return str(raw.decode(errors="backslashreplace"))
