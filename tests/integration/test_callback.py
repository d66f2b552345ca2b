"""FedMoECallback: the real transformers Trainer and the real TRL SFTTrainer as workers of a tiny expert."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fedmoe
from fedmoe.errors import SettingsError
from fedmoe.integrations.transformers import FedMoECallback
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from tests.errors import raises
from tests.federation import serving
from tests.integration.test_member import NAME, adapted, make_tiny, tiny_spec, values, weights_in_redis
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Sixty rows of twelve tokens; the loss is on the last eight of each."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(number))
        labels = ids.clone()
        labels[:4] = -100
        return {"input_ids": ids, "labels": labels}


def arguments(tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "out"), "max_steps": 6, "per_device_train_batch_size": 2, "save_strategy": "no",
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True,
    } | more  # fmt: skip


def test_trainer_is_a_worker(connection: Connection, connect: Connect, tmp_path: Path) -> None:
    """Rows, labels, steps and loss are those of the Trainer; what it trained is the expert."""
    make_tiny(connection)
    model = adapted(connection)
    callback = FedMoECallback(connection.settings, NAME, name="hf", state_dir=tmp_path / "state")
    trainer = Trainer(
        model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=Rows(), callbacks=[callback]
    )
    with serving(connect(), block_ms=20):
        trainer.train()
    assert callback.member is None
    meta = GatewayStore(connection).meta(NAME)
    assert (meta.n_examples, meta.refused) == (6 * 4, 0)
    updates = list(fedmoe.connect(connection.settings).expert(NAME).updates())
    assert {update.worker for update in updates} == {"hf"}
    assert torch.allclose(values(model, tiny_spec()), weights_in_redis(connection), atol=1e-7)
    (left,) = fedmoe.connect(connection.settings).view().experts[0].left
    assert (left.name, left.how) == ("hf", "finished")


def test_labels_and_loss_are_told(connection: Connection, connect: Connect, tmp_path: Path) -> None:
    """A step of four rows has 32 labels; the loss is the one that the Trainer logged last."""
    make_tiny(connection)
    told: list[dict[str, Any]] = []

    class Listening(FedMoECallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            assert self.member is not None
            step = self.member.step
            self.member.step = lambda **done: (told.append(done), step(**done))[1]
            super().on_step_end(*args, **kwargs)
            self.member.step = step

    trainer = Trainer(
        model=adapted(connection), args=TrainingArguments(**arguments(tmp_path)), train_dataset=Rows(),
        eval_dataset=Rows(), callbacks=[Listening(connection.settings, NAME, name="hf")],
    )  # fmt: skip
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 2
    with serving(connect(), block_ms=20):
        trainer.train()
    assert [(step["n_examples"], step["n_tokens"]) for step in told] == [(4, 32)] * 6
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert [step["loss"] for step in told[1:]] == logged[:5]


@pytest.mark.parametrize(
    ("more", "about"),
    [
        (
            {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps"},
            "load_best_model_at_end",
        )
    ],
)
def test_arguments_that_take_back_what_was_trained(
    connection: Connection, tmp_path: Path, more: dict[str, Any], about: str
) -> None:
    make_tiny(connection)
    callback = FedMoECallback(connection.settings, NAME)
    trainer = Trainer(
        model=adapted(connection), args=TrainingArguments(**arguments(tmp_path) | more), train_dataset=Rows(),
        eval_dataset=Rows(), callbacks=[callback],
    )  # fmt: skip
    with raises(SettingsError, about=about):
        trainer.train()


def test_trainer_of_full_weights_is_refused(connection: Connection, tmp_path: Path) -> None:
    """Before the first step: nothing is trained, nobody has joined."""
    make_tiny(connection)
    trainer = Trainer(
        model=tiny_model(), args=TrainingArguments(**arguments(tmp_path)), train_dataset=Rows(),
        callbacks=[FedMoECallback(connection.settings, NAME)],
    )  # fmt: skip
    with raises(SettingsError, about="adapter"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert fedmoe.connect(connection.settings).view().experts[0].workers == ()


@pytest.mark.parametrize("packing", [False, True])
def test_sft_trainer_is_a_worker(
    connection: Connection, connect: Connect, tmp_path: Path, packing: bool
) -> None:
    """TRL's own rows, collator and loss; with packing, a row of the batch is several of the data."""
    from datasets import Dataset as Table
    from trl import SFTConfig, SFTTrainer

    make_tiny(connection)
    base = save_tiny_model(tmp_path / "base")
    rows = Table.from_list([{"prompt": f"say {n}", "completion": f" {n} {n}"} for n in range(40)])
    model = get_peft_model(tiny_model(), fedmoe.connect(connection.settings).expert(NAME).lora_config())
    trainer = SFTTrainer(
        model=model, processing_class=tiny_tokenizer(), train_dataset=rows,
        args=SFTConfig(**arguments(tmp_path), bf16=False, max_length=64, packing=packing),
        callbacks=[FedMoECallback(connection.settings, NAME, name="trl")],
    )  # fmt: skip
    with serving(connect(), block_ms=20):
        trainer.train()
    meta = GatewayStore(connection).meta(NAME)
    assert meta.refused == 0
    assert meta.n_examples == 24 if not packing else meta.n_examples > 24
    assert torch.allclose(values(model, tiny_spec()), weights_in_redis(connection), atol=1e-7)
    assert base.exists()
    assert json.loads((base / "config.json").read_text())["model_type"] == "qwen2"


def test_training_that_failed_can_be_tried_again(
    connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """In a notebook: the same callback, the same state directory; the rows of the failed step do not count."""
    make_tiny(connection)

    class Fails(TrainerCallback):
        fails = True

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            if self.fails:
                raise ZeroDivisionError

    fails = Fails()
    callback = FedMoECallback(connection.settings, NAME, name="hf", state_dir=tmp_path / "state")
    trainer = Trainer(
        model=adapted(connection), args=TrainingArguments(**arguments(tmp_path)), train_dataset=Rows(),
        callbacks=[callback, fails],
    )  # fmt: skip
    with serving(connect(), block_ms=20):
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        fails.fails = False
        trainer.train()
        callback.leave()
    assert GatewayStore(connection).meta(NAME).n_examples == 24
