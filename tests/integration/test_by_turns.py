"""A worker that trains its expert and the gateway by turns: two complete ledgers, with a trainer that counts."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedmoe.errors import FedMoEError, ProtocolError, RedisUnfitError, RemovedExpertError
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.vectors import WITHHELD, DomainVector, width_of
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.store.change import change_rules_soon, hold, release
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.permissions import WORKER, acl_rules
from fedmoe.store.remove import remove_expert
from fedmoe.util.stopping import Stop
from producers.checkpoint import name_in
from producers.worker import Worker
from tests.chaos.actors import EXPERTS, prepare
from tests.errors import raises
from tests.federation import make_expert, serving, small_spec
from tests.processes import eventually

pytestmark = pytest.mark.one_server

EXPERT = "tiny"
BOTH = RuleSet(train="both", sync_interval_s=0.2)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 10)
    return path


class Federation:
    """An expert and the gateway, both served, and what its worker reports."""

    def __init__(self, connection: Connection, rows: Path, tmp_path: Path) -> None:
        self.connection, self.rows, self.state = connection, rows, tmp_path / "state"
        self.store = GatewayStore(connection)
        self.said: list[str] = []
        self.aggregator_of_gateway = ExitStack()

    def worker(
        self,
        *,
        stop: Stop | None = None,
        redis: RedisSettings | None = None,
        vector: DomainVector | None = None,
        **settings: object,
    ) -> Worker:
        wanted = {
            "stream": EXPERT,
            "data": self.rows,
            "name": "alice",
            "wait": False,
            "log_interval_s": 0.0,
        } | settings
        return Worker(
            redis or self.connection.settings, WorkerSettings(**wanted),
            stop=stop or Stop(), report=self.said.append,
            prepare=lambda *given, **more: replace(prepare(*given, **more), vector=vector),
        )  # fmt: skip

    @contextmanager
    def training(self, **settings: object) -> Iterator[list[BaseException]]:
        """A worker that trains until the end of the block; yields the errors with which it ended, if any."""
        stop, errors = Stop(), list[BaseException]()

        def run() -> None:
            try:
                self.worker(stop=stop, **settings).run()
            except FedMoEError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            eventually("both are trained", lambda: min(self.examples()) > 0)
            yield errors
        finally:
            stop.set()
            thread.join()

    def examples(self) -> tuple[int, int]:
        """How many steps the expert and the gateway consist of."""
        return self.store.meta(EXPERT).n_examples, self.store.meta(GATEWAY).n_examples


@pytest.fixture
def served(
    connection: Connection, connect: Callable[[], Connection], rows: Path, tmp_path: Path
) -> Federation:
    federation = Federation(connection, rows, tmp_path)
    with ExitStack() as stack, federation.aggregator_of_gateway:
        for name, rules, aggregator in (
            (EXPERT, BOTH, stack),
            (GATEWAY, replace(BOTH, train="expert"), federation.aggregator_of_gateway),
        ):
            make_expert(connection, name, EXPERTS[EXPERT], rules=rules)
            aggregator.enter_context(serving(connect(), expert=name, block_ms=20))
        yield federation


def test_each_gets_half_of_the_steps_and_has_its_own_books(served: Federation) -> None:
    """Every step counts once, in one of the two; the gateway's log names the worker's expert."""
    served.worker(max_steps=20).run()
    assert served.examples() == (10, 10)
    lines = served.store.history(GATEWAY)[2]
    assert {line["worker"] for line in lines} == {"tiny.alice"}
    assert "training tiny and gateway by turns, a step each" in served.said
    ends = [line for line in served.said if ": done: " in line]
    for end, name in zip(ends, (EXPERT, GATEWAY), strict=True):
        version = served.store.meta(name).version
        assert end == f"{name}: done: updates applied: {version}, refused: 0; expert at version {version}"
    assert any(line.startswith("gateway: step ") for line in served.said)


def test_one_alone_by_the_rule(served: Federation) -> None:
    """`train gateway`: the expert learns nothing, and every line names the gateway; `train expert`: as ever."""
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "gateway"})
    served.worker(max_steps=6).run()
    assert served.examples() == (0, 6)
    assert any(line.startswith("gateway: done: ") for line in served.said)
    served.said.clear()
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "expert"})
    served.worker(max_steps=6, name="bob").run()
    assert served.examples() == (6, 6)
    assert not any(line.startswith(("tiny: ", "gateway: ")) for line in served.said)


@pytest.mark.parametrize("has_state", [True, False])
def test_worker_that_ends_on_a_held_expert_does_not_wait_for_it(served: Federation, has_state: bool) -> None:
    """The update waits until the release, in Redis or in the state directory; how the worker left is recorded."""
    hold(ExpertStore(served.connection, GATEWAY), "why")
    began = time.monotonic()
    served.worker(max_steps=2, drain_s=60.0, state_dir=served.state if has_state else None).run()
    assert time.monotonic() - began < 30
    (end,) = (line for line in served.said if line.startswith("gateway: done: "))
    assert (" is kept in " if has_state else " waits in Redis until the expert is released") in end
    for name, worker in ((EXPERT, "alice"), (GATEWAY, "tiny.alice")):
        trace = served.connection.client.hgetall(served.connection.keys.expert(name).trace(worker))
        assert trace[b"how"] == b"finished"
    release(ExpertStore(served.connection, GATEWAY))
    if has_state:
        served.worker(max_steps=2, state_dir=served.state).run()
    eventually("the update that waited", lambda: served.examples() == ((2, 2) if has_state else (1, 1)))


def test_one_chain_brings_the_domain_vector(served: Federation) -> None:
    """The expert's if it is trained, else the gateway's; a worker that withholds it takes it back from both."""

    def told() -> tuple[set[str], set[str]]:
        return set(served.store.vectors(EXPERT)), set(served.store.vectors(GATEWAY))

    vector = DomainVector(rows=4, values=bytes(2 * (width_of(EXPERTS[EXPERT]) or 8)))
    served.worker(max_steps=6, vector=vector).run()
    assert told() == ({"alice"}, set())
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "gateway"})
    served.worker(max_steps=6, name="bob", vector=vector).run()
    assert told() == ({"alice"}, {"tiny.bob"})
    served.said.clear()
    served.worker(max_steps=2, name="alice", domain_vector=False, vector=WITHHELD).run()
    said = "if an earlier start published a domain vector on tiny, it stays there, because this worker"
    assert any(line.startswith(said) for line in served.said)
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "both"})
    for name in ("alice", "bob"):
        served.worker(max_steps=6, name=name, vector=WITHHELD).run()
    assert told() == (set(), set())


def test_restart_resumes_both(served: Federation) -> None:
    """From the checkpoints of one state directory, under the name that is in it, also where only the gateway's is."""
    served.worker(max_steps=10, state_dir=served.state).run()
    assert (name_in(served.state), name_in(served.state / GATEWAY)) == ("alice", "tiny.alice")
    served.said.clear()
    served.worker(max_steps=10, state_dir=served.state, name="").run()
    resumed = [line.split()[4] for line in served.said if line.startswith("resuming run")]
    assert resumed == [EXPERT, GATEWAY]
    assert served.said[0].startswith("worker 'alice' of expert 'tiny' (name from the checkpoint in ")
    assert served.examples() == (10, 10)
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "gateway"})
    served.worker(max_steps=4, state_dir=served.state / "other", name="bob").run()
    served.said.clear()
    served.worker(max_steps=4, state_dir=served.state / "other", name="").run()
    assert served.said[0].startswith("worker 'bob' of expert 'tiny' (name from the checkpoint in ")
    assert served.examples() == (10, 18)


