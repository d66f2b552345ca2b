"""`/metrics` of the dashboard, for Prometheus; only if prometheus-client is installed."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from fedmoe.settings import RedisSettings
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector


def metrics_routes(redis: RedisSettings) -> list[BaseRoute]:
    """The route of the federation's metrics; none without prometheus-client. Each scrape reads Redis once."""
    try:
        from fedmoe.tools.metrics.federation import federation_registry
        from fedmoe.tools.metrics.server import exposition
    except ModuleNotFoundError:
        return []
    registry = federation_registry(Inspector(Connection(redis)).federation)

    def metrics(request: Request) -> Response:  # not async: it may wait for Redis, in a thread of its own
        body, content_type = exposition(registry, request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    return [Route("/metrics", metrics)]
