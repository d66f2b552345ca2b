"""The OpenAPI document of the JSON API, served at /api/openapi.json. Pure."""

from typing import Any

from fedmoe import __version__
from fedmoe.tools.dashboard.schemas import SCHEMAS, TEXT, ref

MAX_PAGE = 1000
PAGE = 100


def _answer(name: str, text: str) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": ref(name)}}}


_ERRORS = {
    "401": "the dashboard has a password, and this is not a session of it",
    "405": "the dashboard only reads",
    "421": "the dashboard is not called by that name",
    "429": "too many wrong passwords",
}


def _get(
    summary: str, name: str, *, parameters: list[dict[str, Any]] | None = None, **errors: str
) -> dict[str, Any]:
    said = _ERRORS | {status.removeprefix("e"): text for status, text in errors.items()}
    answers = {"200": _answer(name, summary)}
    answers |= {status: _answer("Error", text) for status, text in sorted(said.items())}
    return {"get": {"summary": summary, "parameters": parameters or [], "responses": answers}}


def _path(name: str, text: str, example: str) -> dict[str, Any]:
    return {
        "name": name, "in": "path", "required": True, "description": text, "schema": {"type": "string"},
        "example": example,
    }  # fmt: skip


def _query(name: str, text: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": text, "schema": schema}


_LIMIT = {"type": "integer", "minimum": 1, "maximum": MAX_PAGE, "default": PAGE}
_EXPERT = _path("expert", "name of an expert", "sql_expert")
_WORKER = _path("worker", "name of one of its workers", "sql-a")
_NO_EXPERT, _NO_WORKER = "there is no such expert", "there is no such expert or worker"
_BAD = "a parameter of the query cannot be used"
_LIMITED = _query("limit", "most records to return", _LIMIT)


def _file(summary: str) -> dict[str, Any]:
    found = _get(summary, "Error", e404=f"{_NO_EXPERT}, or no such gateway yet",
                 e403="downloads are off, or the dashboard's user in Redis may not read weights",
                 e503="Redis does not answer")  # fmt: skip
    found["get"]["responses"]["200"] = {
        "description": "a zip file with the PEFT adapter",
        "content": {"application/zip": {"schema": {"type": "string", "format": "binary"}}},
    }
    return found


def document() -> dict[str, Any]:
    """The document."""
    adapter, merged = (
        _file("The adapter of an expert, for PEFT"),
        _file("The adapter of the gateway, for PEFT"),
    )
    adapter["get"]["parameters"] = [_EXPERT]
    events = _get("Server-sent events: `look` after each look at Redis, `event` for each event", "Error")
    events["get"]["responses"]["200"] = {
        "description": "`look`: number, at, problem. `event`: an Event. It goes on until the client leaves.",
        "content": {"text/event-stream": {"schema": TEXT}},
    }
    workers = [
        _query("expert", "only workers of this expert", TEXT),
        _query("q", "only workers whose name, host or state holds this text", TEXT),
        _query("alive", "only workers that run", {"type": "boolean", "default": False}),
        _LIMITED,
        _query("offset", "workers to leave out first", {"type": "integer", "minimum": 0, "default": 0}),
    ]  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "FedMoE dashboard",
            "version": __version__,
            "description": "Reads a federation, and changes nothing. Unknown values are null; times are seconds.",
        },
        "paths": {
            "/api/v1/federation": _get("All experts in short, gateway, Redis, findings", "Federation"),
            "/api/v1/experts": _get("All experts in short", "Experts"),
            "/api/v1/experts/{expert}": _get(
                "All about an expert", "Expert", parameters=[_EXPERT], e404=_NO_EXPERT
            ),
            "/api/v1/experts/{expert}/workers/{worker}": _get(
                "All about a worker", "WorkerPage", parameters=[_EXPERT, _WORKER], e404=_NO_WORKER
            ),
            "/api/v1/experts/{expert}/adapter": adapter,
            "/api/v1/workers": _get(
                "Workers, those with a problem first", "Workers", parameters=workers, e400=_BAD
            ),
            "/api/v1/gateway": _get("What the gateway is made of, and its losses", "Gateway"),
            "/api/v1/gateway/adapter": merged,
            "/api/v1/redis": _get("Memory, latency and persistence of Redis", "Redis"),
            "/api/v1/history": _get("The newest events", "Events", parameters=[_LIMITED], e400=_BAD),
            "/api/v1/events": events,
        },
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "password": {"type": "http", "scheme": "bearer"},
                "session": {"type": "apiKey", "in": "cookie", "name": "fedmoe_session"},
            },
        },
        "security": [{}, {"password": []}, {"session": []}],
    }
