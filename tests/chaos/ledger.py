"""The books of a chaos run: what was published, what became of it, and whether the weights are what the log says."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial

from consumers.verify import replay
from fedmoe.protocol.keys import GROUP
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from producers.checkpoint import StateDir
from tests.chaos.actors import EXPERTS, LEDGERS, Place
from tests.processes import eventually

Update = tuple[str, str, int]  # worker, run, seq


@dataclass
class Books:
    """The outcome; `problems` are sentences about whatever is not right."""

    published: int = 0
    applied: int = 0
    duplicate: int = 0
    refused: int = 0
    lost: int = 0
    doubled: int = 0
    equal: bool = True
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        return not (self.lost or self.doubled or self.problems) and self.equal

    def __str__(self) -> str:
        return (
            f"published {self.published} applied {self.applied} duplicate {self.duplicate} refused {self.refused} "
            f"lost {self.lost} doubled {self.doubled} replay {'equal' if self.equal else 'differs'}"
        )


def read_published(place: Place, problems: list[str]) -> dict[Update, int]:
    """The updates that workers published, and of how many examples."""
    found: dict[Update, tuple[int, str]] = {}
    for line in place.published.read_text().splitlines():
        worker, run, seq, n_examples, content = line.split()
        update = (worker, run, int(seq))
        if found.setdefault(update, (int(n_examples), content)) != (int(n_examples), content):
            problems.append(f"update {update} was published with two contents")
    return {update: n_examples for update, (n_examples, _) in found.items()}


def settle(connection: Connection, place: Place) -> Books:
    """Hold what workers published and trained against what Redis holds, when all of them have ended."""
    books = Books()
    published = read_published(place, books.problems)
    books.published = len(published)
    decided: Counter[Update] = Counter()
    examples: defaultdict[str, int] = defaultdict(int)
    store = GatewayStore(connection)
    for name, spec in EXPERTS.items():
        keys = connection.keys.expert(name)
        # The first read after a slot has moved fails; it finds out where the slot is now.
        meta, exact, log, _ = eventually(f"the history of {name}", partial(store.whole_history, name))
        client = connection.at(keys.meta).client
        dead = [{k.decode(): v.decode() for k, v in fields.items()} for _, fields in client.xrange(keys.dead)]
        applied = [line for line in log if "ended" not in line]  # the others tell of a change of the rules
        for line in [*applied, *dead]:
            if "seq" not in line:
                books.problems.append(f"{name}: a dead letter is no update: {line}")
                continue
            decided[line["worker"], line["run"], int(line["seq"])] += 1
            examples[line["worker"]] += int(line["n_examples"])
        books.applied += len(applied)
        books.refused += sum("seq" in line for line in dead)
        books.duplicate += meta.duplicate
        if meta.version != len(applied):
            books.problems.append(f"{name} is at version {meta.version}, its log has {len(applied)} updates")
        done = replay(spec, meta, log, Archive(place.kept / name))
        if done.problem:
            books.problems.append(f"{name} cannot be replayed: {done.problem}")
        books.equal &= not done.problem and done.same_values(exact.weights, exact.server_state)
        if meta.server_state and exact.server_state is None:
            books.problems.append(f"{name}: the state of its server optimizer does not fit the weights")
        waiting, pending = client.xlen(keys.updates), client.xpending(keys.updates, GROUP)
        if waiting or pending["pending"]:
            books.problems.append(f"{name}: {waiting} entries wait, {pending['pending']} are pending")
    books.lost = len(published.keys() - decided.keys())
    books.doubled = sum(count - 1 for count in decided.values())
    for worker, expert in LEDGERS.items():
        saved = StateDir(place.state(worker)).load(
            expert=expert, worker=worker, spec=EXPERTS[expert], now=0.0
        )
        trained = saved.position if saved else 0
        if trained != examples[worker]:
            books.problems.append(
                f"{worker} trained {trained} steps, of which {examples[worker]} were decided"
            )
    return books
