"""The dashboard as one application: every route stands here."""

from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from fedmoe.settings import RedisSettings
from fedmoe.tools.dashboard.api import Api
from fedmoe.tools.dashboard.guard import Guard, refused
from fedmoe.tools.dashboard.login import Login
from fedmoe.tools.dashboard.pages import STATIC, Pages
from fedmoe.tools.dashboard.settings import DashboardSettings
from fedmoe.tools.dashboard.stream import Hub
from fedmoe.tools.dashboard.watcher import Watcher

V1 = "/api/v1"


class Dashboard:
    """The application `app`, and what must be told when the process stops.

    Args:
        watcher: the reader of Redis; the caller runs it.
        settings: of the command.
        redis: how downloads reach Redis.
        password: that readers must give, "" for none.
        more: further routes, for example of metrics; they are guarded like the others.
    """

    def __init__(
        self,
        watcher: Watcher,
        settings: DashboardSettings,
        redis: RedisSettings,
        *,
        password: str = "",
        more: Sequence[BaseRoute] = (),
    ) -> None:
        self.hub = Hub(watcher)
        watcher.on_look = self.hub.wake
        watcher.is_watched = lambda: len(self.hub) > 0
        self.login = Login(password)
        self.api = api = Api(watcher, self.hub, redis if settings.downloads else None)
        pages = Pages(watcher, self.login, downloads=settings.downloads)
        routes = [
            Route("/", pages.overview),
            Route("/workers", pages.workers),
            Route("/events", pages.events),
            Route("/experts/{expert}", pages.expert),
            Route("/experts/{expert}/workers/{worker}", pages.worker),
            Route("/login", pages.login, methods=["GET", "POST"]),
            Route("/logout", pages.logout, methods=["POST"]),
            Route("/api/openapi.json", api.openapi),
            Route(f"{V1}/federation", api.federation),
            Route(f"{V1}/experts", api.experts),
            Route(f"{V1}/experts/{{expert}}", api.expert),
            Route(f"{V1}/experts/{{expert}}/adapter", api.adapter),
            Route(f"{V1}/experts/{{expert}}/workers/{{worker}}", api.worker),
            Route(f"{V1}/workers", api.workers),
            Route(f"{V1}/gateway", api.gateway),
            Route(f"{V1}/gateway/adapter", api.adapter),
            Route(f"{V1}/redis", api.redis),
            Route(f"{V1}/history", api.history),
            Route(f"{V1}/events", api.events),
            Mount("/static", StaticFiles(directory=STATIC)),
            *more,
        ]
        inner = Starlette(
            routes=routes, exception_handlers={404: _not_found, 405: _not_allowed, 500: _failed}
        )
        self.app = Guard(
            inner,
            self.login,
            names=settings.allow_host,
            open_paths=("/login", "/static/"),
            form_paths=("/login", "/logout"),
        )


async def _not_found(request: Request, error: Exception) -> Response:
    return refused(request, 404, "there is no such page", "path")


async def _not_allowed(request: Request, error: Exception) -> Response:
    return refused(request, 405, "the dashboard only reads", "method", {"Allow": "GET, HEAD"})


async def _failed(request: Request, error: Exception) -> Response:
    return refused(request, 500, "internal error: see the dashboard's log", "internal")
