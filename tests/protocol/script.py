"""One run of a federation, told step by step: for traces that are too long for a search to come to."""

from tests.protocol.actors import Rules
from tests.protocol.model import Model
from tests.protocol.search import ViolationError
from tests.protocol.state import NO_REPLIES, Label, Scope, State


class Script:
    """A run; every state on its way is checked. Actors are numbered, the aggregators first.

    Raises:
        ViolationError: if something is wrong in a state.
    """

    def __init__(self, scope: Scope, rules: Rules) -> None:
        self._model = Model(scope, rules)
        self._state = self._model.first()
        self._trace: list[str] = []

    def step(self, actor: int, fault: str = "") -> None:
        """The actor's next request; with `lost` it is executed and its reply is lost."""
        before = self._model.spend(self._state, fault) if fault else self._state
        assert before is not None
        self._take(*self._model.step(before, actor, 0, fault))

    def turn(self, actor: int) -> None:
        """All that is left of the actor's turn, or a whole one."""
        self.step(actor)
        while self._state.slots[actor].replies != NO_REPLIES:
            self.step(actor)

    def until(self, actor: int, command: str) -> None:
        """Turns of the actor until its next request holds the command."""
        while command not in self._model.next_request(self._state, actor):
            self.step(actor)

    def happens(self, what: str) -> None:
        """A fault that no actor has a part in."""
        found = [(label, after) for label, after in self._model.successors(self._state) if what == label.what]
        self._take(*found[0])

    def end(self) -> None:
        """Nothing goes wrong any more."""
        wrong, labels = self._model.check_end(self._state)
        if wrong:
            self._fail(wrong, [*self._trace, "... and from here:", *map(self._model.words, labels)])

    def _take(self, label: Label, after: State) -> None:
        self._state = after
        self._trace.append(self._model.words(label))
        if wrong := self._model.check(after):
            self._fail(wrong, self._trace)

    def _fail(self, wrong: str, trace: list[str]) -> None:
        raise ViolationError(wrong, trace, len(self._trace))


def forked_memory_is_written_back(rules: Rules) -> None:
    """An aggregator, paused over an uncommitted batch in which b's update is refused, writes that back.

    Meanwhile the other one had applied b's update, b knows it, and is not told that it is refused now.
    """
    run = Script(
        Scope(
            workers=2, aggregators=2, units=1, max_staleness=0, paused=True,
            faults={"lost": 1, "lease": 1, "empty": 1},
        ),
        rules,
    )  # fmt: skip
    paused, serves, a, b = range(4)
    for actor in (serves, a, b):
        run.turn(actor)
    run.until(b, "XADD")
    run.step(b, "lost")
    run.until(serves, "GETRANGE")  # it has read b's first entry
    run.happens("the lease expires")
    for worker in (a, b):
        run.until(worker, "XADD")
        run.turn(worker)
    run.until(paused, "WATCH")  # it has read a's entry and b's second: b's is too stale then
    run.turn(serves)  # commits b's update
    run.turn(b)  # which learns that it was applied
    run.happens("the server restarts with nothing")
    run.turn(paused)
    run.end()
