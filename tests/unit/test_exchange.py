"""producers.exchange: a copy is that of whole steps, also when the training does not come to their end."""

import torch

from producers.exchange import Exchange
from producers.ledger import Change, Trained
from tests.counting import Counter


def test_a_copy_within_a_step_has_the_corrections_that_wait() -> None:
    """The adapter itself does not move under a step that calculates with it."""
    trainer = Counter(torch.zeros(3))
    exchange = Exchange(trainer, with_optimizer=False)
    assert exchange.take_step(trainer.step) is not None
    exchange.correct(Change(correction=torch.tensor([1.0, 2.0, 3.0])))
    exchange.request(consume=True)
    cut = exchange.take_now()
    assert cut is not None
    assert cut.local.tolist() == [2.0, 3.0, 4.0]
    assert (cut.position, cut.trained.steps, exchange.steps_left) == (1, 1, 0)
    assert trainer.flat.tolist() == [1.0, 1.0, 1.0]
    assert exchange.take_step(trainer.step) is None
    assert trainer.flat.tolist() == [1.0, 1.0, 1.0]


def test_a_copy_within_a_step_after_the_history_was_replaced() -> None:
    """What was trained on the old history counts no more, and the data position is that which Redis knows."""
    trainer = Counter(torch.zeros(2))
    exchange = Exchange(trainer, with_optimizer=False)
    exchange.take_step(trainer.step)
    exchange.correct(Change(correction=torch.tensor([5.0, 6.0]), replace=True, position="40"))
    exchange.request(consume=False)
    cut = exchange.take_now()
    assert cut is not None
    assert (cut.local.tolist(), cut.position, cut.trained.steps) == ([5.0, 6.0], 40, 0)


def test_what_a_change_drops_is_told_when_it_is_dropped() -> None:
    """Training went on between the pull and the boundary; what an earlier process trained is told, too."""
    trainer, told = Counter(torch.zeros(2)), list[int]()
    exchange = Exchange(trainer, with_optimizer=False, trained=Trained(steps=3))
    exchange.take_step(trainer.step)
    exchange.correct(Change(correction=torch.zeros(2), replace=True), told.append)
    exchange.take_step(trainer.step)
    assert told == []
    exchange.boundary()
    assert (told, exchange.dropped, exchange.steps_left) == ([5], 2, 0)
    exchange.correct(Change(correction=torch.zeros(2), replace=True))
    exchange.correct(Change(correction=torch.zeros(2), replace=True), told.append)
    exchange.take_step(trainer.step)
    exchange.boundary()
    assert (told, exchange.dropped) == ([5, 0], 3)


def test_what_the_last_copy_leaves_out_is_told_once() -> None:
    """The change waits for a boundary that comes too late for the copy."""
    trainer, told = Counter(torch.zeros(2)), list[int]()
    exchange = Exchange(trainer, with_optimizer=False)
    exchange.take_step(trainer.step)
    exchange.correct(Change(correction=torch.zeros(2), replace=True), told.append)
    exchange.request(consume=True)
    assert exchange.take_now() is not None
    exchange.boundary()
    assert (told, exchange.dropped) == ([1], 1)
