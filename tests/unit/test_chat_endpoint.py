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
