"""A federation as `fedmoe status` sees it, and what there is to see."""

from consumers.gateway.builder import GatewayBuilder
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.federation import Federation
from fedmoe.protocol.records import HEARTBEAT_TTL_S
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.inspect import Inspector
from fedmoe.store.lease import Lease
from tests.federation import ScriptedWorker, make_expert, serve, small_spec

BEAT = Beat(
    run="1-00000000", host="lab", pid=7, since=1700000000, step=12, loss=1.25, tokens_per_s=310.5, base_version=1,
    staleness=0, in_flight=3, published=3, refused=1,
)  # fmt: skip


def look(connection: Connection) -> Federation:
    return Inspector(connection).federation()


def hold(connection: Connection, holder: str = "agg-1") -> None:
    for name in ("sql_expert", "merged"):
        Lease(connection, f"fedmoe:{{{name}}}:lease", holder=holder, ttl_ms=60_000).hold()


def some_updates(connection: Connection) -> None:
    """Two updates applied, one refused, one waiting, a worker with a heartbeat, a gateway of an older version."""
    expert = make_expert(connection)
    hold(connection)
    alice, bob = ScriptedWorker(connection, small_spec()), ScriptedWorker(connection, small_spec(), "bob")
    alice.push(0.5)
    serve(expert)
    build_gateway(connection)
    alice.pull()
    bob.push(0.25)
    alice.push(1e6)
    assert serve(expert) == ["applied", "refused"]
    alice.pull()
    alice.push(0.5)
    alice.store.beat(BEAT, ttl_s=HEARTBEAT_TTL_S - 4)


def build_gateway(connection: Connection) -> bool:
    return GatewayBuilder(connection, GatewaySettings(), holder="agg-1", lease_s=5.0).refresh()
