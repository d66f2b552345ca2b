"""The door for any training loop: `fedmoe.join`.

    with fedmoe.join("redis://…", {"sql_expert": peft_model}, state_dir="state") as member:
        for batch in batches:
            …                                        # forward, backward, optimizer.step()
            member.step(n_examples=len(batch), loss=loss.item())

`step` is the one call at each step boundary. It never waits for the network: it adds what other workers taught the
expert since, and copies the adapter when an update is due. `producers.membership` does all else.
"""

import atexit
import logging
import math
import operator
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PretrainedConfig

from fedmoe.errors import FedMoEError, SettingsError
from fedmoe.model.adapter import bind_adapter
from fedmoe.model.base import check_structure, fingerprint
from fedmoe.model.tokenizer import vocabulary_fingerprint
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.names import GATEWAY, clean_name, domain_of
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.vectors import WITHHELD, DomainVector
from fedmoe.settings import RedisSettings, WorkerSettings
from fedmoe.util.setting import check_whole
from fedmoe.util.stopping import without_interrupt
from producers.checkpoint import StateDir, name_in
from producers.exchange import Exchange
from producers.foreign import ForeignEvaluator, ForeignTrainer
from producers.heartbeat import SyncStatus
from producers.membership import Membership, finish, outcomes
from producers.trainer import StepResult
from producers.training import Progress
from producers.validation import Validation
from producers.vector import vector_of_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class _Chain(NamedTuple):
    """One expert that the worker trains."""

    membership: Membership
    adapter: ForeignTrainer

    def note(self, done: StepResult) -> None:
        """Note a step."""
        self.adapter.position += done.n_examples
        self.membership.exchange.record(done)

    def pass_boundary(self) -> None:
        """Apply corrections; raise the sync's failure, so that no step comes after its last checkpoint."""
        self.membership.exchange.boundary()
        if self.membership.sync.failure is not None:
            raise self.membership.sync.failure


