"""The pages: rendered here, kept live by static/app.js, which fetches a page again and puts its parts in place."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from fedmoe import __version__
from fedmoe.errors import RequestError
from fedmoe.tools.dashboard import show
from fedmoe.tools.dashboard.api import chosen_workers, federation_of, in_order, whole
from fedmoe.tools.dashboard.guard import address_of, path_of, refused, too_many
from fedmoe.tools.dashboard.login import COOKIE, SESSION_S, Login
from fedmoe.tools.dashboard.openapi import PAGE
from fedmoe.tools.dashboard.watcher import Look, Watcher

STATIC = Path(__file__).parent / "static"
TEMPLATES = Path(__file__).parent / "templates"
SHOWN_WORKERS, SHOWN_EVENTS, ALL_EVENTS = 12, 8, 200
MAX_FORM = 8192  # bytes
FORM_S = 10.0  # for a client to send a form
MOST_KEPT = 100  # rendered pages of one look


class Pages:
    """Renders the pages; clients that ask for the same page of the same look get the same text.

    Args:
        watcher: the reader of Redis.
        login: who may read.
        downloads: offer adapters.
    """

    def __init__(self, watcher: Watcher, login: Login, *, downloads: bool) -> None:
        self._watcher, self._login = watcher, login
        self._kept: dict[str, str] = {}
        self._kept_of = -1
        self._templates = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True,
        )  # fmt: skip
        self._templates.filters |= show.FILTERS | {"path": lambda text: quote(text, safe="")}
        self._templates.globals |= {
            "release": __version__, "downloads": downloads, "has_login": login.is_needed, "query": urlencode,
            "spark": show.spark, "bars": show.bars,
        }  # fmt: skip

    async def overview(self, request: Request) -> Response:
        """Experts, workers, gateway, Redis, events."""
        look = self._watcher.last
        workers = [one for one in in_order(look.picture) if one["is_alive"] or not one["is_well"]]
        return self._page(
            request, "overview.html", look, workers=workers[:SHOWN_WORKERS], n_workers=len(workers),
            events=self._watcher.events.newest(SHOWN_EVENTS),
        )  # fmt: skip

    async def workers(self, request: Request) -> Response:
        """All workers, filtered, a page at a time."""
        look = self._watcher.last
        try:
            total, found = chosen_workers(look.picture, request)
            offset = whole(request, "offset", 0, at_least=0, at_most=2**53)
        except RequestError as error:
            return refused(request, 400, str(error), error.about)
        chosen = {name: request.query_params.get(name, "") for name in ("q", "expert", "alive")}
        return self._page(
            request, "workers.html", look, workers=found, total=total, offset=offset, size=PAGE, chosen=chosen
        )

    async def events(self, request: Request) -> Response:
        """The newest events."""
        look = self._watcher.last
        return self._page(request, "events.html", look, events=self._watcher.events.newest(ALL_EVENTS))

    async def expert(self, request: Request) -> Response:
        """One expert."""
        look = self._watcher.last
        found = look.picture.experts.get(request.path_params["expert"])
        if found is None:
            return self._missing(request, look, "expert", request.path_params["expert"])
        workers = [one for one in in_order(look.picture) if one["expert"] == found["name"]]
        curves = [(one["worker"], one) for one in found["validation_curves"]]
        return self._page(request, "expert.html", look, expert=found, workers=workers[:PAGE], curves=curves)

    async def worker(self, request: Request) -> Response:
        """One worker."""
        look = self._watcher.last
        expert, name = request.path_params["expert"], request.path_params["worker"]
        found = look.picture.workers.get((expert, name))
        if found is None:
            return self._missing(request, look, "worker", name)
        return self._page(request, "worker.html", look, worker=found)

    def _missing(self, request: Request, look: Look, what: str, name: str) -> Response:
        return self._page(request, "missing.html", look, status=404, what=what, name=name)

    def _page(
        self, request: Request, template: str, look: Look, *, status: int = 200, **values: Any
    ) -> Response:
        if self._kept_of != look.number or len(self._kept) > MOST_KEPT:
            self._kept, self._kept_of = {}, look.number
        key = f"{path_of(request)}?{request.url.query}"
        text = self._kept.get(key)
        if text is None:
            text = self._kept[key] = self._render(
                template, look=look, federation=federation_of(look), **values
            )
        return HTMLResponse(text, status)

    def _render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(**values)

    async def login(self, request: Request) -> Response:
        """The form, and the password that was typed into it."""
        target = _inside(request.query_params.get("next", "/"))
        if not self._login.is_needed:
            return RedirectResponse("/", 303)
        if request.method != "POST":
            return HTMLResponse(self._render("login.html", problem="", target=target))
        if not _is_ours(request):
            return refused(request, 403, "log in from the dashboard's own page", "origin")
        address = address_of(request)
        if (wait_s := self._login.wait_s(address)) > 0:
            return too_many(request, wait_s)
        if not self._login.is_password(await _password(request), address):
            return HTMLResponse(
                self._render("login.html", problem="That is not the password.", target=target), 401
            )
        answer = RedirectResponse(target, 303)
        answer.set_cookie(
            COOKIE, self._login.begin(), max_age=int(SESSION_S), httponly=True, samesite="strict",
            secure=_is_secure(request),
        )  # fmt: skip
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session."""
        if not _is_ours(request):
            return refused(request, 403, "log out from the dashboard's own page", "origin")
        self._login.end(request.cookies.get(COOKIE, ""))
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE, httponly=True, samesite="strict", secure=_is_secure(request))
        return answer


def _inside(target: str) -> str:
    """A path of this dashboard; another target becomes the overview."""
    is_path = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return target if is_path and target.isprintable() and len(target) < 1000 else "/"


def _is_secure(request: Request) -> bool:
    """True if the request came by TLS, to us or to a proxy that we believe: then the cookie travels by TLS only."""
    return str(request.scope["scheme"]) == "https"


def _is_ours(request: Request) -> bool:
    """True if the form that was sent is the dashboard's own, as far as the browser says."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("origin")
    return origin is None or origin.partition("://")[2] == request.headers.get("host")


async def _password(request: Request) -> str:
    body = b""
    try:
        async with asyncio.timeout(FORM_S):
            async for piece in request.stream():
                body += piece
                if len(body) > MAX_FORM:
                    return ""
    except (TimeoutError, ClientDisconnect):
        return ""
    fields = parse_qs(body.decode(errors="replace"))
    return fields.get("password", [""])[0]