@pytest.mark.parametrize(
    ("expert", "left", "counts"), [(EXPERT, "gateway", (0, 6)), (GATEWAY, "tiny", (6, 0))]
)
def test_worker_that_may_write_to_one_trains_that_one_and_says_so(
    served: Federation, expert: str, left: str, counts: tuple[int, int]
) -> None:
    """`expert` is the one that its user may not write to."""
    keys = served.connection.keys
    rights = [
        right for name, worker in ((EXPERT, "alice"), (GATEWAY, "tiny.alice")) for right in
        WORKER.rights(keys, name, worker) if not (name == expert and right.command in ("XADD", "SET", "HSET"))
    ]  # fmt: skip
    served.connection.client.execute_command(
        "ACL", "SETUSER", "w", "reset", "on", ">pw", *acl_rules(tuple(rights))
    )
    url = served.connection.settings.url.replace("unix://", "unix://w:pw@")
    served.worker(max_steps=6, redis=RedisSettings(url=url)).run()
    (said,) = [line for line in served.said if line.endswith("alone")]
    assert said.endswith(f"; this worker trains {left} alone")
    assert "XADD" in said
    assert served.examples() == counts


def test_worker_that_may_write_to_neither_is_told(served: Federation) -> None:
    """The sentence is that of its own expert."""
    rights = ("resetkeys", "~*", "-@all", "+@read", "+@transaction", "+@connection", "+info")
    served.connection.client.execute_command("ACL", "SETUSER", "w", "reset", "on", ">pw", *rights)
    url = served.connection.settings.url.replace("unix://", "unix://w:pw@")
    with raises(RedisUnfitError, about="rights"):
        served.worker(redis=RedisSettings(url=url)).run()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"removed": True}, "removed by an operator"),
        ({"base_fingerprint": "e" * 32}, "the base model, tokenizer or chat template does not match"),
        ({"damaged": True}, "damaged"),
    ],
)
def test_gateway_that_cannot_be_joined_leaves_the_expert(
    served: Federation, change: dict[str, object], reason: str
) -> None:
    """Removed, of another base model, damaged: one sentence, and the training goes on."""
    keys = served.connection.keys.expert(GATEWAY)
    if "removed" in change:
        remove_expert(served.connection, GATEWAY)
    elif "damaged" in change:
        served.aggregator_of_gateway.close()  # it would write it again
        served.connection.client.delete(keys.spec)
    else:
        served.connection.client.hset(keys.meta, mapping=change)
    served.worker(max_steps=4).run()
    (said,) = [line for line in served.said if line.endswith("; this worker trains tiny alone")]
    assert reason in said
    assert served.store.meta(EXPERT).n_examples == 4


