"""Creating experts: from a config alone, one initialisation for all, and never over something that exists."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

import fedmoe.model.describe
import fedmoe.protocol.spec
from consumers.create import SpecRequest, base_model, beginning, ensure_experts, parse_experts
from fedmoe.errors import BaseModelError, RedisUnavailableError, SettingsError, SpecError
from fedmoe.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedmoe.protocol.layout import AdapterBuffer, stamped
from fedmoe.protocol.lora import LoraSettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.util.template_file import template_digest
from tests.errors import raises
from tests.tiny import CHAT_TEMPLATE

pytestmark = pytest.mark.one_server


@pytest.fixture
def described_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base model is looked at in this process, by the same program: a process of its own takes 5 s to start."""

    def ask(question: Mapping[str, Any], stop: object) -> "subprocess.CompletedProcess[str]":
        with monkeypatch.context() as standard, redirect_stdout(StringIO()) as out:
            standard.setattr(sys, "stdin", StringIO(json.dumps(question)))
            fedmoe.model.describe.main()
        return subprocess.CompletedProcess([], 0, out.getvalue(), "")

    monkeypatch.setattr(base_model, "ask_process", ask)


here = pytest.mark.usefixtures("described_here")


def request(base: Path, **changes: object) -> SpecRequest:
    return SpecRequest(base_model=str(base), lora=LoraSettings(rank=2), **changes)


def test_experts_share_one_initialisation(connection: Connection, tiny_model_dir: Path) -> None:
    """Version 0 of every expert is the same: random A, B = 0; and the fingerprint of local weights is pinned."""
    assert ensure_experts(connection, {"a": 1.0, "b": 2.0}, request(tiny_model_dir)) == ["a", "b"]
    store = GatewayStore(connection)
    (meta, first), (_, second) = store.read("a"), store.read("b")
    assert stamped(first, "") == stamped(second, "")
    assert store.experts() == {"a": 1.0, "b": 2.0}
    assert (meta.version, meta.base_fingerprint_by, meta.tokenizer_by) == (0, "aggregator", "aggregator")
    assert (meta.reach > 0.95, meta.not_reached) == (True, "")
    assert meta.tokenizer == tokenizer_fingerprint(load_tokenizer(str(tiny_model_dir)))
    spec = store.spec("a")
    buffer = AdapterBuffer(spec.layout)
    buffer.load(first)
    for name, tensor in spec.layout.views(buffer.flat).items():
        assert bool(tensor.any()) == ("lora_A" in name)
    assert meta.rules.aggregation.max_norm == pytest.approx(
        10 * float(torch.linalg.vector_norm(buffer.flat)), abs=1e-3
    )


@here
def test_config_alone_is_enough(connection: Connection, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The aggregator's machine need not have the weights; then nobody has pinned the fingerprint yet."""
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    ensure_experts(connection, {"a": 1.0}, request(tmp_path))
    meta = GatewayStore(connection).meta("a")
    assert (meta.base_fingerprint, meta.tokenizer) == ("", "")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    connection.client.flushall()
    ensure_experts(connection, {"a": 1.0}, request(tmp_path, chat_template=template))
    assert GatewayStore(connection).meta("a").tokenizer == f"template:{template_digest(template)}"


@here
def test_existing_experts_are_left_alone(connection: Connection, tiny_model_dir: Path) -> None:
    """A second start changes nothing, needs no model, and names a setting that was typed and differs."""
    ensure_experts(connection, {"a": 1.0}, request(tiny_model_dir))
    before = connection.client.hgetall("fedmoe:{a}:meta")
    assert ensure_experts(connection, {"a": 1.0}, SpecRequest()) == []
    assert connection.client.hgetall("fedmoe:{a}:meta") == before
    typed = SpecRequest(lora=LoraSettings(rank=4), explicit=frozenset({"rank"}))
    with raises(SpecError, about="rank"):
        ensure_experts(connection, {"a": 1.0}, typed)


@here
def test_one_federation_has_one_base(connection: Connection, tiny_model_dir: Path) -> None:
    """An expert with another adapter shape has no place in the same gateway."""
    ensure_experts(connection, {"a": 1.0}, request(tiny_model_dir))
    other = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=4))
    with raises(SpecError, about="lora"):
        ensure_experts(connection, {"b": 1.0}, other)
    assert not ExpertStore(connection, "b").exists()


@here
def test_creation_is_whole_or_not_at_all(
    connection: Connection, connect: Callable[[], Connection], tiny_model_dir: Path
) -> None:
    """Two aggregators that start at once create one expert."""
    ensure_experts(connection, {"a": 1.0}, request(tiny_model_dir))
    meta, weights = GatewayStore(connection).read("a")
    spec = GatewayStore(connection).spec("a")
    late = ExpertStore(connect(), "a")
    assert late.create(spec, meta, memoryview(weights), gateway_weight=5.0) is False
    assert GatewayStore(connection).experts() == {"a": 1.0}


