"""What a worker trains on is checked before it is trained on."""

from pathlib import Path

import pytest
import torch

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.jsonl import open_data
from fedmoe.data.validation_split import LEAST_ROWS
from fedmoe.errors import BaseModelError, DataError
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, structure
from fedmoe.model.tokenizer import tokenizer_fingerprint
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.settings import WorkerSettings
from producers.material import Material, prepare
from tests.errors import raises
from tests.federation import first_meta
from tests.tiny import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer


def prepared(base: Path, rows: str, **pinned: str) -> Material:
    """What a worker prepares of these rows, for an expert of the tiny model."""
    config, lora = tiny_config(), LoraSettings(rank=2)
    layout = adapter_layout(config, lora)
    spec = Spec(base_model=str(base), base_config=structure(config), layout=layout, lora=lora)
    meta = first_meta(spec, **{"base_fingerprint": "", **pinned})
    (base / "rows.jsonl").write_text(rows)
    settings = WorkerSettings(stream="sql_expert", data=base / "rows.jsonl", name="alice")
    bad_rows = BadRows(report=print, file=None, fail=False)
    data = open_data(settings.data, bad_rows)
    return prepare(
        settings, spec, meta, data, bad_rows, max_length=512, cache=None, stopped=lambda: False, report=print,
    )  # fmt: skip


ROWS = '{"prompt": "a", "completion": "b"}\n{"prompt": "what is <|extra|>?", "completion": "x"}\n'


def test_what_a_worker_brings(tmp_path: Path) -> None:
    """The weights' fingerprint and the tokenizer's are of what lies there."""
    material = prepared(save_tiny_model(tmp_path), ROWS)
    assert material.identity.fingerprint == fingerprint(tiny_model())
    assert material.identity.tokenizer == tokenizer_fingerprint(tiny_tokenizer())
    assert (material.n_examples, material.identity.chat_template) == (2, "")


def test_a_token_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Not an IndexError in the first step that meets it."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|extra|>"])
    tokenizer.save_pretrained(save_tiny_model(tmp_path))
    with raises(DataError, about="token"):
        prepared(tmp_path, ROWS)


def test_a_tokenizer_that_is_not_the_pinned_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the weights are loaded."""
    monkeypatch.setattr("producers.material.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    pinned = tokenizer_fingerprint(tiny_tokenizer()).replace("template:", "template:f")
    with raises(BaseModelError, about="template"):
        prepared(save_tiny_model(tmp_path), ROWS, tokenizer=pinned, tokenizer_by="worker bob")


def test_trainers_of_one_model_need_no_names(tmp_path: Path) -> None:
    """An expert may be called like an attribute of a torch module ("type"), which peft could not call an adapter."""
    material = prepared(save_tiny_model(tmp_path), ROWS)
    config, lora = tiny_config(), LoraSettings(rank=2)
    spec = Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )
    first, second = (material.make_trainer(spec, TrainingSettings()) for _ in range(2))
    before = second.flat.clone()
    assert first.step().applied
    assert torch.equal(second.flat, before)
    assert second.step().applied


def test_rows_that_are_held_back_are_measured_and_not_trained_on(tmp_path: Path) -> None:
    """Of expert and gateway alike, on one base model: each has a trainer and an evaluator, and all work by turns."""
    rows = "".join(f'{{"prompt": "add {n}", "completion": "{n}"}}\n' for n in range(120))
    material = prepared(save_tiny_model(tmp_path), rows)
    assert material.n_examples == 120 - LEAST_ROWS
    config, lora = tiny_config(), LoraSettings(rank=2)
    spec = Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )
    parts = [
        (material.make_trainer(spec, TrainingSettings()), material.make_evaluator(spec, TrainingSettings()))
        for _ in range(2)
    ]
    for trainer, evaluator in parts:
        before = trainer.flat.clone()
        assert trainer.step().applied
        assert evaluator is not None
        evaluator.begin(3, trainer.flat + 0.01)
        while (measured := evaluator.step()) is None:
            assert trainer.step().applied
        assert (measured.version, measured.rows, len(measured.rows_set)) == (3, LEAST_ROWS, 8)
        assert not torch.equal(trainer.flat, before)