def test_gateway_that_is_removed_while_it_is_trained_leaves_the_expert(
    served: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """The expert's training goes on without a pause; at the end the worker says what became of the gateway."""
    with served.training() as errors:
        remove_expert(served.connection, GATEWAY)
        eventually(
            "the drop is logged",
            lambda: "this worker trains tiny alone from now on" in caplog.text,
            timeout_s=30,
        )
        before = served.store.meta(EXPERT).version
        eventually("the expert goes on", lambda: served.store.meta(EXPERT).version > before + 2)
    assert [type(error) for error in errors] == [RemovedExpertError]


def test_gateway_made_anew_with_another_adapter_leaves_the_expert(
    served: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """It vanishes, and is there again with other targets: the worker trains the expert alone, and says so."""
    client = served.connection.client
    with served.training() as errors:
        client.delete(*client.keys("fedmoe:{gateway}:*"))
        make_expert(served.connection, GATEWAY, small_spec())
        left = "gateway is trained no more (expert 'gateway' was created again with another spec: restart this worker)"
        eventually("the drop is logged", lambda: left in caplog.text, timeout_s=30)
        before = served.store.meta(EXPERT).version
        eventually("the expert goes on", lambda: served.store.meta(EXPERT).version > before + 2)
    assert [error.about for error in errors if isinstance(error, FedMoEError)] == ["spec"]


def test_change_of_the_rule_takes_effect_at_the_next_start(
    served: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """A running worker says so; one that was started since does not."""
    caplog.set_level("INFO")
    text = "train both -> expert; train takes effect when this worker is started again"
    with served.training(state_dir=served.state):
        change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "expert"})
        eventually("the change is logged", lambda: text in caplog.text)
        before = served.store.meta(GATEWAY).version
        eventually("the gateway goes on", lambda: served.store.meta(GATEWAY).version > before)
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "both"})
    caplog.clear()
    served.worker(max_steps=2, state_dir=served.state).run()
    assert "train expert -> both" in caplog.text
    assert "takes effect" not in caplog.text


