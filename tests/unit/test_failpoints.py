"""The failpoints of the chaos run are at methods that there are: one that was moved or renamed is never reached."""

import importlib
import inspect
import pkgutil

import pytest

import fedmoe.store
from tests.chaos.failpoints import AGGREGATOR, WORKER

MODULES = [f"fedmoe.store.{one.name}" for one in pkgutil.iter_modules(fedmoe.store.__path__)]
CLASSES = {
    name: one
    for module in (*MODULES, "producers.checkpoint")
    for name, one in inspect.getmembers(importlib.import_module(module), inspect.isclass)
}


@pytest.mark.parametrize("name", sorted({*WORKER, *AGGREGATOR}))
def test_the_class_defines_the_method(name: str) -> None:
    """Itself: a point is named by the class in which its code stands."""
    kind, method = name.split(".")
    assert method in vars(CLASSES[kind])
