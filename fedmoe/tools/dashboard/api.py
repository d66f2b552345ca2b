"""The answers of the JSON API, all of them from the watcher's last look."""

from collections.abc import Iterable
from typing import Any

from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from fedmoe.errors import FedMoEError, RedisUnfitError, RequestError, UnknownExpertError
from fedmoe.protocol.names import is_expert
from fedmoe.settings import RedisSettings
from fedmoe.tools.dashboard.guard import refused
from fedmoe.tools.dashboard.openapi import MAX_PAGE, PAGE, document
from fedmoe.tools.dashboard.picture import Picture
from fedmoe.tools.dashboard.stream import MOST_CLIENTS, EventStream, Hub, last_event_of
from fedmoe.tools.dashboard.watcher import Look, Watcher

Json = dict[str, Any]


class Api:
    """Answers under /api.

    Args:
        watcher: the reader of Redis.
        hub: the clients of the event stream.
        redis: how a download reads an adapter; None if downloads are off.
    """

    def __init__(self, watcher: Watcher, hub: Hub, redis: RedisSettings | None) -> None:
        self._watcher, self._hub, self._redis = watcher, hub, redis
        self.most_streams = MOST_CLIENTS

    async def openapi(self, request: Request) -> Response:
        """The document."""
        return JSONResponse(document())

    async def federation(self, request: Request) -> Response:
        """Everything in short."""
        return JSONResponse(federation_of(self._watcher.last))

    async def experts(self, request: Request) -> Response:
        """All experts in short."""
        return JSONResponse({"experts": self._picture.federation.get("experts", [])})

    async def expert(self, request: Request) -> Response:
        """One expert."""
        found = self._picture.experts.get(request.path_params["expert"])
        return JSONResponse(found) if found else no_expert(request)

    async def worker(self, request: Request) -> Response:
        """One worker."""
        key = (request.path_params["expert"], request.path_params["worker"])
        found = self._picture.workers.get(key)
        return JSONResponse(found) if found else no_worker(request)

    async def workers(self, request: Request) -> Response:
        """Workers, filtered."""
        try:
            total, found = chosen_workers(self._picture, request)
        except RequestError as error:
            return refused(request, 400, str(error), error.about)
        return JSONResponse({"total": total, "workers": found})

    async def gateway(self, request: Request) -> Response:
        """The gateway."""
        return JSONResponse(federation_of(self._watcher.last)["gateway"])

    async def redis(self, request: Request) -> Response:
        """The server."""
        return JSONResponse(federation_of(self._watcher.last)["redis"])

    async def history(self, request: Request) -> Response:
        """The newest events."""
        try:
            limit = whole(request, "limit", PAGE, at_least=1, at_most=MAX_PAGE)
        except RequestError as error:
            return refused(request, 400, str(error), error.about)
        return JSONResponse({"events": self._watcher.events.newest(limit)})

    async def events(self, request: Request) -> Response:
        """The event stream."""
        if len(self._hub) >= self.most_streams:
            return refused(
                request,
                503,
                "too many clients listen already: close some tabs",
                "clients",
                {"Retry-After": "10"},
            )
        return EventStream(self._hub, last_event_of(request, self._watcher.events.last))

    async def adapter(self, request: Request) -> Response:
        """The adapter of an expert, or of the gateway, as a zip file."""
        name = request.path_params.get("expert", "")
        if self._redis is None:
            text = "downloads are off: start the dashboard with --downloads"
            return refused(request, 403, text, "downloads")
        if name and not (is_expert(name) and name in self._picture.experts):
            return no_expert(request)
        from fedmoe.tools.dashboard.adapters import pack  # it imports torch

        try:
            file, shown = await run_in_threadpool(pack, self._redis, name)
        except UnknownExpertError as error:
            return refused(request, 404, str(error), "expert")
        except RedisUnfitError as error:
            return refused(request, 403 if error.about == "rights" else 503, str(error), error.about)
        except FedMoEError as error:
            return refused(request, 503, str(error), error.about)
        clean = BackgroundTask(file.unlink, missing_ok=True)
        return FileResponse(file, media_type="application/zip", filename=shown, background=clean)

    @property
    def _picture(self) -> Picture:
        return self._watcher.last.picture


def federation_of(look: Look) -> Json:
    """The federation in short, with what became of the last look; also before Redis has answered once."""
    known = look.picture.federation
    redis = known["redis"] | {"is_here": bool(look.at) and not look.problem, "problem": look.problem}
    problem = [look.problem] if look.problem else []
    return _NOTHING | known | {
        "look": look.number, "at": look.at, "redis": redis, "findings": problem + known.get("findings", []),
    }  # fmt: skip


_NOTHING: Json = {
    "prefix": "",
    "findings": [],
    "totals": dict.fromkeys(
        ("experts", "serving", "workers", "quiet", "waiting", "applied", "refused", "updates_per_min",
         "tokens_per_s"), 0,
    ),
    "experts": [],
    "aggregators": [],
    "gateway": {
        "trained": None,
        "merged": {
            "exists": False, "method": "", "rank": None, "updated_at": None, "relative_error": None,
            "served_by": None, "made_of": [], "fit": None, "problems": [],
        },
    },
}  # fmt: skip


def chosen_workers(picture: Picture, request: Request) -> tuple[int, list[Json]]:
    """How many workers fit the query, and one page of them; those with a problem first.

    Raises:
        RequestError: if a parameter cannot be used.
    """
    query = request.query_params
    limit = whole(request, "limit", PAGE, at_least=1, at_most=MAX_PAGE)
    offset = whole(request, "offset", 0, at_least=0, at_most=2**53)
    if query.get("alive", "false") not in ("true", "false"):
        raise RequestError("alive must be true or false", about="alive")
    fitting = [one for one in in_order(picture) if _fits(one, request)]
    return len(fitting), fitting[offset : offset + limit]


def in_order(picture: Picture) -> Iterable[Json]:
    """All workers: those that run first, of them those with a problem, then by expert and name."""
    return sorted(
        (one for expert in picture.experts.values() for one in expert["workers"]),
        key=lambda one: (not one["is_alive"], one["is_well"], one["expert"], one["name"]),
    )


def _fits(worker: Json, request: Request) -> bool:
    query = request.query_params
    text = query.get("q", "").strip().lower()
    return (
        (not query.get("expert") or worker["expert"] == query["expert"])
        and (query.get("alive") != "true" or worker["is_alive"])
        and (not text or any(text in worker[name].lower() for name in ("name", "host", "state")))
    )


def whole(request: Request, name: str, default: int, *, at_least: int, at_most: int) -> int:
    """A whole number of the query; raises RequestError."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if text.isascii() and text.isdecimal() and len(text) < 17 and at_least <= int(text) <= at_most:
        return int(text)
    raise RequestError(
        f"{name} must be a whole number of at least {at_least} and at most {at_most}", about=name
    )


def no_expert(request: Request) -> Response:
    """There is no expert of that name."""
    return refused(request, 404, "there is no such expert", "expert")


def no_worker(request: Request) -> Response:
    """There is no worker of that name."""
    return refused(request, 404, "there is no such expert or worker", "worker")