@pytest.mark.parametrize("spoil", ["garbage", "another worker's"])
def test_checkpoint_of_the_gateway_that_cannot_be_used_leaves_the_expert(
    served: Federation, spoil: str
) -> None:
    """One sentence that names it; the expert is trained."""
    served.worker(max_steps=6, state_dir=served.state).run()
    file = served.state / GATEWAY / "worker.safetensors"
    if spoil == "garbage":
        file.write_bytes(b"garbage")
    else:
        served.worker(max_steps=2, name="bob", state_dir=served.state / "bob").run()
        file.write_bytes((served.state / "bob" / GATEWAY / "worker.safetensors").read_bytes())
    before = served.examples()
    served.said.clear()
    served.worker(max_steps=4, state_dir=served.state).run()
    (said,) = [line for line in served.said if line.endswith("; this worker trains tiny alone")]
    assert str(file) in said or "bob" in said
    assert served.examples() == (before[0] + 4, before[1])


def test_gateway_of_a_later_release_leaves_the_expert(
    served: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with a state directory: the gateway's sync writes its last checkpoint without waiting for a step."""
    meta = served.connection.keys.expert(GATEWAY).meta

    def is_noticed() -> bool:
        served.connection.client.hset(
            meta, "requires", "quantum"
        )  # this release's next commit writes over it
        return "this worker trains tiny alone from now on" in caplog.text

    with served.training(state_dir=served.state) as errors:
        eventually("the drop is logged", is_noticed, timeout_s=30)
        before = served.store.meta(EXPERT).version
        eventually("the expert goes on", lambda: served.store.meta(EXPERT).version > before + 2)
    assert [type(error) for error in errors] == [ProtocolError]
    view = {expert.name: expert.left for expert in Inspector(served.connection).federation().experts}
    assert [(gone.name, gone.how) for gone in view[EXPERT]] == [("alice", "stopped")]


def test_gateway_that_is_away_for_a_moment_is_waited_for(served: Federation) -> None:
    """An aggregator that retains it writes it back meanwhile."""
    keys = served.connection.keys.expert(GATEWAY)
    held = {key: served.connection.client.dump(key) for key in (keys.meta, keys.spec)}
    served.connection.client.delete(*held)

    def back() -> None:
        for key, content in held.items():
            served.connection.client.restore(key, 0, content, replace=True)

    timer = threading.Timer(1.0, back)
    timer.start()
    served.worker(max_steps=4).run()
    timer.join()
    assert not any(line.endswith("alone") for line in served.said)
    assert served.examples()[0] == 2


def test_each_is_trained_for_its_own_epochs(served: Federation) -> None:
    """One that is ahead, because it was trained alone before, waits for the other."""
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "expert"})
    served.worker(max_epochs=1, state_dir=served.state).run()
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "both"})
    served.worker(max_epochs=1.5, state_dir=served.state).run()
    assert served.examples() == (15, 15)


def test_checkpoint_of_what_is_not_trained_now_is_named(served: Federation) -> None:
    """What it holds is not lost, and not sent."""
    served.worker(max_steps=4, state_dir=served.state).run()
    change_rules_soon(ExpertStore(served.connection, EXPERT), {"train": "expert"})
    served.said.clear()
    served.worker(max_steps=2, state_dir=served.state).run()
    (said,) = [line for line in served.said if " rests: " in line]
    assert said.startswith(f"the checkpoint of gateway in {served.state / GATEWAY} rests: ")


def test_rows_follow_the_rules_of_what_is_trained(
    served: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the expert, if both are: a change of the gateway's max_length promises nothing then."""
    caplog.set_level("INFO")
    with served.training():
        change_rules_soon(ExpertStore(served.connection, GATEWAY), {"max_length": 64, "lr": 0.5})
        eventually("the change is logged", lambda: "lr 1 -> 0.5" in caplog.text)
    assert "takes effect" not in caplog.text
