"""The door for any training loop: `fedmoe.join`.

    with fedmoe.join("redis://…", {"sql_expert": peft_model}, state_dir="state") as member:
        for batch in batches:
            …                                        # forward, backward, optimizer.step()
            member.step(n_examples=len(batch), loss=loss.item())

`step` is the one call at each step boundary. It never waits for the network: it adds what others have taught the
expert, if that is there, and copies the adapter when it is time to publish. All else is `producers.membership`.
"""

import logging
import operator
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
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
from fedmoe.protocol.names import check_name, clean_name
from fedmoe.protocol.rules import RuleSet, TrainingSettings
from fedmoe.settings import RedisSettings
from fedmoe.util.setting import check_whole
from producers.checkpoint import StateDir, name_in
from producers.heartbeat import SyncStatus
from producers.membership import Membership
from producers.trainer import StepResult
from producers.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class _Adapter:
    """Somebody else's training, as the exchange sees it: the adapter, its optimizer, and how far it is in the data."""

    def __init__(self, flat: torch.Tensor, optimizer: Optimizer | None) -> None:
        self.flat = flat
        self.position = 0
        self._optimizer = optimizer

    def adopt(self, settings: TrainingSettings) -> None:
        """Following the rules for training is up to the loop."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """A copy on the CPU of the optimizer's tensors for this adapter, by parameter and name."""
        if self._optimizer is None:
            return {}
        states = self._optimizer.state
        return {
            f"{number}.{name}": value.detach().to("cpu", copy=True)
            for number, parameter in self._parameters()
            for name, value in states.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool) -> None:
        """Take over what `state` returned."""
        if self._optimizer is None or not state:
            return
        whole = self._optimizer.state_dict()
        for number, _ in self._parameters():
            prefix = f"{number}."
            if mine := {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}:
                whole["state"][number] = mine
        self._optimizer.load_state_dict(whole)

    def _parameters(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The optimizer's parameters that lie in this adapter, each with its number there."""
        assert self._optimizer is not None
        mine = self.flat.untyped_storage().data_ptr()
        parameters = (p for group in self._optimizer.param_groups for p in group["params"])
        for number, parameter in enumerate(parameters):
            if parameter.untyped_storage().data_ptr() == mine:
                yield number, parameter


class _Chain(NamedTuple):
    """One expert that the worker trains."""

    membership: Membership
    adapter: _Adapter

    def step(self, done: StepResult) -> None:
        """Note a step, then take in what is there."""
        self.adapter.position += done.n_examples
        self.membership.exchange.record(done)
        self.membership.exchange.boundary()
        failure = self.membership.sync.failure
        if failure is not None and not self.membership.thread.is_alive():
            raise failure


class Member:
    """A worker, seen from a training loop. Made by `join`; a context manager that leaves at the end.

    Attributes:
        steps: taken since it joined.
    """

    def __init__(
        self, chains: Mapping[str, _Chain], stack: ExitStack, drain_s: float, progress: Progress
    ) -> None:
        self.steps = 0
        self._chains = dict(chains)
        self._stack = stack
        self._drain_s = drain_s
        self._progress = progress
        self._has_left = False

    def step(self, *, n_examples: int, n_tokens: int = 0, loss: float = float("nan")) -> None:
        """Tell of one optimizer step that was just taken, and take in what others have learnt.

        Args:
            n_examples: rows that it was taken on.
            n_tokens: tokens that counted in its loss.
            loss: mean loss of a token; it is only shown.

        Raises:
            FedMoEError: if this worker has become useless (refused, its name taken, its expert removed, a release that
                is too old). What has no answer yet is kept in the state directory.
            SettingsError: if n_examples or n_tokens is no count.
        """
        n_examples, n_tokens = _count("n_examples", n_examples), _count("n_tokens", n_tokens)
        if self._has_left:
            raise SettingsError("this worker has left the federation: join again to train on")
        position = self.position + n_examples
        done = StepResult(
            loss=float(loss), n_examples=n_examples, n_tokens=n_tokens, position=position, applied=True
        )
        self.steps += 1
        self._progress.add(done)
        for chain in self._chains.values():
            chain.step(done)

    @property
    def status(self) -> dict[str, SyncStatus]:
        """By expert: its version, this worker's updates (published, applied, refused), their staleness, a problem."""
        return {name: chain.membership.sync.status for name, chain in self._chains.items()}

    @property
    def rules(self) -> dict[str, RuleSet]:
        """By expert: the rules as of the last pull; following those for training is up to the loop."""
        return {name: chain.membership.sync.ledger.meta.rules for name, chain in self._chains.items()}

    @property
    def position(self) -> int:
        """Rows that were trained on in all, those before a restart included: where to go on in the data."""
        return max(chain.adapter.position for chain in self._chains.values())

    def leave(self, *, is_done: bool = True) -> dict[str, str]:
        """Publish what is trained, wait for the decisions, and end; by expert, how it ended, as a sentence.

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
        """Publish what is trained, and wait for the decisions, of all experts side by side."""
        self._has_left = True
        members = [chain.membership for chain in self._chains.values()]
        for member in members:
            member.sync.finish(self._drain_s)
        while any(member.thread.is_alive() for member in members):
            for member in members:
                member.exchange.boundary()
            time.sleep(0.02)

    def _outcomes(self) -> dict[str, str]:
        return {name: chain.membership.outcome(self._drain_s) for name, chain in self._chains.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; whatever went wrong, what was trained until the last step is published first."""
        if error is None:
            for name, sentence in self.leave().items():
                logger.info("%s: %s", name, sentence)
        elif not self._has_left:
            self._drain()
            try:
                for name, sentence in self._outcomes().items():
                    logger.info("%s: %s", name, sentence)
            except FedMoEError as lost:
                if lost is not error:
                    logger.warning("%s", lost)
            is_stop = isinstance(error, KeyboardInterrupt)
            self._stack.__exit__(*((None, None, None) if is_stop else (kind, error, trace)))


def _count(name: str, value: object) -> int:
    """A count of any integer type, numpy's and torch's among them, as an int."""
    if hasattr(value, "__index__") and not isinstance(value, bool):
        value = operator.index(value)
    check_whole(name, value, at_least=0)
    return int(value)  # type: ignore[call-overload, no-any-return]  # it is one


def join(
    redis: str | RedisSettings,
    adapters: Mapping[str, nn.Module],
    *,
    name: str = "",
    state_dir: str | Path | None = None,
    optimizer: Optimizer | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    data: str = "",
    drain_s: float = 30.0,
    checkpoint_interval_s: float = 60.0,
    wait: bool = True,
) -> Member:
    """Join a federation as a worker: the expert's present weights are then in the adapter, or those of the checkpoint.

    Args:
        redis: URL of the federation's Redis, or its settings.
        adapters: by expert, the PEFT model whose LoRA adapter it trains. It must be the expert's: take its LoraConfig
            from `fedmoe.connect(url).expert(name).lora_config()`.
        name: this worker's name, unique on its expert; "" is the one in `state_dir`, else the host's.
        state_dir: directory for checkpoints, so that the next process goes on where this one ended; without one, what
            is undecided is lost with the process. With several experts, each has a directory in it.
        optimizer: its state of the adapter is part of the checkpoint.
        tokenizer: is compared with that of the expert's other workers.
        data: names the rows and their order; a checkpoint of other data is gone on from, but not its position.
        drain_s: seconds to wait for the last decision when it leaves.
        checkpoint_interval_s: longest time between two checkpoints.
        wait: try again while Redis cannot be reached or has no experts at all, instead of failing.

    Raises:
        FedMoEError: one sentence for whatever makes this worker useless: an unknown expert, another base model,
            another adapter, a name that is taken, a full fine-tuning.
    """
    settings = RedisSettings(url=redis) if isinstance(redis, str) else redis
    if not adapters:
        raise SettingsError('name the expert to train: join(url, {"sql_expert": model})')
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise SettingsError(
            "the training is spread over several processes: FedMoE trains an adapter in one process; start one worker "
            "on each GPU, each with a name of its own"
        )
    words = vocabulary_fingerprint(tokenizer) if tokenizer is not None else ""
    progress = Progress()
    chains = {}
    with ExitStack() as stack:
        for expert, model in adapters.items():
            place = None if state_dir is None else Path(state_dir) / (expert if len(adapters) > 1 else "")
            worker = name or (name_in(place) if place else "") or clean_name(socket.gethostname())
            member = Membership(
                settings, check_name("expert", expert), check_name("worker name", worker),
                state_dir=StateDir(place) if place else None, wait=wait,
                checkpoint_interval_s=checkpoint_interval_s,
            )  # fmt: skip
            stack.enter_context(member)
            spec, _ = member.look()
            if isinstance(config := getattr(model, "config", None), PretrainedConfig):
                check_structure(config, spec.base_config)
            adapter = _Adapter(bind_adapter(model, spec), optimizer)
            member.claim(BaseIdentity(fingerprint=fingerprint(model), tokenizer=words))
            member.begin(adapter, data=data, training_fields=progress.fields)
            chains[expert] = _Chain(member, adapter)
        for chain in chains.values():
            chain.membership.thread.start()
        return Member(chains, stack.pop_all(), drain_s, progress)
