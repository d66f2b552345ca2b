"""Patches that take rules about weights in parts out of the project's own code, as in `without`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from fedmoe.protocol.records import Meta
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.expert import ExpertStore
from fedmoe.store.parts import _complete
from fedmoe.store.rollback import Rollback


def complete_or_not(*what: Any) -> bool:
    """A reader that misses a part does not begin again."""
    _complete(*what)
    return True


@contextmanager
def none_written(_: ExpertStore, rollback: Rollback) -> Iterator[Rollback]:
    """Each attempt at a rollback writes its parts."""
    yield rollback


class LooksAtNoParts(ExpertStore):
    """Whether the parts are still there is not looked at."""

    def is_unchanged(self, meta: Meta, *, n_decided: int) -> bool:
        return super().is_unchanged(replace(meta, parts=WeightsParts()), n_decided=n_decided)
