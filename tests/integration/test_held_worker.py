"""A worker whose update waits, because its expert is held."""

from pathlib import Path

import pytest

from fedmoe.store.change import change_rules_soon, hold, release, soon
from fedmoe.store.connection import Connection
from tests.counting import CountingWorker, counting_spec, create_expert
from tests.federation import serving
from tests.processes import eventually

pytestmark = pytest.mark.one_server


def test_it_takes_up_new_rules_while_its_update_waits(connection: Connection, tmp_path: Path) -> None:
    """An operator holds an expert to change a rule, and the training goes on; the update is not sent again for that."""
    spec = counting_spec()
    store = create_expert(connection, spec)
    with serving(connection, keep_updates=tmp_path), CountingWorker(connection, spec) as worker:
        eventually("a version", lambda: store.load().meta.version)
        soon(lambda: hold(store, "the learning rate is too high"))
        eventually("an update that waits", lambda: worker.sync.status.problem and worker.sync.outbox.entry)
        waits = worker.sync.outbox.entry
        change_rules_soon(store, {"learning_rate": 1e-5})
        eventually("the new rules", lambda: worker.sync.ledger.meta.rules.training.learning_rate == 1e-5)
        assert worker.sync.outbox.entry == waits
        soon(lambda: release(store))
        worker.finish()
    meta = store.load().meta
    assert (meta.duplicate, meta.refused, len(worker.sync.ledger.queue)) == (0, 0, 0)
