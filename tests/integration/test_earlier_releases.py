"""Beside workers and aggregators of an earlier release: what they do not know is not used."""

import threading

import pytest

from consumers.aggregator import ExpertServer
from consumers.expert import Expert
from fedmoe.protocol import features
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.update import Header
from fedmoe.settings import AggregatorSettings
from fedmoe.store.connection import Connection
from fedmoe.store.worker import WorkerStore
from tests.federation import ScriptedWorker, make_expert, serve, small_spec

pytestmark = pytest.mark.one_server

SPEC = small_spec()
RULES = RuleSet(sync_interval_s=0.05)


@pytest.fixture
def expert(connection: Connection) -> Expert:
    return make_expert(connection, spec=SPEC, rules=RULES)


def forget_quick_digests(expert: Expert) -> None:
    """As an aggregator of an earlier release does it."""
    known = features.FEATURES - {features.QUICK_DIGESTS}
    expert.store.connection.client.hset(
        expert.store.keys.meta, mapping={"knows": " ".join(sorted(known)), "commit": "earlier"}
    )


def test_the_digests_that_the_aggregators_know(expert: Expert, connection: Connection) -> None:
    """Also if an earlier aggregator takes over while an update is in flight: it is sent again as that one reads it."""
    worker = ScriptedWorker(connection, SPEC)
    update = worker.push(1.0)

    def sent() -> Header:
        return Header.unpack(connection.client.get(expert.store.keys.header("alice", *update.id)))

    assert [len(part.digest) for part in sent().parts] == [16]
    assert sent().requires == features.QUICK_DIGESTS
    entry = worker.publish()
    forget_quick_digests(expert)
    assert worker.store.poll(entry, update.header).entry_waits
    worker.publish()
    assert [len(part.digest) for part in sent().parts] == [32]
    assert sent().requires == ""
    expert.load()
    assert serve(expert) == ["applied", "duplicate", "duplicate"]
    change = worker.pull()
    assert change.how is not None
    assert change.how.how == "applied"


def test_no_copies_while_a_worker_of_an_earlier_release_is_there(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    """An upgraded aggregator serves old workers without a tail; it begins one after the last of them is upgraded.

    The workers of the release before know tails, but not that their parts are copies.
    """
    expert, now = make_expert(connection, spec=small_spec(wire_format="int4")), 100.0
    settings = AggregatorSettings(lease_s=4.0, burst=True)
    server = ExpertServer(connection, "sql_expert", settings, holder="h", clock=lambda: now)
    old, new = (WorkerStore(connection, "sql_expert", name) for name in ("old", "new"))
    alice = ScriptedWorker(connection, expert.spec)
    caplog.set_level("INFO")

    def requires() -> str:
        alice.push(0.1)
        server.turn(threading.Event())
        alice.pull()
        return alice.store.meta().requires

    old.beat(Beat(run="1-00000000", knows=f"{features.HOLD} {features.TAIL}"), ttl_s=60)
    assert requires() == ""
    assert not connection.client.exists(expert.store.keys.tail)
    old.leave()
    new.beat(Beat(run="1-00000000", knows=features.features_text()), ttl_s=60)
    assert requires() == ""
    now += 5.0
    assert requires() == f"{features.COPIES} {features.TAIL}"
    old.beat(Beat(run="1-00000000"), ttl_s=60)
    now += 5.0
    assert requires() == f"{features.COPIES} {features.TAIL}"
    told = [message for message in caplog.messages if "earlier release" in message]
    assert told == [
        "sql_expert: each commit writes the weights until workers of an earlier release are upgraded: old"
    ]
