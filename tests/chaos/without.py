"""Rules of the protocol that a chaos run can do without, to show that it finds out."""

from collections.abc import Callable
from typing import Any

import consumers.expert
from fedmoe.store.expert import ExpertStore
from producers.checkpoint import StateDir
from tests.protocol.broken import _any_prev


def _no_commit_check() -> None:
    def unchecked(store: Any, pipe: Any, commit: Any, snapshot: Any) -> dict[str, int]:
        pipe.watch(store.keys.meta)
        return {}

    ExpertStore.check_head = unchecked


def _no_prev() -> None:
    consumers.expert.judge_header = _any_prev


def _late_checkpoint() -> None:
    save = StateDir.save

    def late(state_dir: Any, checkpoint: Any) -> None:
        if not checkpoint.ledger.queue:
            save(state_dir, checkpoint)

    StateDir.save = late


RULES: dict[str, Callable[[], None]] = {
    "commit-check": _no_commit_check,
    "prev": _no_prev,
    "checkpoint-first": _late_checkpoint,
}
