"""What a worker tells of its domain: states of prompts, their mean, the noise, and what is kept of it."""

import logging
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fedmoe.data.encode import Answer, Example
from fedmoe.errors import StoppedError
from fedmoe.model.hidden import prompt_states
from fedmoe.protocol.vectors import WITHHELD, DomainVector
from fedmoe.settings import WorkerSettings
from producers.vector import FILE, domain_vector, noise_of, some_of
from tests.errors import raises
from tests.tiny import tiny_model

CPU = torch.device("cpu")
EXAMPLES = [
    Example(array("i", range(1, 4 + n)), (Answer(start=1 + n, stop=3 + n, weight=1.0),)) for n in range(7)
]
WIDTH = 8


def settings(tmp_path: Path | None = None, **changes: object) -> WorkerSettings:
    return WorkerSettings(stream="sql_expert", data=Path("rows.jsonl"), state_dir=tmp_path, **changes)


def states_of(examples: Sequence[Example]) -> torch.Tensor:
    """A state for each example: its number of tokens, in every value."""
    return torch.tensor([[len(one.input_ids) / 16] * WIDTH for one in examples])


def made(settings: WorkerSettings, **changes: object) -> DomainVector | None:
    given = {"of": "these", "states": states_of, "report": print} | changes
    return domain_vector(settings, EXAMPLES, **given)


def test_a_state_is_that_of_the_prompts_last_token_whatever_shares_its_batch() -> None:
    """Of the bare model, without answer or padding, of length 1."""
    model = tiny_model()
    states = prompt_states(model, EXAMPLES, pad_id=0, device=CPU)
    assert states.shape == (7, 64)
    for state, example in zip(states, EXAMPLES, strict=True):
        ids = torch.tensor([list(example.input_ids)[: example.answers[0].start]])
        last = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        assert torch.allclose(state, last / last.norm(), atol=1e-5)


def test_the_computation_can_be_stopped() -> None:
    """A worker that is told to stop need not wait for it; nor is that a reason to go on without a vector."""

    def stopped(examples: Sequence[Example]) -> torch.Tensor:
        return prompt_states(tiny_model(), examples, pad_id=0, device=CPU, stopped=lambda: True)

    with raises(StoppedError, about="training"):
        made(settings(), states=stopped)


def test_rows_are_spread_evenly_and_counted() -> None:
    """At most as many as there are; the mean is published with their number."""
    assert some_of(EXAMPLES, 3) == [EXAMPLES[0], EXAMPLES[2], EXAMPLES[4]]
    assert some_of(EXAMPLES, 40) == EXAMPLES
    vector = made(settings(vector_rows=3))
    assert vector is not None
    assert vector.rows == 3
    assert vector.tensor().tolist() == pytest.approx([(3 + 5 + 7) / 48] * WIDTH, rel=1e-3)
    everything = made(settings())
    assert everything is not None
    assert everything.rows == 7


def test_noise_has_the_unit_that_the_option_says() -> None:
    """Scale × 2 / rows, different at each call."""
    noise = noise_of(3.0, 40, 100_000)
    assert noise.std().item() == pytest.approx(3 * 2 / 40, rel=0.02)
    assert abs(noise.mean().item()) < 0.002
    assert not torch.equal(noise, noise_of(3.0, 40, 100_000))
    assert not noise_of(0.0, 40, 10).any()


def test_a_state_directory_keeps_it_so_that_its_noise_is_drawn_once(tmp_path: Path) -> None:
    """For the same base, rows and settings; a damaged file is replaced."""
    noisy = settings(tmp_path, vector_noise=1.0)
    first = made(noisy)
    assert made(noisy) == first
    assert made(noisy, of="others") != first
    kept = made(noisy)
    assert kept != first
    (tmp_path / FILE).write_text("{")
    again = made(noisy)
    assert again != kept
    assert made(noisy) == again
    plain = made(settings(tmp_path))
    assert plain != again
    assert plain == made(settings())


def test_what_cannot_be_computed_or_kept_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker says why, in a sentence, and trains."""

    def fails(examples: Sequence[Example]) -> torch.Tensor:
        raise RuntimeError("no memory\nat all")

    assert made(settings(), states=fails) == WITHHELD
    assert made(settings(), states=lambda examples: torch.full((3, WIDTH), 1e6)) == WITHHELD
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].endswith("takes back that of an earlier start; the training goes on: no memory")
    (tmp_path / FILE).mkdir()
    with caplog.at_level(logging.WARNING):
        assert made(settings(tmp_path)) == made(settings())
    assert "cannot be kept" in caplog.text


def test_a_worker_can_withhold_it() -> None:
    """Nothing is computed then."""

    def fails(examples: Sequence[Example]) -> torch.Tensor:
        raise AssertionError

    assert made(settings(domain_vector=False), states=fails) == WITHHELD
