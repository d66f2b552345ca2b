"""The list of rights (store/permissions.py) is what real runs send, no less and no more; ACL users prove it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from consumers.create import SpecRequest, ensure_experts
from consumers.daemon import Aggregator
from consumers.gateway.builder import GatewayBuilder
from consumers.recovery.write_back import write_back
from fedmoe.errors import RedisUnavailableError, RedisUnfitError, RemovedExpertError, UnknownExpertError
from fedmoe.protocol.beat import Beat
from fedmoe.protocol.fit import Fit
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.merged import MergedMeta
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import NESTEROV, RuleSet
from fedmoe.protocol.vectors import WITHHELD, DomainVector
from fedmoe.settings import AggregatorSettings, GatewaySettings, WorkerSettings
from fedmoe.store.backup import BackupStore
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.lease import Lease
from fedmoe.store.permissions import (
    AGGREGATOR,
    MONITOR,
    OPERATOR,
    ROLES,
    WORKER,
    acl_rules,
    worker_rights,
)
from fedmoe.store.probe import eviction_warning
from fedmoe.store.problems import Problems
from fedmoe.store.remove import look_at_expert, remove_expert
from fedmoe.store.rights import require
from fedmoe.store.worker import WorkerStore
from fedmoe.tools.dashboard.watcher import Watcher
from fedmoe.util.stopping import Stop
from producers.worker import Worker
from tests.errors import raises
from tests.federation import ScriptedWorker, aggregating, make_expert, serve, serving, small_spec
from tests.guarded import EXPERT, KEYS, NAME, Guarded, rights_of
from tests.processes import eventually
from tests.recorder import Sent, idle, missing


@pytest.fixture
def guarded(server: EmbeddedRedis) -> Iterator[Guarded]:
    with ExitStack() as stack:
        own = stack.enter_context(EmbeddedRedis(server=server.server, options=["--appendonly", "no"]))
        yield Guarded(own, stack)


def write_rows(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"n {n}", "completion": str(n)}) + "\n" for n in range(20)))
    return path


def run_in_thread(target: Callable[[Stop], None], stack: ExitStack) -> None:
    """Run `target` until the stack ends."""
    stop = Stop()
    thread = threading.Thread(target=target, args=(stop,), daemon=True)
    thread.start()
    stack.callback(thread.join, 20.0)
    stack.callback(stop.set)


def test_what_real_runs_send_is_what_is_listed(
    guarded: Guarded, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Aggregator, worker, and all commands, each as its own user: nothing is refused, and nothing listed is unused."""
    request = SpecRequest(
        base_model=str(tiny_model_dir), lora=LoraSettings(rank=2), rules=RuleSet(sync_interval_s=0.3)
    )
    store, kept = GatewayStore(guarded.admin), tmp_path / "kept"
    with ExitStack() as stack:
        require(guarded.connection(AGGREGATOR), AGGREGATOR, [EXPERT])
        assert eviction_warning(guarded.connection(AGGREGATOR)) == ""
        ensure_experts(guarded.connection(AGGREGATOR), {EXPERT: 1.0}, request)
        daemon = Aggregator(
            guarded.settings(AGGREGATOR), [EXPERT], AggregatorSettings(lease_s=1.0, keep_updates=kept),
            GatewaySettings(interval_s=0.2), holder="one",
        )  # fmt: skip
        run_in_thread(daemon.run, stack)
        settings = WorkerSettings(
            stream=EXPERT, name=NAME, data=write_rows(tmp_path / "rows"), device="cpu", max_steps=30
        )
        Worker(guarded.settings(WORKER), settings, stop=Stop(), report=lambda _: None).run()
        assert store.meta(EXPERT).applied
        guarded.admin.client.xadd(f"fedmoe:{{{EXPERT}}}:updates", {"garbage": "1"})
        eventually("a dead letter", lambda: store.meta(EXPERT).garbage)
        eventually("the gateway", lambda: store.merged().experts[EXPERT].version)
        guarded.admin.client.hset(f"fedmoe:{{{EXPERT}}}:worker:another", "run", "1-00000000")
        guarded.fedmoe(MONITOR, "status")
        Watcher(guarded.settings(MONITOR), interval_s=1.0).look()  # what `fedmoe dashboard` sends
        guarded.fedmoe(MONITOR, "gateway", "show", "--no-compare")
        guarded.fedmoe(OPERATOR, "status")
        guarded.fedmoe(OPERATOR, "backup", str(tmp_path / "backup"))
        guarded.fedmoe(OPERATOR, "verify", "--keep-updates", str(kept))
        assert "exact" in guarded.fedmoe(OPERATOR, "gateway", "show")
        guarded.fedmoe(OPERATOR, "gateway", "export", "--out", str(tmp_path / "gateway"))
        guarded.fedmoe(OPERATOR, "gateway", "follow", "--dir", str(tmp_path / "versions"), "--once")
    guarded.fedmoe(OPERATOR, "restore", str(tmp_path / "backup"), "--replace")
    assert guarded.denied() == []
    rights = {name: rights_of(role) for name, role in ROLES.items()}
    sent = {name: guarded.sent(role) for name, role in ROLES.items()}
    nothing: dict[str, list[Sent]] = {name: [] for name in ROLES}
    assert {name: missing(sent[name], rights[name]) for name in ROLES} == nothing
    ordinary = {name: [right for right in rights[name] if not right.when] for name in ROLES}
    assert {name: idle(sent[name], ordinary[name]) for name in ROLES} == nothing


