"""The private parts of redis-py that are used: they are there, and named in one place."""

import re
import socket
from pathlib import Path

import redis
from redis.connection import PythonRespSerializer

from fedmoe.store.redis_private import Encoder, socket_of

ROOT = Path(__file__).parent.parent.parent
PRIVATE = re.compile(
    r"from redis\._|import redis\._|redis\._\w|\._(sock|parser|reader|buffer|available_connections)\b"
)


def test_private_parts_are_there() -> None:
    """A redis-py that renames one fails here, not in the middle of a stop."""
    near, far = socket.socketpair()
    connection = redis.Connection()
    assert socket_of(connection) is None
    connection._sock = near
    assert socket_of(connection) is near
    connection._sock = None
    encoder = Encoder("utf-8", "strict", decode_responses=False)
    packed = b"".join(
        bytes(part) for part in PythonRespSerializer(6000, encoder.encode).pack("SET", "k", memoryview(b"v"))
    )
    assert packed == b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n"
    near.close()
    far.close()


def test_private_parts_are_named_in_one_place() -> None:
    """Whoever upgrades redis-py reads one file."""
    rooms = ("fedmoe", "consumers", "producers")
    using = [
        path.relative_to(ROOT).as_posix()
        for room in rooms
        for path in sorted((ROOT / room).rglob("*.py"))
        if PRIVATE.search(path.read_text())
    ]
    assert using == ["fedmoe/store/redis_private.py"]
