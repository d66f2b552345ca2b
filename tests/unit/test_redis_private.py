"""The private parts of redis-py that are used: they are there, and named in one place."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.connection import PythonRespSerializer

from fedmoe.store.connection import packer
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


@pytest.mark.parametrize(
    "words",
    [
        ("HSET", "k", "f", "é", "n", 7, "x", 0.5, "b", b"v"),
        ("CONFIG GET", "maxmemory"),
        (b"CONFIG GET", "maxmemory"),
        ("SET", "k", b"v" * 7000),
        ("SET", "k", memoryview(b"v"), "EX", 5),
        ("SET", "k", bytearray(b"v")),
    ],
)
def test_short_words_are_packed_as_redis_py_does(words: tuple[Any, ...]) -> None:
    """By hiredis: to the same bytes."""
    encoder = Encoder("utf-8", "strict", decode_responses=False)
    theirs = PythonRespSerializer(6000, encoder.encode).pack(*words)
    assert b"".join(map(bytes, packer().pack(*words))) == b"".join(map(bytes, theirs))


def test_buffers_are_sent_as_they_are() -> None:
    """Not a copy of them."""
    for value in (memoryview(b"v"), b"v" * 7000):
        assert any(part is value for part in packer().pack("SET", "k", value))


@pytest.mark.parametrize("word", [None, True, [1], object()])
def test_words_that_nobody_packs(word: object) -> None:
    """The error is redis-py's."""
    with pytest.raises(redis.DataError):
        packer().pack("SET", "k", word)


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
