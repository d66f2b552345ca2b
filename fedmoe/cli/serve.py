"""`fedmoe gateway serve` and `fedmoe gateway chat`."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import made, options, redis_options
from fedmoe.cli.logs import log_options
from fedmoe.cli.options import Duration
from fedmoe.settings import AnswerSettings, RedisSettings

if TYPE_CHECKING:
    from fedmoe.tools.serve.engine import Engine
    from fedmoe.util.stopping import Stop


@click.command()
@redis_options
@click.option("--host", default="127.0.0.1", show_default=True, metavar="TEXT",
              help="Address to listen on; 0.0.0.0 lets other machines ask, too.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, metavar="N",
              help="Port to listen on; 0 takes a free one.")  # fmt: skip
@click.option("--api-key", metavar="TEXT", help="Key that clients must send.  [default: none is asked for]")
@click.option("--interval", type=Duration(), default="5s", show_default=True, metavar="TIME",
              help="Time between two looks for new versions, like 5s.")  # fmt: skip
@options(AnswerSettings)
@log_options
def serve(
    redis: RedisSettings, host: str, port: int, api_key: str | None, interval: float, **values: Any
) -> None:
    """Answer with the gateway and the experts over an OpenAI-compatible endpoint, to try them out.

    `model` in a request is gateway, an expert or base; `system_fingerprint` in an answer is the version that gave it.
    It answers one request at a time, always with the newest versions. For many users, serve an export with vLLM.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.util.stopping import Stop, stop_on_signals

    if api_key is not None and not (api_key.strip() and api_key.isascii() and api_key.isprintable()):
        raise SettingsError(
            "--api-key must have printable ASCII characters only, and at least one: clients send it in a header; leave "
            "the option out to serve without a key",
            about="api_key",
        )
    with stop_on_signals(stop := Stop()):
        _serve(stop, redis, made(AnswerSettings, values), host, port, api_key or "", interval)


def _serve(
    stop: "Stop",
    redis: RedisSettings,
    settings: AnswerSettings,
    host: str,
    port: int,
    api_key: str,
    interval_s: float,
) -> None:
    import logging

    from fedmoe.errors import RedisUnavailableError, SettingsError
    from fedmoe.util.backoff import Backoff
    from fedmoe.util.log import say

    try:
        from fedmoe.tools.http_server import HttpServer, reserve
        from fedmoe.tools.serve.app import Endpoint
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"serving needs {error.name}: install it with the extra `serve` (pip install 'fedmoe[serve]')",
            about="serve",
        ) from error

    stop.last_words = lambda: ("stopped", 0)
    with _listening(host, port):  # before minutes are spent on a large base model
        reserved = reserve(host, port)
    engine = _engine(stop, redis, settings)
    endpoint = Endpoint(engine, api_key=api_key)
    with _listening(host, port):
        server = HttpServer(endpoint.app, host, port, reserved=reserved)
    shown = f"[{host}]" if ":" in host else host
    say(f"answers on http://{shown}:{server.port}/v1: {', '.join(one.name for one in engine.models())}")
    stop.when_asked += [endpoint.closing.set, server.stop]
    backoff = Backoff("gateway", logging.getLogger(__name__))
    while not stop.wait(interval_s):
        try:
            engine.refresh()
            backoff.ok()
        except RedisUnavailableError as error:
            backoff.failed(error)
    server.join()


@contextmanager
def _listening(host: str, port: int) -> Iterator[None]:
    """Raise SettingsError if the address is taken or is not this machine's."""
    from fedmoe.errors import SettingsError

    try:
        yield
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port or --host",
            about="port",
        ) from error


@click.command()
@redis_options
@click.option("--model", default="", metavar="NAME",
              help="Model to ask: gateway, an expert, or base.  [default: gateway]")  # fmt: skip
@click.option("--temperature", type=click.FloatRange(0, 2), metavar="X",
              help="Temperature of the sampling; 0 takes the likeliest token.  [default: the model's own]")  # fmt: skip
@options(AnswerSettings)
def chat(redis: RedisSettings, model: str, temperature: float | None, **values: Any) -> None:
    """Chat with the gateway or an expert, line by line; each answer says which version gave it."""
    import sys

    from fedmoe.tools.serve.chat import HELP, Chat

    engine = _engine(None, redis, made(AnswerSettings, values), model)
    talk = Chat(engine, model, lambda text: click.echo(text, nl=False), temperature=temperature)
    if sys.stdin.isatty():
        click.echo(HELP)
    talk.run(_lines())


def _lines() -> Iterator[str]:
    """What is typed, or comes in by a pipe."""
    import sys

    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return


def _engine(stop: "Stop | None", redis: RedisSettings, settings: AnswerSettings, model: str = "") -> "Engine":
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.tools.serve.engine import Engine
    from fedmoe.util.log import say

    connection = Connection(redis)
    if stop:
        stop.when_asked.append(connection.cut_off)
    engine = Engine(GatewayStore(connection), settings, report=partial(say, err=True), wanted=model)
    engine.refresh()
    return engine
