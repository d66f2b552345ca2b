"""A data position belongs to the examples that it was counted in, and a worker that goes on notices other ones."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import structure
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import RuleSet, TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection
from fedmoe.util.stopping import Stop
from producers.worker import Worker
from tests.federation import make_expert, serving
from tests.tiny import tiny_config

pytestmark = pytest.mark.one_server

OTHER_EXAMPLES = "differ from those of the checkpoint"


def spec_of(base_model: Path) -> Spec:
    config, lora = tiny_config(), LoraSettings(rank=2)
    return Spec(
        base_model=str(base_model),
        base_config=structure(config),
        layout=adapter_layout(config, lora),
        lora=lora,
    )


def test_other_examples_begin_at_the_first(
    connection: Connection, connect: Callable[[], Connection], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With the same rows, `--learn` makes other examples of them; the same examples go on where they were."""
    rules = RuleSet(training=TrainingSettings(batch_size=2))
    make_expert(connection, "tiny", spec_of(tiny_model_dir), base_fingerprint="", rules=rules)
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    rows.write_text("\n".join([json.dumps({"messages": turns})] * 3))

    def work(**settings: Any) -> str:
        said: list[str] = []
        wanted = WorkerSettings(
            stream="tiny",
            data=rows,
            name="anna",
            state_dir=tmp_path / "state",
            max_steps=3,
            wait=False,
            **settings,
        )
        with serving(connect(), expert="tiny"):
            Worker(connection.settings, wanted, stop=Stop(), report=said.append).run()
        gc.collect()  # the worker that is gone holds the lock of the state directory
        return "\n".join(said)

    work()
    again = work()
    assert OTHER_EXAMPLES not in again
    assert "example 6\n" in again
    other = work(learn="last")
    assert OTHER_EXAMPLES in other
    assert "example 0\n" in other
