"""fedmoe.tools.serve.app: requests that no reply can quote, and one that breaks off."""

import asyncio
import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedmoe.tools.serve.app import Endpoint


@pytest.mark.parametrize(
    "change",
    [{"\ud800": 1}, {"messages": [{"role": "user", "content": "x", "\ud800": 1}]}, {"messages": "\ud800"}],
)
def test_half_a_surrogate_pair_is_refused(change: dict[str, Any]) -> None:
    """JSON can hold it, UTF-8 cannot: a bad request, and no internal error."""
    nobody: Any = None  # is not asked
    client = TestClient(Endpoint(nobody).app, raise_server_exceptions=False)
    plain = {"model": "gateway", "messages": [{"role": "user", "content": "hi"}]}
    reply = client.post("/v1/chat/completions", content=json.dumps(plain | change))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "body")
    assert "half of a surrogate pair" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("[" * 100_000 + "]" * 100_000, "the request is nested too deeply"),
        ("{", "the request is not JSON in UTF-8"),
        (b'"\xff"', "the request is not JSON in UTF-8"),
    ],
)
def test_a_request_that_cannot_be_read_is_told_why(body: str | bytes, sentence: str) -> None:
    """Valid JSON may be refused, too, and is not called invalid."""
    nobody: Any = None
    reply = TestClient(Endpoint(nobody).app).post("/v1/chat/completions", content=body)
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, sentence)


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/chat/completions"), ("GET", "/")]
)
def test_an_unknown_path_is_told_which_there_are(method: str, path: str) -> None:
    """A client of another API, or with another base URL."""
    nobody: Any = None
    reply = TestClient(Endpoint(nobody).app).request(method, path)
    assert reply.status_code == 404
    assert reply.json()["error"]["message"] == (
        f"there is no {method} {path} here; there are: GET /v1/models, GET /v1/models/{{name}}, "
        "POST /v1/chat/completions, GET /health"
    )


def test_a_client_that_leaves_in_the_middle_of_its_request_is_no_error() -> None:
    """A balancer that only tries the port, or a client that was killed."""
    nobody: Any = None
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [],
        "query_string": b"",
    }
    said: list[Any] = []
    coming = iter(({"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}))

    async def receive() -> Any:
        return next(coming)

    async def send(message: Any) -> None:
        said.append(message)

    asyncio.run(Endpoint(nobody).app(scope, receive, send))
    assert said[0]["status"] == 400
