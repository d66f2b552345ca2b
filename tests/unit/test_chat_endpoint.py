"""fedmoe.tools.serve.app: requests that no reply can quote."""

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
