"""What a worker tells of its domain: the mean of the base model's states of some of its prompts, perhaps with noise.

A state directory keeps the vector. So a restart neither computes it again nor draws other noise: the mean of vectors
with fresh noise at each start would come ever closer to the one without.
"""

import hashlib
import json
import logging
import operator
import secrets
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from fedmoe.data.encode import Answer, Example
from fedmoe.errors import SettingsError, StoppedError, UpdateError
from fedmoe.model.hidden import prompt_states
from fedmoe.protocol.vectors import WITHHELD, DomainVector
from fedmoe.settings import WorkerSettings
from fedmoe.util.disk import write_whole

FILE = "vector.json"

logger = logging.getLogger(__name__)


def domain_vector(
    settings: WorkerSettings,
    examples: Sequence[Example],
    *,
    of: str,
    states: Callable[[Sequence[Example]], torch.Tensor],
    report: Callable[[str], None],
) -> DomainVector:
    """The vector that this worker publishes; WITHHELD if it cannot be computed, which is reported and stops nothing.

    Args:
        settings: of the worker.
        examples: all of its examples.
        of: names base model, tokenizer and examples; a kept vector counts only for the same.
        states: the states (n, d) of examples, each of length 1.
        report: prints a line.

    Raises:
        StoppedError: if the worker is told to stop meanwhile.
    """
    if not settings.domain_vector:
        return WITHHELD
    made_of = f"{of} {settings.vector_rows} rows, noise {settings.vector_noise!r}"
    file = settings.state_dir / FILE if settings.state_dir else None
    if kept := file and _read(file, made_of):
        return kept
    try:
        mean = states(some_of(examples, settings.vector_rows)).mean(0)
        rows = min(settings.vector_rows, len(examples))
        made = DomainVector.of(mean + noise_of(settings.vector_noise, rows, len(mean)), rows)
    except StoppedError:
        raise
    except Exception as error:  # models fail in many ways, and training can do without
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        report(
            "this worker publishes no domain vector, and takes back that of an earlier start; the training goes on: "
            + reason
        )
        return WITHHELD
    report(
        f"the mean state of {rows} prompts, the domain vector, is published with the first update (--no-domain-vector "
        "withholds it)"
    )
    if file:
        try:
            write_whole(file, json.dumps({"made_of": made_of, "vector": made.to_json()}).encode())
        except OSError as error:
            logger.warning("the domain vector cannot be kept in %s (%s)", file, error.strerror or error)
    return made


def vector_of_prompts(
    settings: WorkerSettings, prompts: Sequence[Sequence[int]], model: PeftModel, *, base: str
) -> DomainVector | None:
    """The vector that a training loop of one's own publishes, as `domain_vector`; None without prompts.

    Args:
        settings: of the worker.
        prompts: token ids of each prompt.
        model: whose base model, with its adapters off, computes the states.
        base: the base model's fingerprint.

    Raises:
        SettingsError: if a prompt is not a sequence of token ids.
    """
    if not len(prompts):
        return None
    try:
        rows = [array("i", [operator.index(one) for one in prompt]) for prompt in prompts]
    except (TypeError, OverflowError):
        rows = []
    if not rows or not all(rows):
        raise SettingsError(
            "prompts must be sequences of token ids, none of them empty: [[1, 52, 9], …]", about="prompts"
        )
    examples = [Example(row, (Answer(len(row), len(row), 1.0),)) for row in rows]
    digest = hashlib.sha256(b"".join(row.tobytes() + b"|" for row in rows)).hexdigest()

    def states(some: Sequence[Example]) -> torch.Tensor:
        with model.disable_adapter(), evaluating(model):
            whole = model.get_base_model()
            return prompt_states(whole, some, pad_id=0, device=next(whole.parameters()).device)

    return domain_vector(settings, examples, of=f"{base} prompts {digest}", states=states, report=logger.info)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; the modules' modes are as before at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def some_of(examples: Sequence[Example], rows: int) -> list[Example]:
    """As many examples, spread evenly; all of them if there are no more."""
    n = min(rows, len(examples))
    return [examples[place * len(examples) // n] for place in range(n)]


def noise_of(scale: float, rows: int, width: int) -> torch.Tensor:
    """Gaussian noise (width,) of standard deviation scale × 2 / rows, from a seed that nobody knows."""
    if not scale:
        return torch.zeros(width)
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    return torch.randn(width, generator=generator) * (scale * 2 / rows)


def _read(file: Path, made_of: str) -> DomainVector | None:
    """The kept vector, None if there is none of this."""
    try:
        content = json.loads(file.read_bytes())
        return DomainVector.from_json(content["vector"]) if content["made_of"] == made_of else None
    except (OSError, ValueError, LookupError, TypeError, UpdateError):
        return None
