"""A training loop of the user's own, as the exchange and the validation need it."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from fedmoe.errors import SettingsError
from fedmoe.model.adapter import BoundAdapter
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.validation import MAX_SET_CHARS, Measured
from producers.spares import Spares

logger = logging.getLogger(__name__)


class ForeignTrainer:
    """A foreign training as the exchange needs it: the adapter, its optimizer, and the position in the data."""

    def __init__(self, bound: BoundAdapter, optimizer: Optimizer | None) -> None:
        self.flat = bound.flat
        self.position = 0
        self.check = bound.check
        self._bound = bound
        # accelerate puts its own around the optimizer.
        self._optimizer = getattr(optimizer, "optimizer", optimizer)

    def adopt(self, settings: TrainingSettings) -> None:
        """Nothing: a foreign loop chooses its own settings."""

    def state(self, spares: Spares) -> Mapping[str, torch.Tensor]:
        """A copy on the CPU of the optimizer's state of this adapter, with a mark of the kind of optimizer.

        Empty if the state holds anything but tensors and numbers.
        """
        if self._optimizer is None:
            return {}
        state = {self._mark(): torch.tensor(0)}
        for name, parameter in self._bound.parameters().items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    state[f"{name}|{key}"] = spares.copy(value)
                elif isinstance(value, int | float):
                    state[f"{name}|{key}|{type(value).__name__}"] = torch.tensor(value)
                elif value is not None:
                    return {}
        return state

    def load_state(self, state: Mapping[str, torch.Tensor], *, same_data: bool) -> None:
        """Restore what `state` returned; ignore the state of another kind of optimizer, and log that."""
        if self._optimizer is None or not state:
            return
        if self._mark() not in state:
            logger.warning("the checkpoint was written with another optimizer: this optimizer starts afresh")
            return
        found: dict[str, dict[str, Any]] = {}
        for full, value in state.items():
            name, *rest = full.split("|")
            if rest:
                found.setdefault(name, {})[rest[0]] = value.item() if len(rest) > 1 else value
        numbers = {
            id(one): number
            for number, one in enumerate(p for group in self._optimizer.param_groups for p in group["params"])
        }
        whole = self._optimizer.state_dict()
        for name, parameter in self._bound.parameters().items():
            if name in found and id(parameter) in numbers:
                whole["state"][numbers[id(parameter)]] = found[name]
        self._optimizer.load_state_dict(whole)

    def _mark(self) -> str:
        """A name for this kind of optimizer and its switches, which decide what its state consists of."""
        assert self._optimizer is not None
        switches = sorted(name for name, value in self._optimizer.defaults.items() if value is True)
        return "|".join(["", type(self._optimizer).__qualname__, *switches])


class ForeignEvaluator:
    """Has the loop's own function measure a base: for that time, the adapter holds the base.

    Args:
        flat: the adapter's values (numel,) fp32.
        validate: measures the model as it is; returns the mean loss per token (nats).
        rows: number of rows that it measures.
        data: name of the rows.
    """

    def __init__(self, flat: torch.Tensor, validate: Callable[[], float], *, rows: int, data: str) -> None:
        self._flat = flat
        self._validate = validate
        self._rows = rows
        self._rows_set = hashlib.sha256(f"{rows} rows beside {data}".encode()).hexdigest()[:MAX_SET_CHARS]
        self._base, self._version = flat, 0

    def begin(self, version: int, base: torch.Tensor) -> None:
        """Begin to measure these weights (numel,) fp32 of a version of the expert."""
        self._base, self._version = base, version

    def step(self) -> Measured:
        """Measure.

        Raises:
            SettingsError: if the function returns anything but a number.
        """
        trained = self._flat.detach().clone()
        try:
            with torch.no_grad():
                self._flat.copy_(self._base)
                found: object = self._validate()
        finally:
            with torch.no_grad():
                self._flat.copy_(trained)
        try:
            if isinstance(found, str | bytes | bool):
                raise TypeError("it is no number")
            loss = float(found)  # type: ignore[arg-type]  # the except clause is for what is no number
        except (TypeError, ValueError, OverflowError):
            raise SettingsError(
                f"the function given as validate must return the mean loss, a number, not {found!r}",
                about="validate",
            ) from None
        return Measured(loss=loss, version=self._version, rows=self._rows, rows_set=self._rows_set)
