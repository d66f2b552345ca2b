"""A Redis of just the commands that the protocol uses, as an immutable value.

`execute` is a pure function (Db, commands) -> (Db, replies); `client` speaks to it.

Three things are here that Redis has not, for the checks alone: `written` remembers each update's payload, after it was
unlinked or a failover dropped it too; `base` keeps the weights that the log goes on from; and the counters that only
people read stay 0, else a harmless loop would make states without end.
"""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from fedmoe.protocol.keys import Keys
from fedmoe.protocol.layout import stamped
from fedmoe.protocol.records import NO_DECISIONS
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.tail import copied_keys
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.parts import part_keys, state_keys, weights_keys

NAME = "e"
KEYS = Keys().expert(NAME)
FOR_PEOPLE = ("duplicate", "undecidable", "garbage")
NO_GROUP = "NOGROUP No such consumer group"
TWO_CONTENTS = b"two contents"
OVERWRITTEN = (-1, b"", None)  # as a base: an expert was written back where one was
LOG_FIELDS = ("worker", "run", "seq")
ROLLBACK = ""  # as a worker in the log: an operator's rollback, with its line (JSON), new version and target

Command = tuple[Any, ...]
Pairs = tuple[tuple[str, Any], ...]


class Request(NamedTuple):
    """Commands that are executed as one; `watched`: on a connection that holds a WATCH, `parts`: on these parts too."""

    commands: tuple[Command, ...]
    watched: bool = False
    parts: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "; ".join(_shown(command) for command in self.commands)

    @property
    def is_exec(self) -> bool:
        """True for the EXEC of a commit, or of writing an expert back."""
        return any(c[:2] == ("HSET", KEYS.meta) for c in self.commands)

    @property
    def copies(self) -> bool:
        """True for the command that copies a part of an update."""
        return self.commands[0][0] == "COPY"

    @property
    def rings(self) -> bool:
        """True for the transaction that publishes an update."""
        return any(c[:2] == ("XADD", KEYS.updates) for c in self.commands)


def _shown(command: Command) -> str:
    name, *args = command
    words = [str(a).removeprefix(KEYS.root + ":") for a in args if isinstance(a, str)]
    if name == "XADD":
        fields = dict(args[1])
        words = [words[0], *(str(fields[f]) for f in LOG_FIELDS if f in fields)]
    return " ".join([name, *words])


