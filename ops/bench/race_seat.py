"""One client's place in the race: model, rows, trainer and pace. Both systems use this, each in its own processes."""

import json
import math
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fedmoe.data.encode import Answer, Example
from fedmoe.model.adapter import adapter_layout, attach_adapter
from fedmoe.model.base import load_base, load_config
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from ops.bench.fedmoe_side import make_spec
from producers.trainer import StepResult, Trainer

LORA = LoraSettings(rank=8, alpha=16.0)
TRAINING = TrainingSettings(learning_rate=1e-3, batch_size=2, max_length=192, warmup_steps=4)
SETUP, ROWS = "setup.json", "rows-{}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A race.

    Args:
        model_dir: of the base model.
        domains: of each client's rows.
        step_s: seconds that a step of each client takes.
        steps: an ordinary client takes at most so many.
        sync_s: seconds between two updates of a client at its own pace.
        round_steps: steps of each client in a round.
        pad_id: padding token.
    """

    model_dir: str
    domains: tuple[str, ...]
    step_s: tuple[float, ...]
    steps: int
    sync_s: float
    round_steps: int
    pad_id: int = 0

    @property
    def rounds(self) -> int:
        """The number of rounds, until an ordinary client has taken its steps."""
        return math.ceil(self.steps / self.round_steps)

    def spec(self) -> Spec:
        """The spec of the adapter that all train."""
        return make_spec(adapter_layout(load_config(self.model_dir), LORA), "int4", lora=LORA)


class Snapshot(NamedTuple):
    """Weights (numel,) fp32 that were saved along the way.

    Args:
        second: since the training began; starts: of them, seconds in which all waited for processes to start.
    """

    second: float
    weights: torch.Tensor
    starts: float = 0.0


def prepare(directory: Path, setup: Setup, rows: Mapping[str, Sequence[Example]]) -> None:
    """Write setup and tokens into a new directory, so that a client's process need not tokenise."""
    directory.mkdir(parents=True)
    (directory / SETUP).write_text(json.dumps(asdict(setup)))
    for number, domain in enumerate(setup.domains):
        plain = [
            [list(row.input_ids), [[one.start, one.stop, one.weight] for one in row.answers], row.line]
            for row in rows[domain]
        ]
        (directory / ROWS.format(number)).write_text(json.dumps(plain))


def read_setup(directory: Path) -> Setup:
    """The setup of a directory."""
    fields = json.loads((directory / SETUP).read_text())
    return Setup(**{**fields, "domains": tuple(fields["domains"]), "step_s": tuple(fields["step_s"])})


class Seat:
    """A client's trainer on one thread; a step takes its seconds.

    Args:
        number: of the client.
    """

    def __init__(self, directory: Path, number: int) -> None:
        torch.set_num_threads(1)
        self.setup = read_setup(directory)
        self._step_s = self.setup.step_s[number]
        cpu = torch.device("cpu")
        model, self.flat = attach_adapter(load_base(self.setup.model_dir, device=cpu), self.setup.spec())
        examples = [
            Example(array("i", ids), tuple(Answer(*answer) for answer in answers), line)
            for ids, answers, line in json.loads((directory / ROWS.format(number)).read_text())
        ]
        self.trainer = Trainer(
            model=model, flat=self.flat, examples=examples, pad_id=self.setup.pad_id, settings=TRAINING,
            seed=number, device=cpu,
        )  # fmt: skip

    def step(self) -> StepResult:
        """One optimizer step at the client's pace."""
        began = time.monotonic()
        result = self.trainer.step()
        time.sleep(max(0.0, began + self._step_s - time.monotonic()))
        return result
