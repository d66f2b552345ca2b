"""fedmoe.tools.dashboard.pages: the form of the login."""

import asyncio
from typing import Any

from starlette.requests import Request

from fedmoe.tools.dashboard.pages import _password


def test_a_browser_that_leaves_in_the_middle_of_the_form_has_sent_no_password() -> None:
    coming = iter(
        ({"type": "http.request", "body": b"password=x", "more_body": True}, {"type": "http.disconnect"})
    )

    async def receive() -> Any:
        return next(coming)

    request = Request({"type": "http", "method": "POST", "path": "/login", "headers": []}, receive)
    assert asyncio.run(_password(request)) == ""