@here
@pytest.mark.parametrize(
    ("content", "about"),
    [
        (None, "config.json"),
        ("{", "base_model"),
        (json.dumps({"model_type": "nonsense"}), "base_model"),
        (json.dumps({"model_type": "t5"}), "architectures"),
    ],
)
def test_base_that_is_none_is_one_sentence(
    connection: Connection, tmp_path: Path, content: str | None, about: str
) -> None:
    """A directory without config, with a broken one, or with a model that is not causal."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with raises(BaseModelError, about=about) as error:
        ensure_experts(connection, {"a": 1.0}, request(tmp_path))
    assert "Traceback" not in str(error.value)


@pytest.fixture
def asked(described_here: None, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each look at a base model, whether its weights were to be read; nothing is known from other tests."""
    looks: list[bool] = []
    ask = base_model.ask_process

    def counted(question: Mapping[str, Any], stop: threading.Event) -> Any:
        looks.append(question["read_weights"])
        return ask(question, stop)

    monkeypatch.setattr(base_model, "ask_process", counted)
    monkeypatch.setattr(base_model, "described", {})
    return looks


def test_creation_that_fails_looks_at_the_base_model_once(
    connection: Connection, tiny_model_dir: Path, asked: list[bool]
) -> None:
    """A full Redis refuses the expert; creating it is tried again until there is room."""
    wanted = request(tiny_model_dir, new_lineage=True)
    connection.client.config_set("maxmemory", 1)
    try:
        for _ in range(3):
            with raises(RedisUnavailableError, about="maxmemory"):
                ensure_experts(connection, {"a": 1.0}, wanted)
    finally:
        connection.client.config_set("maxmemory", 0)
    assert ensure_experts(connection, {"a": 1.0}, wanted) == ["a"]
    assert len(asked) == 1


def test_base_model_that_was_put_right_is_looked_at_again(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path, asked: list[bool]
) -> None:
    """Only a description is remembered, no failure."""
    wanted = request(tmp_path, new_lineage=True)
    with raises(BaseModelError, about="config.json"):
        ensure_experts(connection, {"a": 1.0}, wanted)
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    assert ensure_experts(connection, {"a": 1.0}, wanted) == ["a"]
    assert len(asked) == 2


@here
def test_unknown_target_is_named(connection: Connection, tiny_model_dir: Path) -> None:
    """LoRA targets that the model does not have."""
    wrong = SpecRequest(base_model=str(tiny_model_dir), lora=LoraSettings(rank=2, targets=("q_proj", "wq")))
    with raises((BaseModelError, SettingsError), about="targets"):
        ensure_experts(connection, {"a": 1.0}, wrong)


def without_template(base: Path, copy: Path) -> Path:
    """A copy of a base model whose tokenizer has no chat template, without its weights."""
    shutil.copytree(base, copy, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    return copy


@here
def test_template_is_the_experts(connection: Connection, tiny_model_dir: Path, tmp_path: Path) -> None:
    """In the spec; a later start with another one typed is refused, and so is an expert beside it without."""
    base = without_template(tiny_model_dir, tmp_path / "bare")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ensure_experts(connection, {"a": 1.0}, request(base, chat_template=template))
    assert GatewayStore(connection).spec("a").chat_template == template
    typed = request(base, chat_template=CHAT_TEMPLATE, explicit=frozenset({"chat_template"}))
    with raises(SpecError, about="chat_template"):
        ensure_experts(connection, {"a": 1.0}, typed)
    with raises(SpecError, about="chat_template"):
        ensure_experts(connection, {"b": 1.0}, request(base))


@here
def test_template_that_fails_is_refused(connection: Connection, tiny_model_dir: Path) -> None:
    """Before the expert is there, in a sentence about the setting."""
    with raises(SettingsError, about="chat_template"):
        ensure_experts(connection, {"a": 1.0}, request(tiny_model_dir, chat_template="{% if %}"))
    assert not ExpertStore(connection, "a").exists()


@here
def test_base_without_template_is_said(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever creates the expert can give one now; else the first worker has to."""
    ensure_experts(connection, {"a": 1.0}, request(without_template(tiny_model_dir, tmp_path / "bare")))
    assert "bare has no chat template: start the first worker with --chat-template FILE" in caplog.text


@pytest.mark.parametrize("texts", [["gateway"], ["a:b"], ["a=x"], ["a=-1"], ["a=inf"], [""], ["a" * 65]])
def test_expert_names_and_weights_are_checked(texts: list[str]) -> None:
    """Names that would break the keys, and weights that are none."""
    with pytest.raises(SettingsError):
        parse_experts(texts)


@here
def test_adapter_that_is_too_large_is_refused_before_it_is_made(
    connection: Connection, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its initial weights, of which the default bound of norms is made, would take all memory first."""
    monkeypatch.setattr(fedmoe.protocol.spec, "MAX_STRING_BYTES", 1000)
    monkeypatch.setattr(beginning, "initial_weights", lambda *_: pytest.fail("it was made"))
    with raises(SettingsError, about="layout"):
        ensure_experts(connection, {"a": 1.0}, request(tiny_model_dir))
    assert not connection.client.keys()