class Suspended(BaseException):
    """A turn cannot go on without the answer to `request`; no `except Exception` may catch it."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request
        # Set by an aggregator that could write the expert back now; and by one to whom a connection made anew matters.
        self.remembers = self.counts = False


class Reply(NamedTuple):
    """Answers of a request; `error` instead: "lost", "watch"; `reconnected`: over a connection made anew."""

    values: tuple[Any, ...] = ()
    error: str = ""
    reconnected: bool = False


class Db(NamedTuple):
    """All that the server holds; ids of the updates stream are whole numbers.

    A line of the log is (worker, run, seq, rules, whether it ended a round, whether it began the server state), or a
    rollback. `base` is the version, the weights and the server state (if any) that an aggregator wrote back, since when
    the log goes on; none: from zeros.
    """

    strings: tuple[tuple[str, bytes], ...] = ()
    hashes: tuple[tuple[str, Pairs], ...] = ()
    stream: tuple[tuple[int, Pairs], ...] = ()
    last_id: int = 0
    delivered: int | None = None  # None: there is no consumer group
    pending: tuple[int, ...] = ()
    log: tuple[tuple[Any, ...], ...] = ()
    refused: tuple[tuple[str, str, int], ...] = ()
    written: tuple[tuple[str, bytes], ...] = ()
    base: tuple[int, bytes, bytes | None] | None = None
    volatile: frozenset[str] = frozenset()  # parts of weights, and copied parts of updates, that will expire
    rules_went_back: bool = False
    applied_while_held: bool = False

    @property
    def gone(self) -> bool:
        """True if there is no expert."""
        return all(key != KEYS.meta for key, _ in self.hashes)

    def emptied(self) -> "Db":
        """The server after it lost all that it held."""
        return Db(written=self.written)

    def hash(self, key: str) -> dict[str, Any]:
        """One of the hashes."""
        return dict(dict(self.hashes).get(key, ()))

    def string(self, key: str) -> bytes | None:
        """One of the strings."""
        return dict(self.strings).get(key)

    @property
    def parts(self) -> WeightsParts:
        """The parts that meta names."""
        return WeightsParts.from_json(self.hash(KEYS.meta).get("parts", ""))

    @property
    def copies(self) -> list[str]:
        """The keys of the copied parts that the tail names."""
        return _copies_in(self.hash(KEYS.tail))

    def file(self, key: str) -> bytes | None:
        """The weights or the server state: the string, or the header with the parts that are there."""
        return whole_file(dict(self.strings), self.parts, key)

    def without_volatile(self) -> "Db":
        """After a time in which nobody commits, and all that expires has expired."""
        kept = tuple(pair for pair in self.strings if pair[0] not in self.volatile)
        return self._replace(strings=kept, volatile=frozenset())


def whole_file(strings: Mapping[str, bytes], parts: WeightsParts, key: str) -> bytes | None:
    """A file, put together from its strings."""
    if key not in strings:
        return None
    names = weights_keys(KEYS, parts) if key == KEYS.weights else state_keys(KEYS, parts)
    return b"".join((strings[key], *(strings.get(name, b"") for name in names)))


def execute(db: Db, commands: Iterable[Command]) -> tuple[Db, tuple[Any, ...]]:
    """Execute commands as one transaction."""
    server = _Server(db)
    replies = tuple(getattr(server, name.lower())(*args) for name, *args in commands)
    return server.freeze(), replies


class _Server:
    """A Db thawed for one transaction; the methods are named and answer like the commands."""

    def __init__(self, db: Db) -> None:
        self.strings = dict(db.strings)
        self.hashes = {key: dict(pairs) for key, pairs in db.hashes}
        self.stream = dict(db.stream)
        self.pending = set(db.pending)
        self.written = dict(db.written)
        self.last_id, self.delivered, self.log, self.refused = db.last_id, db.delivered, db.log, db.refused
        self.base, self.rules_went_back = db.base, db.rules_went_back
        self.volatile = set(db.volatile)
        self.applied_while_held = db.applied_while_held

    def freeze(self) -> Db:
        return Db(
            strings=tuple(sorted(self.strings.items())),
            hashes=tuple((key, tuple(sorted(pairs.items()))) for key, pairs in sorted(self.hashes.items())),
            stream=tuple(sorted(self.stream.items())),
            last_id=self.last_id,
            delivered=self.delivered,
            pending=tuple(sorted(self.pending)),
            log=self.log,
            refused=self.refused,
            written=tuple(sorted(self.written.items())),
            base=self.base,
            volatile=frozenset(self.volatile & self.strings.keys()),
            rules_went_back=self.rules_went_back,
            applied_while_held=self.applied_while_held,
        )

    def get(self, key: str) -> bytes | None:
        return self.strings.get(key)

    def getrange(self, key: str, start: int, end: int) -> bytes:
        return self.strings.get(key, b"")[start : end + 1]

    def strlen(self, key: str) -> int:
        return len(self.strings.get(key, b""))

    def setpx(self, key: str, value: bytes) -> bool:
        """SET with an expiry."""
        self.volatile.add(key)
        self.strings[key] = value
        return True

    def copy(self, source: str, name: str, length: int) -> int:
        """The script that copies a part of this length, unless something has the name; the copy expires."""
        value = self.strings.get(source)
        if value is None or len(value) != length:
            return 0
        is_new = self.strings.setdefault(name, value) is value
        self.volatile.add(name)
        return int(is_new)

    def spoil(self, key: str) -> bool:
        """What a worker does who writes another content over its part; no update was ever to say so."""
        value = self.strings[key]
        self.strings[key] = value[:-1] + bytes([value[-1] ^ 1])
        return True

    def persist(self, key: str) -> bool:
        self.volatile.discard(key)
        return key in self.strings

    def scan(self, *patterns: str) -> tuple[str, ...]:
        """The keys that match one of these patterns."""
        return tuple(
            key for key in sorted(self.strings) if any(fnmatchcase(key, pattern) for pattern in patterns)
        )

    def set(self, key: str, value: bytes) -> bool:
        self.strings[key] = bytes(value)  # the memory may be used again
        self.volatile.discard(key)
        if key.startswith(KEYS.root + ":payload:"):
            old, self.written[key] = self.written.get(key, value), value
            if key.endswith(":0") and old != value:
                self.written[key] = TWO_CONTENTS
        return True

    def incr(self, key: str) -> int:
        self.strings[key] = str(int(self.strings.get(key, b"0")) + 1).encode()
        return int(self.strings[key])

    def setnx(self, key: str, value: bytes) -> bool:
        return self.strings.setdefault(key, value) == value

    def expire(self, key: str) -> bool:
        return key in self.strings

    def relineage(self, weights: bytes) -> bool:
        """What an operator does who gives the expert a new lineage: nothing of before counts any more."""
        self.strings[KEYS.weights] = stamped(weights, "c99")
        self.hashes[KEYS.meta] |= {"lineage": "M", "commit": "c99", "weights_commit": "c99", "version": "0"}
        self.unlink(*part_keys(KEYS, WeightsParts.from_json(self.hashes[KEYS.meta].get("parts", ""))))
        self.unlink(*_copies_in(self.hashes.get(KEYS.tail, {})))
        self.hashes[KEYS.meta] |= {"decided_stamp": NO_DECISIONS, "tail": "", "parts": "", "requires": ""}
        self.strings.pop(KEYS.packed, None)
        self.hashes.pop(KEYS.tail, None)
        self.hashes[KEYS.meta] |= {"applied": "0", "refused": "0", "n_examples": "0", "n_tokens": "0"}
        self.hashes.pop(KEYS.decided, None)
        self.log = self.refused = ()
        self.base = None
        return True

    def lease(self, holder: str) -> bool:
        """The lease's script."""
        return self.strings.setdefault(KEYS.lease, holder.encode()) == holder.encode()

    def exists(self, *keys: str) -> int:
        return sum(key in self.strings or key in self.hashes for key in keys)

    def hlen(self, key: str) -> int:
        return len(self.hashes.get(key, {}))

    def mget(self, *keys: str) -> tuple[bytes | None, ...]:
        return tuple(self.strings.get(key) for key in keys)

    def unlink(self, *keys: str) -> int:
        return sum((self.strings.pop(key, None) or self.hashes.pop(key, None)) is not None for key in keys)

    def type(self, key: str) -> bytes:
        return b"hash" if key in (KEYS.decided, KEYS.vectors, KEYS.tail) else b"stream"

    def hgetall(self, key: str) -> Pairs:
        return tuple(sorted(self.hashes.get(key, {}).items()))

    def hget(self, key: str, field: str) -> str | None:
        return self.hashes.get(key, {}).get(field)

    def hmget(self, key: str, *fields: str) -> tuple[str | None, ...]:
        return tuple(self.hget(key, field) for field in fields)

    def hset(self, key: str, mapping: Pairs) -> int:
        before = self.hashes.get(key, {})
        if key == KEYS.meta and "rules" in before:
            after = before | dict(mapping)
            self.rules_went_back |= _number_of(after["rules"]) < _number_of(before["rules"])
            is_held = bool(RuleSet.from_json(before["rules"]).held)
            self.applied_while_held |= is_held and after["version"] != before["version"]
        self.hashes.setdefault(key, {}).update(mapping)
        if key == KEYS.meta:
            self.hashes[key] |= dict.fromkeys(FOR_PEOPLE, "0")
        return 1

    def hsetone(self, key: str, field: str, value: str) -> bool:
        """HSET of one field; True if there was none."""
        is_new = field not in self.hashes.setdefault(key, {})
        self.hashes[key][field] = value
        return is_new

    def watch(self, *keys: str) -> tuple[str, ...]:
        """Those that will expire: of what was not there, a WATCH does not notice that it is not."""
        return tuple(key for key in keys if key in self.volatile)

    def xadd(self, key: str, fields: Pairs) -> str:
        content = dict(fields)
        if key == KEYS.log and "restored" in content:
            over = self.log or self.base
            parts = WeightsParts.from_json(self.hashes[KEYS.meta].get("parts", ""))
            files = [whole_file(self.strings, parts, key) for key in (KEYS.weights, KEYS.server_state)]
            assert files[0] is not None
            self.base = OVERWRITTEN if over else (int(content["version"]), files[0], files[1])
        elif key == KEYS.log and "rolled_back_to" in content:
            to, version = int(content["rolled_back_to"]), int(content["version"])
            self.log += ((ROLLBACK, json.dumps(content, sort_keys=True), version, to),)
        elif key in (KEYS.log, KEYS.dead) and "seq" in content:
            line = (content["worker"], content["run"], int(content["seq"]))
            if key == KEYS.log:
                in_force = self.hashes[KEYS.meta]["rules"]
                self.rules_went_back |= int(content["rules"]) < _number_of(in_force)
                self.log += ((*line, int(content["rules"]), "ends_round" in content, "new_state" in content),)
            else:
                self.refused += (line,)
        elif key == KEYS.updates:
            self.last_id += 1
            self.stream[self.last_id] = fields
        return f"{self.last_id}-0"

    def xack(self, key: str, *ids: str) -> int:
        self.pending -= {_number(i) for i in ids}
        return len(ids)

    def xdel(self, key: str, *ids: str) -> int:
        return sum(self.stream.pop(_number(i), None) is not None for i in ids)

    def xtrim(self, key: str) -> int:
        self.stream.clear()
        return 1

    def xrange(self, key: str, entry_id: str) -> tuple[tuple[str, Pairs], ...]:
        number = _number(entry_id)
        return ((entry_id, self.stream[number]),) if number in self.stream else ()

    def xrevrange(self, key: str) -> tuple[tuple[str, Pairs], ...]:
        """The last line of the log."""
        if not self.log and not self.base:
            return ()
        if self.log and self.log[-1][0] == ROLLBACK:
            return (("1-0", tuple(json.loads(self.log[-1][1]).items())),)
        version = (self.base[0] if self.base else 0) + len(self.log)
        return (("1-0", (("version", str(version)),)),)

    def group(self, key: str, start: str) -> bool:
        """XGROUP CREATE; False: there is one."""
        if self.delivered is not None:
            return False
        self.delivered = 0 if start == "0" else self.last_id
        return True

    def xreadgroup(self, key: str) -> Any:
        if self.delivered is None:
            return NO_GROUP
        fresh = {i: fields for i, fields in self.stream.items() if i > self.delivered}
        self.delivered = max(fresh, default=self.delivered)
        self.pending |= fresh.keys()
        return tuple((f"{i}-0", fields) for i, fields in sorted(fresh.items()))

    def xautoclaim(self, key: str) -> Any:
        if self.delivered is None:
            return NO_GROUP
        self.pending &= self.stream.keys()
        return tuple((f"{i}-0", self.stream[i]) for i in sorted(self.pending))


def _copies_in(tail: Mapping[str, Any]) -> list[str]:
    records = {field.encode(): text.encode() for field, text in tail.items() if isinstance(text, str)}
    return copied_keys(KEYS, records)


def _number_of(rules: str) -> int:
    return RuleSet.from_json(rules).number


def _number(entry_id: str) -> int:
    return int(entry_id.partition("-")[0])
