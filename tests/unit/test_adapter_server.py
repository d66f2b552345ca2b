"""fedmoe.tools.follow.servers: addresses and keys that cannot be used, and servers that answer no HTTP."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedmoe.errors import ServerAwayError, SettingsError
from fedmoe.tools.follow.servers import AdapterServer
from tests.errors import raises


@contextmanager
def replying(reply: bytes) -> Iterator[str]:
    """A server that answers its first client so; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            client, _ = listening.accept()
            with client:
                client.recv(4096)
                client.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "host:80", "http://", "http://host:x", "http://host:99999", "http://a b", "http://[::1"],
)
def test_an_address_that_cannot_be_asked_is_refused(url: str) -> None:
    """Before anything is exported."""
    with raises(SettingsError, about="vllm"):
        AdapterServer("vllm", url)


@pytest.mark.parametrize("url", ["http://user:secret@host:80", "http://user:secret@host:x"])
def test_a_password_in_an_address_is_refused_and_not_shown(url: str) -> None:
    """It would not be sent."""
    with raises(SettingsError, about="vllm") as caught:
        AdapterServer("vllm", url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["two\nlines", "schlüssel"])
def test_a_key_that_no_header_holds_is_refused(key: str) -> None:
    """In one sentence, which does not show it."""
    with raises(SettingsError, about="api_key") as caught:
        AdapterServer("vllm", "http://host:80", api_key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (b"-ERR unknown command\r\n", "-ERR unknown command)"), (b"", "Remote end closed connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "IncompleteRead"),
    ],
)  # fmt: skip
def test_what_is_no_http_server_is_one_sentence(reply: bytes, said: str) -> None:
    """Another program listens there, a Redis for example: it counts as away, and is asked again."""
    with replying(reply) as url, raises(ServerAwayError, about="vllm") as caught:
        AdapterServer("vllm", url).loaded()
    assert f"answers no HTTP ({said}" in str(caught.value)


@pytest.mark.parametrize(
    ("reply", "about"),
    [
        (b"HTTP/1.1 502 Bad Gateway\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nno", "refused"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + b"[" * 100_000, "refused"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000, "models"),
    ],
)  # fmt: skip
def test_a_reply_that_cannot_be_read_is_one_sentence(reply: bytes, about: str) -> None:
    """An error page that breaks off, or JSON that is too deep: `follow` goes on."""
    with replying(reply) as url, raises(ServerAwayError, about=about):
        AdapterServer("vllm", url).loaded()
