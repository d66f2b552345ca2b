"""What every request passes before the dashboard answers: host, method, session; and the headers of every answer."""

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from fedmoe.tools.dashboard.login import COOKIE, Login

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",  # with no-referrer a browser hides the origin of the login form, too
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
READS = ("GET", "HEAD")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
API = "/api/"


class Guard:
    """Wraps the application.

    Args:
        app: that answers what is let through.
        login: who may read.
        names: by which browsers may call it, beside addresses, localhost and this machine's name.
        open_paths: that need no login; one that ends with / stands for all below it.
        form_paths: that take a POST.
    """

    def __init__(
        self,
        app: App,
        login: Login,
        *,
        names: Iterable[str] = (),
        open_paths: Iterable[str] = (),
        form_paths: Iterable[str] = (),
    ) -> None:
        self._app, self._login = app, login
        self._names = {name.lower() for name in ("localhost", socket.gethostname(), socket.getfqdn(), *names)}
        self._open, self._forms = tuple(open_paths), frozenset(form_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let the application answer."""
        if scope["type"] != "http":
            return

        is_static = scope["path"].startswith("/static/")

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-cache" if is_static else "no-store")
            await send(message)

        request = Request(scope)
        answer: App = self._refusal(request) or self._app
        await answer(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if not self._is_our_name(request.headers):
            text = "this dashboard is not called by that name: start it with --allow-host NAME"
            return refused(request, 421, text, "host")
        path = path_of(request)
        if request.method not in READS and not (request.method == "POST" and path in self._forms):
            text = f"the dashboard only reads: {request.method} is not allowed"
            return refused(request, 405, text, "method", {"Allow": "GET, HEAD"})
        if not self._login.is_needed or self._is_open(path):
            return None
        return self._not_logged_in(request)

    def _is_open(self, path: str) -> bool:
        return any(path == one or (one.endswith("/") and path.startswith(one)) for one in self._open)

    def _not_logged_in(self, request: Request) -> Response | None:
        if self._login.is_session(request.cookies.get(COOKIE, "")):
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            address = address_of(request)
            if (wait_s := self._login.wait_s(address)) > 0:
                return too_many(request, wait_s)
            if self._login.is_password(given.strip(), address):
                return None
        if path_of(request).startswith(API) or scheme:
            text = "log in at /login, or send the password as a bearer token"
            return refused(request, 401, text, "login", {"WWW-Authenticate": "Bearer"})
        wanted = path_of(request) + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/login?next={quote(wanted, safe='')}", status_code=303)

    def _is_our_name(self, headers: Headers) -> bool:
        """True if the Host header is an address or one of our names: a page of others cannot make it so."""
        if len(headers.getlist("host")) != 1:
            return False
        host = _HOST.fullmatch(headers["host"].strip().lower())
        if host is None:  # a longer one could put another path into the request's URL
            return False
        name = host[1] or host[2]
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def path_of(request: Request) -> str:
    """The path that routes see; that of `request.url` also depends on the Host header, which the client chooses."""
    return str(request.scope["path"])


def address_of(request: Request) -> str:
    """The address of the client."""
    return request.client.host if request.client else ""


def too_many(request: Request, wait_s: float) -> Response:
    """The answer to one more attempt to log in after too many that failed."""
    text = f"too many wrong passwords: try again in {wait_s:.0f} s"
    return refused(request, 429, text, "login", {"Retry-After": f"{wait_s:.0f}"})


def refused(
    request: Request, status: int, text: str, about: str, headers: dict[str, str] | None = None
) -> Response:
    """One sentence: JSON for the API, text for everybody else."""
    if path_of(request).startswith(API):
        return JSONResponse({"error": {"message": text, "about": about}}, status, headers)
    return PlainTextResponse(f"{text}\n", status, headers)