def test_the_gateway_needs_no_other_rights(guarded: Guarded, tmp_path: Path, tiny_model_dir: Path) -> None:
    """An aggregator creates and serves it, an operator switches it, a worker with its ACL line trains both."""
    rules = acl_rules(worker_rights(KEYS, EXPERT, NAME, trains_gateway=True))
    guarded.admin.client.execute_command("ACL", "SETUSER", WORKER.name, "reset", "on", ">pw", *rules)
    rules_of_both = RuleSet(sync_interval_s=0.3, train="both")
    request = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=2), rules=rules_of_both)
    store = GatewayStore(guarded.admin)
    with ExitStack() as stack:
        ensure_experts(guarded.connection(AGGREGATOR), {EXPERT: 1.0}, request)
        daemon = Aggregator(
            guarded.settings(AGGREGATOR), [EXPERT], AggregatorSettings(lease_s=1.0),
            GatewaySettings(interval_s=0.2), holder="one",
        )  # fmt: skip
        run_in_thread(daemon.run, stack)
        settings = WorkerSettings(
            stream=EXPERT, name=NAME, data=write_rows(tmp_path / "rows"), device="cpu", max_steps=30
        )
        said: list[str] = []
        Worker(guarded.settings(WORKER), settings, stop=Stop(), report=said.append).run()
        assert not any(line.endswith("alone") for line in said)
        assert min(store.meta(name).applied for name in (EXPERT, GATEWAY)) > 0
        guarded.fedmoe(OPERATOR, "expert", "remove", GATEWAY, "--yes")
        assert "created the gateway" in guarded.fedmoe(
            OPERATOR, "expert", "set", EXPERT, "--train", "expert"
        ) + (guarded.fedmoe(OPERATOR, "expert", "set", EXPERT, "--train", "gateway"))
    assert guarded.denied() == []


