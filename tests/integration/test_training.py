"""producers.training: what was trained is published, however the training ends."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch

from fedmoe.errors import FedMoEError, RemovedExpertError, StoppedError, TooLittleMemoryError
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection
from fedmoe.store.remove import remove_expert
from fedmoe.util.stopping import Stop
from fedmoe.util.text import counted
from producers.checkpoint import StateDir
from producers.outbox import Outbox
from producers.training import Progress, Training, Turn
from tests.counting import Counter, Step, join
from tests.errors import raises
from tests.federation import make_expert, serving, small_spec

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
SPEC = small_spec()
RULES = RuleSet(aggregation=AggregationRules(max_norm=1e4), sync_interval_s=60.0)


class Failing(Counter):
    """A trainer that cannot go on after so many steps."""

    def __init__(self, weights: torch.Tensor, steps: int, error: Exception) -> None:
        super().__init__(weights)
        self._left, self._error = steps, error

    def compute(self) -> None:
        if self._left == 0:
            raise self._error
        self._left -= 1

    def apply(self, computed: None) -> Step:
        return self.step()


def make_training(
    connection: Connection,
    error: Exception,
    said: list[str],
    *,
    drain_s: float,
    stop: Stop | None = None,
    is_cut_off: bool = False,
) -> Training:
    progress = Progress()
    trainer = Failing(torch.zeros(SPEC.layout.numel), 7, error)
    member = join(connection.settings, trainer=trainer, training_fields=progress.fields)
    if is_cut_off:  # nothing that it would send arrives
        member.store.connection.cut_off()
    settings = WorkerSettings(stream="sql_expert", data=Path("rows.jsonl"), drain_s=drain_s)
    turn = Turn(expert="sql_expert", trainer=trainer, member=member, progress=progress)
    return Training([turn], settings, n_examples=100, stop=stop or Stop(), report=said.append)


@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (
            TooLittleMemoryError("not even one example fits", about="memory"),
            TooLittleMemoryError,
            "^not even one example fits$",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
            TooLittleMemoryError,
            r"allocate 2 GiB\): free memory on the device, or give another --device$",
        ),
        (ZeroDivisionError("a mistake in the program"), ZeroDivisionError, "mistake"),
    ],
)
def test_what_was_trained_is_published_before_it_ends(
    connect: Connect, error: Exception, raised: type[Exception], sentence: str
) -> None:
    """The expert has every step from before the failure, long before the sync interval is over."""
    expert = make_expert(connect(), spec=SPEC, rules=RULES)
    said: list[str] = []
    with serving(connect(), block_ms=20), pytest.raises(raised, match=sentence):
        make_training(connect(), error, said, drain_s=30.0).run()
    assert said[-1].startswith("done: updates applied: 1, refused: 0")
    assert expert.store.load().meta.n_examples == 7


def test_stop_before_the_first_step_ends_at_once(connect: Connect) -> None:
    """The stop gave joining half a second and then cuts the connection off: nothing is waited for on that."""
    make_expert(connect(), spec=SPEC, rules=RULES)
    said: list[str] = []
    stop = Stop()
    training = make_training(
        connect(), TooLittleMemoryError("unused", about="memory"), said, drain_s=30.0, stop=stop
    )
    stop.set()
    with pytest.raises(StoppedError):
        training.run()
    assert not said


def test_what_is_lost_is_said_beside_the_failure(connect: Connect) -> None:
    """Nobody decides it: one sentence has both, why the training ended and what is not in the expert."""
    make_expert(connect(), spec=SPEC, rules=RULES)
    error = TooLittleMemoryError("no memory", about="memory")
    training = make_training(connect(), error, [], drain_s=0.0, is_cut_off=True)
    with pytest.raises(
        FedMoEError, match=r"^no memory; updates applied: 0.*; 7 steps since the last .* are lost: "
    ):
        training.run()


@pytest.mark.timeout(60)
def test_it_ends_when_only_what_is_done_is_left(connect: Connect) -> None:
    """The expert has had its epochs, and the gateway, which has not, is removed."""
    turns = []
    for name, worker in (("sql_expert", "alice"), (GATEWAY, "sql_expert.alice")):
        make_expert(connect(), name, spec=SPEC, rules=RULES)
        trainer, progress = Failing(torch.zeros(SPEC.layout.numel), 1000, AssertionError()), Progress()
        member = join(connect().settings, worker, name, trainer=trainer, training_fields=progress.fields)
        turns.append(Turn(expert=name, trainer=trainer, member=member, progress=progress))
    turns[0].trainer.position = 100
    remove_expert(connect(), GATEWAY)
    turns[1].member.sync.outbox = Outbox(must_pull=True)  # it looks at once
    settings = WorkerSettings(stream="sql_expert", data=Path("rows.jsonl"), drain_s=5.0, max_epochs=1.0)
    training = Training(turns, settings, n_examples=100, stop=Stop(), report=lambda _: None)
    with serving(connect(), block_ms=20), raises(RemovedExpertError, about=GATEWAY):
        training.run()


def test_steps_that_are_dropped_do_not_count(
    connect: Connect, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker from an old checkpoint: its first steps are over before it learns that Redis knows more of it."""
    expert = make_expert(connect(), spec=SPEC, rules=RULES)

    def train(state: Path) -> str:
        trainer, progress, said = (
            Failing(torch.zeros(SPEC.layout.numel), 1000, AssertionError()),
            Progress(),
            [""],
        )
        state_dir = StateDir(state)
        member = join(
            connect().settings, trainer=trainer, state_dir=state_dir, training_fields=progress.fields
        )
        settings = WorkerSettings(
            stream="sql_expert", data=Path("rows.jsonl"), drain_s=10.0, max_steps=2, state_dir=state
        )
        turn = Turn(expert="sql_expert", trainer=trainer, member=member, progress=progress)
        try:
            Training([turn], settings, n_examples=100, stop=Stop(), report=said.append).run()
        finally:
            state_dir.close()
        dropped.append(progress.steps - 2)
        return said[-1]

    dropped: list[int] = []
    with serving(connect(), block_ms=20):
        train(tmp_path / "new")
        copytree(tmp_path / "new", tmp_path / "old")
        train(tmp_path / "new")
        assert dropped == [0, 0]
        assert train(tmp_path / "old").startswith("done: updates applied: 1, refused: 0")
    assert expert.store.load().meta.n_examples == 6
    assert dropped[-1] > 0
    assert f"drops 0 undecided updates and {counted(dropped[-1], 'step')} since" in caplog.text
