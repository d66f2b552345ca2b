"""Connection.stream: replies one by one, and a connection that is good for the next command whatever happens."""

from collections.abc import Callable
from contextlib import closing

import pytest
import redis

from fedmoe.store.connection import Connection


@pytest.fixture
def numbered(connection: Connection) -> Connection:
    """A server with the keys 0 to 99, each holding its number; number 7 is a list."""
    for number in range(100):
        connection.client.set(number, number)
    connection.client.delete(7)
    connection.client.rpush(7, "x")
    return connection


COMMANDS = [("GET", number) for number in range(100)]


def test_replies_come_in_order(numbered: Connection) -> None:
    """A refused command's reply is its error, and the others come all the same."""
    replies = list(numbered.stream(COMMANDS))
    assert [reply for n, reply in enumerate(replies) if n != 7] == [
        str(n).encode() for n in range(100) if n != 7
    ]
    assert isinstance(replies[7], redis.ResponseError)
    assert not list(numbered.stream([]))


def test_few_are_on_their_way(numbered: Connection, connect: Callable[[], Connection]) -> None:
    """The server has done no more than `ahead` commands that nobody has read the reply of."""
    meter = connect().client

    def gets() -> int:
        return int(meter.info("commandstats").get("cmdstat_get", {"calls": 0})["calls"])

    before = gets()
    with closing(numbered.stream(COMMANDS, ahead=4)) as replies:
        for number in range(50):
            next(replies)
            assert gets() - before <= number + 5
    assert gets() - before <= 54


@pytest.mark.parametrize("taken", [0, 1, 5, 99])
def test_closed_early_leaves_the_connection_good(numbered: Connection, taken: int) -> None:
    """What is on its way is taken in: no other command gets that reply, and the connection is the same one."""
    generation = numbered.generation
    with closing(numbered.stream(COMMANDS)) as replies:
        for _ in range(taken):
            next(replies)
    assert numbered.client.get(50) == b"50"
    assert numbered.generation == generation


def test_break_is_an_error_and_the_next_command_connects_anew(
    numbered: Connection, connect: Callable[[], Connection]
) -> None:
    """Killed in the middle of a stream."""
    generation = numbered.generation
    other = connect().client
    with pytest.raises(redis.ConnectionError):  # noqa: PT012  # the error comes at one of the next replies
        for number, _ in enumerate(numbered.stream(COMMANDS)):
            if number == 10:
                other.client_kill_filter(_type="normal", skipme=True)
    assert numbered.client.get(50) == b"50"
    assert numbered.generation == generation + 1