class Member:
    """A worker, as a training loop sees it. Made by `join`. A context manager: its end leaves the federation.

    Attributes:
        steps: number of steps since it joined.
    """

    def __init__(
        self, chains: Mapping[str, _Chain], stack: ExitStack, drain_s: float, progress: Progress,
        validation: Validation,
    ) -> None:  # fmt: skip
        self.steps = 0
        self._chains = dict(chains)
        self._stack = stack
        self._drain_s = drain_s
        self._progress = progress
        self._validation = validation
        self._stepped_at = time.perf_counter()
        self._has_left = False
        atexit.register(self._leave_at_exit)

    def step(self, *, n_examples: int, n_tokens: int = 0, loss: float | None = None) -> None:
        """Report the optimizer step that was just taken, and add what other workers taught the expert.

        Args:
            n_examples: rows of the step.
            n_tokens: tokens that counted in its loss.
            loss: mean loss per token; for display only.

        Raises:
            FedMoEError: if this worker cannot go on (refused, name taken, expert removed, release too old). Undecided
                updates are kept in the state directory.
            SettingsError: if n_examples or n_tokens is not a count, the adapter was replaced after joining, or the
                function to validate returned no number.
        """
        n_examples, n_tokens = _count("n_examples", n_examples), _count("n_tokens", n_tokens)
        if self._has_left:
            raise SettingsError("this worker has left the federation: join again to train on", about="leave")
        for chain in self._chains.values():
            chain.adapter.check()
        done = StepResult(
            loss=math.nan if loss is None else float(loss), n_examples=n_examples, n_tokens=n_tokens,
            position=self.position + n_examples, applied=True,
        )  # fmt: skip
        with without_interrupt():  # half a boundary would count a correction twice
            self.steps += 1
            self._progress.add(done)
            for chain in self._chains.values():
                chain.note(done)
            for chain in self._chains.values():
                chain.pass_boundary()
        self._validation.trained(time.perf_counter() - self._stepped_at)
        self._validation.between_steps()
        self._stepped_at = time.perf_counter()

    @property
    def status(self) -> dict[str, SyncStatus]:
        """By expert: its version, counts of this worker's updates, the last staleness, and a problem or ""."""
        return {name: chain.membership.sync.status for name, chain in self._chains.items()}

    @property
    def rules(self) -> dict[str, RuleSet]:
        """By expert: the rules as of the last pull. The loop decides whether to follow those for training."""
        return {name: chain.membership.sync.ledger.meta.rules for name, chain in self._chains.items()}

    @property
    def position(self) -> int:
        """Number of rows trained on in all, before a restart too: where to go on in the data."""
        return max(chain.adapter.position for chain in self._chains.values())

    def leave(self, *, is_done: bool = True) -> dict[str, str]:
        """Publish the rest, wait for the decisions, and leave. Returns by expert a sentence that says how it ended.

        Raises:
            FedMoEError: if something that was trained is lost.
        """
        if self._has_left:
            return {}
        with self._stack:
            for chain in self._chains.values():
                chain.membership.is_done = is_done
            self._drain()
            return self._outcomes()

    def _drain(self) -> None:
        """Publish the rest and wait for the decisions, for all experts at the same time."""
        self._has_left = True
        atexit.unregister(self._leave_at_exit)
        finish([chain.membership for chain in self._chains.values()], self._drain_s)

    def _outcomes(self) -> dict[str, str]:
        return outcomes({name: chain.membership for name, chain in self._chains.items()}, self._drain_s)

    def _leave_at_exit(self) -> None:
        """Leave at the end of a program that forgot to."""
        try:
            for name, sentence in self.leave(is_done=False).items():
                logger.warning("the program ended without leaving the federation; %s: %s", name, sentence)
        except FedMoEError as error:
            logger.warning("the program ended without leaving the federation: %s", error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave. After an exception, too, the progress up to the last step is published first."""
        if error is None:
            for name, sentence in self.leave().items():
                logger.info("%s: %s", name, sentence)
        elif not self._has_left:
            is_stop = isinstance(error, KeyboardInterrupt) or (
                isinstance(error, SystemExit) and error.code in (0, None)
            )
            try:
                self._drain()
                for name, sentence in self._outcomes().items():
                    logger.info("%s: %s", name, sentence)
            except FedMoEError as lost:
                if lost is not error:
                    logger.warning("%s", lost)
            finally:
                self._stack.__exit__(*((None, None, None) if is_stop else (kind, error, trace)))


MOST = 2**53
# A step of a foreign loop cannot be abandoned.
_exchange = partial(Exchange, abandons=False)


def _count(name: str, value: object) -> int:
    """A count of any integer type, including those of numpy and torch, as an int."""
    if hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)
    check_whole(name, value, at_least=0)
    if value > MOST:  # type: ignore[operator]  # it is a whole number
        raise SettingsError(f"{name} must be at most 2^53, not {value!r}", about=name)
    return int(value)  # type: ignore[call-overload, no-any-return]  # it is one


def _checked(
    validate: Mapping[str, Callable[[], float]] | None, rows: int, experts: Collection[str]
) -> Mapping[str, Callable[[], float]]:
    """`validate` as `join` got it; raises SettingsError if it does not fit the experts or the number of rows."""
    if not validate:
        if rows:
            raise SettingsError(
                "validation_rows is given, but no function to validate: give validate={expert: function}, too",
                about="validate",
            )
        return {}
    if not isinstance(validate, Mapping) or not all(callable(measure) for measure in validate.values()):
        raise SettingsError(
            'validate must name a function by expert: {"sql_expert": function}', about="validate"
        )
    if unknown := set(validate) - set(experts):
        raise SettingsError(
            f"validate names experts that are not joined: {', '.join(sorted(unknown))}", about="validate"
        )
    check_whole("validation_rows", rows, at_least=1)
    return validate


def join(
    redis: str | RedisSettings,
    adapters: Mapping[str, nn.Module],
    *,
    name: str = "",
    state_dir: str | Path | None = None,
    optimizer: Optimizer | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    data: str = "",
    prompts: Sequence[Sequence[int]] = (),
    vector_noise: float = 0.0,
    validate: Mapping[str, Callable[[], float]] | None = None,
    validation_rows: int = 0,
    drain_s: float = 30.0,
    checkpoint_interval_s: float = 60.0,
    wait: bool = True,
) -> Member:
    """Join a federation as a worker. The adapter then holds the expert's present weights, or those of the checkpoint.

    Args:
        redis: URL of the federation's Redis, or its settings.
        adapters: by expert, the PEFT model whose LoRA adapter is trained. Make it with the expert's own LoraConfig:
            `fedmoe.connect(url).expert(name).lora_config()`.
        name: this worker's name, unique on its expert; "" is the one in `state_dir`, else the host's. On the gateway it
            begins with the expert whose rows the loop has, and a dot: "sql_expert.alice".
        state_dir: directory for checkpoints, from which the next process resumes; without one, undecided updates are
            lost with the process. With several experts, each has a directory in it.
        optimizer: whose state of the adapter becomes part of the checkpoint.
        tokenizer: whose vocabulary is compared with that of the expert's other workers.
        data: a name for the rows and their order; the position of a checkpoint counts only for the same name.
        prompts: token ids of the prompts of some rows, each as the model gets it before its answer. The mean of the
            base model's states at their ends, over 40 of them, is published as this worker's domain vector, by which a
            router finds the expert; without prompts none is.
        vector_noise: standard deviation of the Gaussian noise on each value of that vector, as a multiple of
            2 / number of prompts, the most by which one of them can move it.
        validate: by expert, a function that measures its model as it is on rows that are never trained on, and returns
            the mean loss per token (nats). `step` calls it for a new base now and then, in at most 2 % of the time;
            the loss goes with the next update. It must leave training mode and random state as they were.
        validation_rows: number of rows that `validate` measures.
        drain_s: seconds to wait for the last decision when it leaves.
        checkpoint_interval_s: longest time between two checkpoints.
        wait: retry while Redis cannot be reached or has no experts at all, instead of failing.

    Raises:
        FedMoEError: one sentence that says why this worker cannot train: an unknown expert, another base model or
            adapter, a name that is taken, a full fine-tuning.
    """
    settings = RedisSettings(url=redis) if isinstance(redis, str) else redis
    if not isinstance(settings, RedisSettings):
        raise SettingsError(
            f"the first argument must be a Redis URL, or RedisSettings, not {redis!r}", about="redis"
        )
    if not isinstance(adapters, Mapping) or not adapters:
        raise SettingsError('name the expert to train: join(url, {"sql_expert": model})', about="adapters")
    if len({id(model) for model in adapters.values()}) < len(adapters):
        raise SettingsError(
            "one model is given for two experts: give each expert a model with its own adapter", about="model"
        )
    is_spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    if is_spread and torch.distributed.get_world_size() > 1:
        raise SettingsError(
            "the training is spread over several processes: FedMoE trains an adapter in one process; start one "
            "worker on each GPU, each with a name of its own",
            about="processes",
        )
    validate = _checked(validate, validation_rows, adapters)
    root = Path(state_dir) if state_dir else None
    if root and len(adapters) > 1 and name_in(root):
        raise SettingsError(
            f"{root} holds the checkpoint of one expert; several experts have a directory each in it: give another one",
            about="state_dir",
        )
    words = vocabulary_fingerprint(tokenizer) if tokenizer is not None else ""
    progress = Progress()
    chains: dict[str, _Chain] = {}
    vector: DomainVector | None = None
    with ExitStack() as stack:
        for expert, given in adapters.items():
            model = getattr(given, "_orig_mod", given)  # what torch.compile was given
            place = root and (root / expert if len(adapters) > 1 else root)
            worker = name or (name_in(place) if place else "") or clean_name(socket.gethostname())
            if expert == GATEWAY and "." not in worker:
                raise SettingsError(
                    "on the gateway a worker is named after the expert whose rows it has, too: give it a name like "
                    f'"sql_expert.{worker}"',
                    about="name",
                )
            checked = WorkerSettings(
                stream=domain_of(worker) if expert == GATEWAY else expert,
                data=Path(),
                name=worker,
                drain_s=drain_s,
                checkpoint_interval_s=checkpoint_interval_s,
                state_dir=place,
                vector_noise=vector_noise,
            )
            member = Membership(
                settings, expert, worker,
                state_dir=StateDir(place) if place else None, wait=wait,
                checkpoint_interval_s=checkpoint_interval_s,
            )  # fmt: skip
            stack.enter_context(member)
            spec, _ = member.look()
            if isinstance(config := getattr(model, "config", None), PretrainedConfig):
                check_structure(config, spec.base_config)
            adapter = ForeignTrainer(bind_adapter(model, spec), optimizer)
            base = fingerprint(model)
            member.claim(BaseIdentity(fingerprint=base, tokenizer=words))
            if vector != WITHHELD:  # one chain brings it; what is withheld is taken back from all
                vector = None if chains else vector_of_prompts(checked, prompts, model, base=base)
            member.begin(
                adapter, data=data, training_fields=progress.fields, exchange=_exchange, vector=vector
            )
            if expert in validate:
                member.exchange.want_base()
                member.exchange.offer_base(member.sync.ledger.meta, member.sync.ledger.base)
            chains[expert] = _Chain(member, adapter)
        for chain in chains.values():
            chain.membership.thread.start()
        return Member(
            chains, stack.pop_all(), drain_s, progress,
            Validation(
                [
                    (expert, ForeignEvaluator(chains[expert].adapter.flat, measure, rows=validation_rows, data=data),
                     chains[expert].membership.exchange)
                    for expert, measure in validate.items()
                ],
                report=lambda expert, line: logger.info("%s: %s", expert, line),
            ),
        )  # fmt: skip
