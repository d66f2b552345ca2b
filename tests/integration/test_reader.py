"""`fedmoe.connect`: reading a federation from Python."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import fedmoe
from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import SettingsError, UnknownExpertError
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, make_expert, serve, serving, small_spec
from tests.integration.test_member import NAME, adapted, make_tiny, tiny_spec, values, weights_in_redis
from tests.tiny import tiny_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "python.md"

pytestmark = pytest.mark.one_server


def test_expert_is_read(connection: Connection) -> None:
    """Weights by name, what it is, its rules, and each applied update in order."""
    expert = make_expert(connection, spec=small_spec())
    worker = ScriptedWorker(connection, small_spec())
    for _ in range(3):
        worker.push(0.5)
        assert serve(expert) == ["applied"]
        worker.pull()
    read = fedmoe.connect(connection.settings).expert("sql_expert")
    weights = read.weights()
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == dict(LAYOUT.tensors)
    assert torch.equal(torch.cat([weights[name].flatten() for name, _ in LAYOUT.tensors]), expert.buffer.flat)
    assert [(one.worker, one.seq, one.version) for one in read.updates()] == [
        ("alice", n, n) for n in (1, 2, 3)
    ]
    assert read.adapter().versions == {"sql_expert": 3}
    assert (read.meta.version, read.rules.number) == (3, 1)
    assert read.spec.digest == small_spec().digest
    assert fedmoe.connect(connection.settings).experts() == {"sql_expert": 1.0}


def test_adapter_is_saved_for_peft(connection: Connection, tmp_path: Path) -> None:
    """What PEFT loads from there, and what lora_config makes, have the expert's tensors."""
    make_tiny(connection)
    fedmoe.connect(connection.settings).expert(NAME).adapter().save(tmp_path / "one")
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "one"))
    assert torch.equal(values(loaded, tiny_spec()), weights_in_redis(connection))
    assert values(adapted(connection), tiny_spec()).shape == weights_in_redis(connection).shape


def test_gateway_is_read(connection: Connection, connect: Callable[[], Connection], tmp_path: Path) -> None:
    """Not there yet: said why; then with the versions that it was built from."""
    make_tiny(connection)
    federation = fedmoe.connect(connection.settings)
    with pytest.raises(UnknownExpertError):
        federation.gateway()
    GatewayBuilder(connect(), GatewaySettings(), holder="one", lease_s=5.0).refresh()
    gateway = federation.gateway()
    assert gateway.versions == {NAME: 0}
    gateway.save(tmp_path / "gw")
    PeftModel.from_pretrained(tiny_model(), str(tmp_path / "gw"))
    assert federation.view().merged.rank == gateway.config["r"]


def test_bad_url_and_unknown_expert_are_sentences(connection: Connection) -> None:
    make_expert(connection)
    with raises(SettingsError, about="scheme"):
        fedmoe.connect("http://here")
    with raises(UnknownExpertError, about="docs_expert"):
        fedmoe.connect(connection.settings).expert("docs_expert").weights()


def test_the_pages_python_runs(
    connection: Connection, connect: Callable[[], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block of docs/python.md, in order, as a reader would run it."""
    make_tiny(connection)
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(24).reshape(2, 12)
    arguments = TrainingArguments(
        output_dir="out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no"
    )
    names = {
        "url": connection.settings.url, "base": tiny_model(), "get_peft_model": get_peft_model, "torch": torch,
        "batches": [{"input_ids": ids, "labels": ids}] * 3, "Trainer": Trainer, "arguments": arguments,
        "rows": [{"input_ids": row, "labels": row} for row in ids] * 8,
    }  # fmt: skip
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    with serving(connect(), block_ms=20):
        for block in blocks:
            exec(block, names)  # noqa: S102  # that is the test
    updates = list(fedmoe.connect(connection.settings).expert(NAME).updates())
    assert {update.worker for update in updates} == {"own", "hf"}
    assert (tmp_path / "sql" / "adapter_model.safetensors").exists()