def test_what_is_listed_for_rarer_situations_is_sent_in_them(
    guarded: Guarded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Large weights, a full Redis, an emptied one, a standby, a blocked stream: nothing is refused then either."""
    monkeypatch.setattr("fedmoe.store.chunks.IN_PLACE_BYTES", 1)  # all weights are large
    monkeypatch.setattr("consumers.recovery.settle.CLAIM_WAIT_S", 0.1)
    for wire_format in ("fp32", "int8"):
        commit_and_pull(guarded, wire_format)
    a_standby_and_a_lease_for_ever(guarded)
    an_emptied_redis(guarded)
    an_operator_who_changes_things(guarded)
    a_fitted_gateway(guarded)
    an_operator_who_goes_back(guarded, tmp_path / "backup")
    a_removed_expert(guarded)
    an_operator_who_enrols(guarded, tmp_path)
    monkeypatch.setattr("fedmoe.protocol.weights_parts.WHOLE_BYTES", 100)
    commit_and_pull(guarded, "int8")
    an_operator_who_goes_back(guarded, tmp_path / "backup-of-parts")
    monkeypatch.setattr("fedmoe.store.gateway.WHOLE_BYTES", 100)
    a_merged_gateway_in_parts(guarded)
    assert guarded.denied() == []
    nothing: dict[str, list[Sent]] = {name: [] for name in ROLES}
    assert {name: missing(guarded.sent(role), rights_of(role)) for name, role in ROLES.items()} == nothing
    rare = {name: [right for right in rights_of(role) if right.when] for name, role in ROLES.items()}
    if "valkey_version" in guarded.admin.client.info("server"):  # reads in a MULTI also when it is full
        rare = {
            name: [r for r in rights if not (r.when == "Redis is full" and r.command in ("WATCH", "UNWATCH"))]
            for name, rights in rare.items()
        }
    assert {name: idle(guarded.may_have_sent(role), rare[name]) for name, role in ROLES.items()} == nothing


def commit_and_pull(guarded: Guarded, wire_format: str) -> None:
    """Apply updates under a server optimizer and pull, also while Redis is full; restore its state."""
    admin, spec = guarded.admin.client, small_spec(wire_format=wire_format)
    admin.flushall()
    expert = make_expert(
        guarded.connection(AGGREGATOR), spec=spec, rules=aggregating(server_optimizer=NESTEROV)
    )
    expert.store.register(2.0, overwrite=True)
    worker = ScriptedWorker(guarded.connection(WORKER), spec, NAME)
    worker.ledger.vector = DomainVector(rows=1, values=bytes(16))
    worker.push(0.1)
    assert serve(expert) == ["applied"]
    worker.pull()
    worker.store.pull_exact(spec)
    expert.load()
    expert.store.condition()
    worker.ledger.vector, worker.ledger.has_told = WITHHELD, False
    worker.train(0.1)
    update = worker.make_update()
    entry = worker.publish()
    admin.config_set("maxmemory", 1)
    assert worker.store.poll(entry, update.header).entry_waits
    assert serve(expert) == ["applied"]
    worker.pull()
    worker.train(0.1)
    worker.make_update()
    with raises(RedisUnavailableError, about="maxmemory"):
        worker.publish()
    admin.delete(expert.store.keys.updates)
    expert.load()
    assert expert.store.claim("one", 1) == (True, "one")
    assert write_back(expert, on=expert.meta.commit)
    expert.load()
    backups = BackupStore(guarded.connection(OPERATOR))
    state = backups.read(EXPERT)
    admin.config_set("maxmemory", 0)
    assert state.server_state is not None
    backups.write(EXPERT, state, gateway_weight="1", replace=True)
    admin.rename(expert.store.keys.decided, "kept")
    admin.set(expert.store.keys.decided, "overwritten")
    admin.config_set("maxmemory", 1)
    for read in (lambda: worker.store.poll(entry, update.header), lambda: backups.read(EXPERT)):
        with raises(RedisUnfitError, about="key"):
            read()
    admin.config_set("maxmemory", 0)
    admin.rename("kept", expert.store.keys.decided)
    worker.store.pull_exact(spec)
    expert.store.announce(NAME, update.header, update.parts)


def a_standby_and_a_lease_for_ever(guarded: Guarded) -> None:
    """Two aggregators, a lease that was set by hand, and a stream that takes no entry any more."""
    store = ExpertStore(guarded.connection(AGGREGATOR), EXPERT)
    one, two = (
        Lease(guarded.connection(AGGREGATOR), store.keys.lease, holder=name, ttl_ms=5000)
        for name in ("one", "two")
    )
    assert one.hold()
    guarded.admin.client.persist(store.keys.lease)
    assert not two.hold()
    assert guarded.admin.client.pttl(store.keys.lease) > 0
    one.release()
    guarded.admin.client.xadd(store.keys.updates, {"rival": "1"}, id=f"{2**64 - 1}-{2**64 - 1}")
    guarded.admin.client.xtrim(store.keys.updates, maxlen=0)
    assert store.mend()
    for keys in (store.keys, KEYS.merged):
        problems = Problems(store.connection, keys.problem, holder="one")
        problems.report("no room")
        assert guarded.admin.client.hgetall(keys.problem) == {b"one": b"no room"}
        problems.solved()


def an_emptied_redis(guarded: Guarded) -> None:
    """The aggregator writes back what it remembers; a worker of an expert that is gone is told so."""
    store = ExpertStore(guarded.connection(AGGREGATOR), EXPERT)
    with serving(guarded.connection(AGGREGATOR)) as served:
        eventually("the expert in memory", lambda: served.server.is_serving)
        guarded.admin.client.flushall()
        eventually("the expert", lambda: guarded.admin.client.exists(store.keys.meta))
    guarded.admin.client.flushall()
    store.mark_lost({NAME: "0123456789abcdef"})
    assert store.lost() == {NAME: "0123456789abcdef"}
    worker = WorkerStore(guarded.connection(WORKER), EXPERT, NAME)
    worker.beat(Beat(lineage="0123456789abcdef"), ttl_s=15)
    assert worker.seen
    assert worker.seen.is_served is False
    assert store.lineages() == store.lost()
    with pytest.raises(UnknownExpertError):
        worker.spec()


def an_operator_who_changes_things(guarded: Guarded) -> None:
    """Rules, also while Redis is full; a gateway weight; and a new expert, under whose name somebody joins already."""
    guarded.admin.client.flushall()
    make_expert(guarded.connection(AGGREGATOR))
    guarded.fedmoe(OPERATOR, "expert", "set", EXPERT, "--lr", "0.5")
    guarded.admin.client.config_set("maxmemory", 1)
    guarded.fedmoe(OPERATOR, "expert", "set", EXPERT, "--lr", "0.25")
    guarded.admin.client.config_set("maxmemory", 0)
    guarded.fedmoe(OPERATOR, "expert", "hold", EXPERT)
    guarded.fedmoe(OPERATOR, "expert", "release", EXPERT)
    guarded.fedmoe(OPERATOR, "expert", "weight", EXPERT, "2")
    WorkerStore(guarded.admin, "added", NAME).beat(Beat(run="1-00000000"), ttl_s=15)
    guarded.fedmoe(OPERATOR, "expert", "add", "added")
    assert "added" in guarded.fedmoe(MONITOR, "expert", "list")
    assert "0.25" in guarded.fedmoe(OPERATOR, "expert", "show", EXPERT)


def a_fitted_gateway(guarded: Guarded) -> None:
    """An operator fits the merged gateway; Redis loses the fit, and the aggregator writes it again."""
    operator, aggregator = (GatewayStore(guarded.connection(role)) for role in (OPERATOR, AGGREGATOR))
    assert operator.fit() is None
    operator.write_fit(fit := Fit(weights='{"a": [1.0]}', fitted_at=1.5))
    assert aggregator.fit() == fit
    guarded.admin.client.delete(KEYS.merged.fit)
    assert aggregator.put_back_fit(fit)
    assert operator.fit() == fit


def test_who_may_only_watch_is_told_what_is_not_shown(guarded: Guarded) -> None:
    """The other merge methods' errors need the experts' weights, which a monitor may not read."""
    make_expert(guarded.admin)
    GatewayBuilder(guarded.admin, GatewaySettings(method="average"), holder="one", lease_s=1.0).refresh()
    lines = guarded.fedmoe(MONITOR, "gateway", "show").splitlines()
    assert [line.startswith("the merge methods are not compared: ") for line in lines].count(True) == 1


def a_merged_gateway_in_parts(guarded: Guarded) -> None:
    """Built twice by the aggregator, which then looks for its parts; read by an operator."""
    store = GatewayStore(guarded.connection(AGGREGATOR))
    meta = MergedMeta(built_from='{"a": {"version": 1, "weights_commit": "c"}}')
    for value in (1, 2):
        store.write_merged(meta, memoryview(bytes([value]) * 200))
    loaded = GatewayStore(guarded.connection(OPERATOR)).load_merged()
    assert loaded is not None
    assert loaded[1] == bytes([2]) * 200
    assert store.has_weights(loaded[0])


def an_operator_who_goes_back(guarded: Guarded, backup: Path) -> None:
    """An expert is rolled back to a version that a backup holds, also while Redis is full."""
    guarded.admin.client.flushall()
    spec = small_spec(wire_format="int8")
    rules = aggregating(server_optimizer=NESTEROV)
    expert = make_expert(guarded.connection(AGGREGATOR), spec=spec, rules=rules)
    worker = ScriptedWorker(guarded.connection(WORKER), spec, NAME)
    worker.push(0.1)
    assert serve(expert) == ["applied"]
    guarded.fedmoe(OPERATOR, "backup", str(backup))
    worker.pull()
    worker.push(0.1)
    assert serve(expert) == ["applied"]
    rollback = ("expert", "rollback", EXPERT, "--to", "1", "--from", str(backup))
    assert "version 3 has the weights of version 1" in guarded.fedmoe(OPERATOR, *rollback)
    guarded.admin.client.config_set("maxmemory", 1)
    assert "version 4 has the weights of version 1" in guarded.fedmoe(OPERATOR, *rollback)
    guarded.admin.client.config_set("maxmemory", 0)
    assert "rolled back" in guarded.fedmoe(OPERATOR, "status")


def an_operator_who_enrols(guarded: Guarded, directory: Path) -> None:
    """And revokes, and reads who did so; this server has no ACL file, so a revocation ends with an error."""
    who = ("w2", "--stream", EXPERT)
    guarded.fedmoe(OPERATOR, "worker", "enrol", *who, "--out", str(directory / "w2.toml"))
    with raises(RedisUnavailableError, about="nodes"):
        guarded.fedmoe(OPERATOR, "worker", "revoke", *who)
    assert "revoked" in guarded.fedmoe(OPERATOR, "operator", "audit")


def a_removed_expert(guarded: Guarded) -> None:
    """An operator takes an expert away that is served and trained, and somebody lists it again."""
    guarded.admin.client.flushall()
    expert = make_expert(guarded.connection(AGGREGATOR))
    worker = ScriptedWorker(guarded.connection(WORKER), small_spec(), NAME)
    worker.store.beat(Beat(run="1-00000000"), ttl_s=15)
    worker.push(0.1)
    operator = guarded.connection(OPERATOR)
    assert look_at_expert(operator, EXPERT).workers == (NAME,)
    remove_expert(operator, EXPERT)
    for role in (MONITOR, OPERATOR):
        guarded.fedmoe(role, "status")
    for read in (worker.store.spec, worker.store.meta, expert.store.spec):
        with pytest.raises(RemovedExpertError):
            read()
    guarded.admin.client.hset(KEYS.experts, EXPERT, "1")
    gateway = GatewayBuilder(expert.store.connection, GatewaySettings(), holder="one", lease_s=1.0)
    gateway.refresh()
    assert not guarded.admin.client.exists(KEYS.experts)
    assert expert.store.create(expert.spec, expert.meta, expert.buffer.file, though_removed=True)
