"""The worker of `fedmoe worker run`: prepare base model and rows, join by a `Membership`, train until stopped.

The rule `train` of its expert says what it trains: the expert, the gateway, or both by turns. Each is a membership of
its own: two complete ledgers, with checkpoints of their own, on one base model. The main thread trains; the sync
threads (producers/sync.py) talk to Redis, so training never waits for it.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import DataFile, open_data
from fedmoe.errors import (
    FedMoEError,
    RedisUnfitError,
    RemovedExpertError,
    StoppedError,
    UnknownExpertError,
)
from fedmoe.protocol.names import GATEWAY, name_on_gateway
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TRAIN_EXPERT, TRAIN_GATEWAY, RuleSet
from fedmoe.protocol.vectors import WITHHELD
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.util.stopping import Stop
from fedmoe.util.text import printable_lines
from producers.checkpoint import StateDir, name_in
from producers.material import Material, prepare
from producers.membership import Membership
from producers.news import Fixed
from producers.training import Progress, Training, Turn

logger = logging.getLogger(__name__)

GATEWAY_PATIENCE_S = 10.0


class Worker:
    """One worker from start to end.

    Args:
        report: prints a line for people.
        stop: once it is set, the worker finishes its step, publishes, waits for the decision and returns. The worker
            also sets it when it has trained as many steps or epochs as the settings say.
        prepare: loads the model and encodes the examples, as spec and settings say.

    Attributes:
        turns: what it trains; empty until it has joined.
    """

    def __init__(
        self,
        redis: RedisSettings,
        settings: WorkerSettings,
        *,
        stop: Stop,
        report: Callable[[str], None] = print,
        prepare: Callable[..., Material] = prepare,
    ) -> None:
        self._redis = redis
        given = "its enrolment" if redis.enrolled and redis.enrolled.name else "--name"
        self._settings, self._why = (settings, given) if settings.name else with_name(settings)
        self._stop = stop
        self._print = report
        self._prepare = prepare
        self._mute = False
        self.turns: Sequence[Turn] = ()

    def _report(self, line: str) -> None:
        """Print a line; a full disk or a closed pipe must not end the training."""
        try:
            self._print(printable_lines(line))
        except OSError as error:
            if not self._mute:
                logger.warning(
                    "progress cannot be printed any more (%s); training goes on", error.strerror or error
                )
            self._mute = True

    def run(self) -> None:
        """Join, train and publish until stopped.

        Raises:
            FedMoEError: one sentence, if this worker cannot train: wrong data, expert, base model or name.
        """
        settings, stop = self._settings, self._stop
        stop.last_words = lambda: ("stopped before the training began: nothing was trained yet", 0)
        self._report(f"worker {settings.worker!r} of expert {settings.stream!r} (name from {self._why})")
        bad_rows = BadRows(report=self._report, file=settings.bad_rows, fail=settings.on_bad_row == "fail")
        try:
            data = open_data(settings.data, bad_rows, stopped=stop.is_set)
            with ExitStack() as stack:
                self._work(stack, data, bad_rows)
        except StoppedError as stopped:
            self._report(str(stopped))

    def _work(self, stack: ExitStack, data: DataFile, bad_rows: BadRows) -> None:
        settings = self._settings
        own, refusal = self._membership(stack, settings.stream), None
        try:
            spec, meta = own.look()
        except RedisUnfitError as error:  # it may still train the gateway, if it may read what its expert is
            refusal = error
            try:
                spec, meta = own.store.spec(), own.store.meta()
            except FedMoEError:
                raise refusal from None
        members = self._choose(stack, own, meta, refusal)
        self._say_what_rests(members)
        first = next(iter(members.values()))  # the rows follow its rules
        assert first.meta is not None
        material = self._prepare(
            settings, spec, meta, data, bad_rows,
            max_length=first.meta.rules.training.max_length, cache=settings.state_dir, stopped=self._stop.is_set,
            report=self._report,
        )  # fmt: skip
        turns = self.turns = self._begin(members, material, meta.rules)
        if material.vector == WITHHELD or settings.vector_noise:
            self._say_where_a_vector_stays({turn.expert for turn in turns})
        if meta.rules.train != TRAIN_EXPERT:
            by_turns = " by turns, a step each" if len(turns) > 1 else ""
            self._report(f"training {' and '.join(turn.expert for turn in turns)}{by_turns}")
        rules = turns[0].member.sync.ledger.meta.rules
        if not turns[0].member.sync.ledger.seq and rules.training.max_length != material.max_length:
            logger.info(
                "rows are truncated to %d tokens; max_length is now %d, which takes effect at the next start",
                material.max_length,
                rules.training.max_length,
            )
        Training(turns, settings, n_examples=material.n_examples, stop=self._stop, report=self._report).run()

    def _membership(self, stack: ExitStack, expert: str) -> Membership:
        """This worker's membership of its expert, or of the gateway."""
        settings = self._settings
        place, name = settings.state_dir, settings.worker
        if expert == GATEWAY:
            place, name = place and place / GATEWAY, name_on_gateway(settings.stream, name)
        member = Membership(
            self._redis, expert, name,
            state_dir=StateDir(place) if place else None, wait=settings.wait, stop=self._stop,
            checkpoint_interval_s=settings.checkpoint_interval_s, report=self._report,
        )  # fmt: skip
        self._stop.when_out_of_patience.append(member.store.connection.cut_off)
        return stack.enter_context(member)

    def _choose(
        self, stack: ExitStack, own: Membership, meta: Meta, refusal: FedMoEError | None
    ) -> dict[str, Membership]:
        """The memberships of what this worker trains, as the rule `train` says; without one that it may not train.

        `refusal`: why it may not train its expert.

        Raises:
            FedMoEError: if nothing is left to train.
        """
        members, refused = {}, list[FedMoEError]()
        if TRAIN_EXPERT in meta.rules.trained:
            if refusal is None:
                members[self._settings.stream] = own
            else:
                refused.append(refusal)
        if TRAIN_GATEWAY in meta.rules.trained:
            try:
                gateway = self._membership(stack, GATEWAY)
                self._look_patiently(gateway)
                members[GATEWAY] = gateway
            except StoppedError:
                raise
            except FedMoEError as error:
                refused.append(error)
        self._say_alone(members, refused)
        return members

    def _look_patiently(self, gateway: Membership) -> None:
        """Look at the gateway; if it is not there, wait a little: an aggregator may be writing it back."""
        until = time.monotonic() + GATEWAY_PATIENCE_S
        while True:
            try:
                gateway.look()
                return
            except RemovedExpertError:
                raise
            except UnknownExpertError:
                if time.monotonic() > until or self._stop.wait(0.25):
                    raise

    def _say_what_rests(self, members: Mapping[str, Membership]) -> None:
        """Report a checkpoint of what this worker does not train now: what it holds is not sent meanwhile."""
        for name, place in self._places.items():
            if place and name not in members and name_in(place):
                self._report(
                    f"the checkpoint of {name} in {place} rests: what is not sent yet is sent when this worker trains "
                    f"{name} again (rule train)"
                )

    def _say_where_a_vector_stays(self, trained: Collection[str]) -> None:
        """Report a chain that this worker does not train now, if the vector that it may have there is to change."""
        for name, place in self._places.items():
            if name not in trained and (name == self._settings.stream or (place and name_in(place))):
                self._report(
                    f"if an earlier start published a domain vector on {name}, it stays there, because this worker "
                    f"does not train {name} now (rule train): train it again with these options to replace it"
                )

    @property
    def _places(self) -> dict[str, Path | None]:
        """The state directories of this worker's two chains."""
        root = self._settings.state_dir
        return {self._settings.stream: root, GATEWAY: root and root / GATEWAY}

    def _say_alone(self, members: Mapping[str, Any], refused: Sequence[FedMoEError]) -> None:
        """Report why this worker trains only one of expert and gateway; raise the first reason if it trains neither."""
        if not members:
            raise refused[0]
        for error in refused:
            self._report(f"{error}; this worker trains {' and '.join(members)} alone")

    def _begin(self, members: Mapping[str, Membership], material: Material, rules: RuleSet) -> list[Turn]:
        """Claim the worker's names, and make a trainer for each membership, with the weights to start from.

        `rules`: of this worker's expert, by which it was started.
        """
        settings, turns, refused = self._settings, dict[str, Turn](), list[FedMoEError]()
        for expert, member in members.items():
            try:
                assert member.spec is not None
                assert member.meta is not None
                member.claim(material.identity)
                training = member.meta.rules.training
                trainer, progress = material.make_trainer(member.spec, training), Progress()
                fixed = Fixed(
                    max_length=None if turns else material.max_length,
                    train=rules.train if expert == settings.stream else None,
                )
                # One chain brings the vector; a worker that withholds it takes back what an earlier start published.
                says = material.vector if not turns or material.vector == WITHHELD else None
                member.begin(
                    trainer, data=material.data, source=str(settings.data),
                    training_fields=progress.fields, fixed=fixed, vector=says,
                )  # fmt: skip
            except StoppedError:
                raise
            except FedMoEError as error:
                if expert != GATEWAY:
                    raise
                refused.append(error)
            else:
                evaluator = material.make_evaluator(member.spec, training)
                if evaluator is not None:
                    ledger = member.sync.ledger
                    member.exchange.want_base()
                    member.exchange.offer_base(ledger.meta, ledger.base)
                turns[expert] = Turn(
                    expert=expert, trainer=trainer, member=member, progress=progress, evaluator=evaluator
                )
        self._say_alone(turns, refused)
        return list(turns.values())


def with_name(settings: WorkerSettings) -> tuple[WorkerSettings, str]:
    """Settings with a name, and its source; a restart with the same state directory keeps the name."""
    if settings.state_dir and (name := _name_in(settings.state_dir, settings.stream)):
        why = f"the checkpoint in {settings.state_dir}"
        if name != settings.worker:
            why += f", not this host, {settings.worker!r}; for another worker give --name and another --state-dir"
        return replace(settings, name=name), why
    return replace(settings, name=settings.worker), "this host; --name gives another one"


def _name_in(state_dir: Path, expert: str) -> str:
    """The worker's name in the checkpoints of its expert or of the gateway, "" if there are none."""
    domain, _, name = name_in(state_dir / GATEWAY).partition(".")
    return name_in(state_dir) or (name if domain == expert else "")
