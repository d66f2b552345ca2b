"""The endpoint of `fedmoe gateway serve`: the part of OpenAI's API that a chat needs, over HTTP.

    GET  /v1/models             the gateway, the experts, the base model
    GET  /v1/models/NAME        one of them
    POST /v1/chat/completions   one answer, whole or as a stream of server-sent events
    GET  /health                200 as soon as it answers

`system_fingerprint` in an answer says which version gave it, and the header X-FedMoE-Ignored which fields of the
request were not used. To try a federation out: it answers one at a time.
"""

import asyncio
import hmac
import json
import logging
import secrets
import threading
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedmoe.errors import FedMoEError, RequestError, StoppedError, UnknownModelError
from fedmoe.tools.serve.engine import Engine, Finish, Served
from fedmoe.tools.serve.requests import ChatRequest, Reply, read_request

logger = logging.getLogger(__name__)

MAX_BODY = 4 * 2**20  # bytes of a request
LOOK_S = 0.5  # between two looks at a client that waits: is it still there?


class _Begun(NamedTuple):
    version: str


class _Text(NamedTuple):
    text: str


class _Failed(NamedTuple):
    error: Exception


_Event = _Begun | _Text | Finish | _Failed


class Endpoint:
    """The application; `closing` ends all answers.

    Args:
        engine: that answers.
        api_key: that clients must send as a bearer token, "" for none.
    """

    def __init__(self, engine: Engine, *, api_key: str = "") -> None:
        self._engine, self._api_key = engine, api_key
        self.closing = threading.Event()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/health", self._health),
            ],
            exception_handlers={404: _not_found, 405: _not_found},
        )

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _models(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        return JSONResponse({"object": "list", "data": [_model(one) for one in self._engine.models()]})

    async def _one_model(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        try:
            return JSONResponse(_model(self._engine.model(request.path_params["name"])))
        except RequestError as error:
            return _refused(error)

    def _refusal(self, request: Request) -> Response | None:
        sent = request.headers.get("authorization", "")
        if self._api_key and not hmac.compare_digest(sent.encode(), f"Bearer {self._api_key}".encode()):
            return _error(401, "this server asks for its key (--api-key)", "api_key")
        return None

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        try:
            wanted = read_request(await _json(request))
            self._engine.model(wanted.model)
        except ClientDisconnect:  # in the middle of its request: nobody reads the reply
            return Response(status_code=400)
        except RequestError as error:
            return _refused(error)
        events, cancel = self._ask(wanted)
        streams = False
        try:
            begun = await self._next(request, events)
            if not isinstance(begun, _Begun):
                return _failed(begun)
            reply = Reply(f"chatcmpl-{secrets.token_hex(12)}", wanted.model, begun.version)
            if streams := wanted.stream:
                stream = _chunks(events, cancel, self.closing, reply, with_usage=wanted.include_usage)
                response: Response = StreamingResponse(
                    stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
                )
            else:
                response = await self._whole(request, events, reply)
            if wanted.ignored:
                response.headers["X-FedMoE-Ignored"] = ", ".join(wanted.ignored)
            return response
        finally:
            if not streams:
                cancel.set()

    async def _whole(self, request: Request, events: asyncio.Queue[_Event], reply: Reply) -> Response:
        text = ""
        while True:
            match await self._next(request, events):
                case _Text(piece):
                    text += piece
                case Finish() as finish:
                    return JSONResponse(reply.whole(text, finish.reason, finish.usage))
                case other:
                    return _failed(other)

    def _ask(self, wanted: ChatRequest) -> tuple[asyncio.Queue[_Event], threading.Event]:
        """Let the engine answer in a thread of its own; its events, and what cancels it."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[_Event]()
        cancel = threading.Event()

        def emit(event: _Event) -> None:
            if not self.closing.is_set():
                loop.call_soon_threadsafe(events.put_nowait, event)

        def run() -> None:
            try:
                if cancel.is_set() or self.closing.is_set():
                    return
                finish = self._engine.answer(
                    wanted,
                    on_start=lambda version: emit(_Begun(version)),
                    on_text=lambda text: emit(_Text(text)),
                    cancelled=lambda: cancel.is_set() or self.closing.is_set(),
                )
                emit(finish)
            except Exception as error:
                if not isinstance(error, FedMoEError):
                    logger.exception("unexpected error while answering")
                emit(_Failed(error))

        threading.Thread(target=run, name="answer", daemon=True).start()
        return events, cancel

    async def _next(self, request: Request, events: asyncio.Queue[_Event]) -> _Event:
        """The next event; a failure if the client has gone or the server stops, so that its answer ends too."""
        while True:
            try:
                return await asyncio.wait_for(events.get(), LOOK_S)
            except TimeoutError:
                if self.closing.is_set() or await request.is_disconnected():
                    return _Failed(StoppedError("the server stops", about="stop"))


async def _chunks(
    events: asyncio.Queue[_Event],
    cancel: threading.Event,
    closing: threading.Event,
    reply: Reply,
    *,
    with_usage: bool,
) -> AsyncIterator[str]:
    """The server-sent events of one answer; they break off if the server stops."""
    try:
        yield _event(reply.chunk({"role": "assistant", "content": ""}))
        while not closing.is_set():
            try:
                event = await asyncio.wait_for(events.get(), LOOK_S)
            except TimeoutError:
                continue
            match event:
                case _Text(piece):
                    yield _event(reply.chunk({"content": piece}))
                case _Failed(error):
                    yield _event(
                        _content(str(error) if isinstance(error, FedMoEError) else "internal error", "")
                    )
                    return
                case Finish() as finish:
                    yield _event(reply.chunk({}, finish.reason))
                    if with_usage:
                        yield _event(reply.usage_chunk(finish.usage))
                    yield "data: [DONE]\n\n"
                    return
    finally:
        cancel.set()


def _model(one: Served) -> dict[str, Any]:
    return {"id": one.name, "object": "model", "created": 0, "owned_by": "fedmoe", "version": one.version}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _json(request: Request) -> Any:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            raise RequestError(f"a request has at most {MAX_BODY // 2**20} MiB", about="body")
    try:
        content = json.loads(body)
        # A lone half of a surrogate pair cannot be encoded, so no reply could hold it.
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "the request holds half of a surrogate pair (\\ud800 to \\udfff), which is no character",
            about="body",
        ) from error
    except RecursionError as error:
        raise RequestError("the request is nested too deeply", about="body") from error
    except ValueError as error:
        raise RequestError("the request is not JSON in UTF-8", about="body") from error
    return content


def _content(message: str, param: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param or None, "code": None}}


def _error(status: int, message: str, param: str, kind: str = "invalid_request_error") -> Response:
    return JSONResponse(_content(message, param, kind), status_code=status)


def _refused(error: RequestError) -> Response:
    return _error(404 if isinstance(error, UnknownModelError) else 400, str(error), error.about)


def _failed(event: _Event) -> Response:
    """The reply to a request whose answer did not come to its end."""
    error = event.error if isinstance(event, _Failed) else None
    if isinstance(error, RequestError):
        return _refused(error)
    status = 503 if isinstance(error, StoppedError) else 500
    message = str(error) if isinstance(error, FedMoEError) else "internal error: see the server's log"
    return _error(status, message, "", "server_error")


def _endpoints(request: Request) -> str:
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    return ", ".join(
        f"{method} {route.path.replace(':path', '')}"
        for route in routes
        for method in sorted((route.methods or set()) - {"HEAD"})
    )


async def _not_found(request: Request, error: Exception) -> Response:
    return _error(
        404, f"there is no {request.method} {request.url.path} here; there are: {_endpoints(request)}", ""
    )
