"""Exports and what base models bring: several chat templates, sampling values; and a disk that fills up meanwhile."""

import json
import resource
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import SettingsError
from fedmoe.model.tokenizer import tokenizer_fingerprint
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_expert
from fedmoe.tools.export_files import write
from fedmoe.tools.shape import with_tokenizer
from fedmoe.tools.whole_model import write_model
from tests.errors import raises
from tests.integration.test_export_forms import TEMPLATE, Make, make
from tests.processes import fedmoe_here
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer

__all__ = ["make"]  # a fixture
pytestmark = pytest.mark.one_server


def test_named_chat_templates_go_with_it(make: Make, connection: Connection, tmp_path: Path) -> None:
    """A tokenizer with several of them keeps them in a folder."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "rag": TEMPLATE}
    base = save_tiny_model(tmp_path / "base")
    tokenizer.save_pretrained(base)
    export = make(tokenizer=tokenizer_fingerprint(AutoTokenizer.from_pretrained(base)))
    out = tmp_path / "out"
    with_files, without = with_tokenizer(export, str(base))
    assert not without
    write(out, with_files)
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
    assert (out / "additional_chat_templates" / "rag.jinja").read_text() == TEMPLATE


def test_a_merge_of_experts_with_different_chat_templates_says_so(
    make: Make, connection: Connection, tmp_path: Path
) -> None:
    """It has the base model's own, with which none of them may have been trained."""
    make("a")
    make("b", template=TEMPLATE)
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    command = ("gateway", "export", "--redis", connection.settings.url, "--out", str(tmp_path / "out"))
    said = "merged gateway: its experts were trained with different chat templates (a, b), so it has the base model's"
    assert said in fedmoe_here(*command).stderr
    connection.client.hset(connection.keys.experts, "b", "0")
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    assert "chat templates" not in fedmoe_here(*command).stderr


def test_a_served_version_is_no_target(make: Make, connection: Connection, tmp_path: Path) -> None:
    """A server may have loaded it under its name, which stands for one content."""
    other = make("b")
    write(tmp_path / "gateway-v1-00000000", make())
    (tmp_path / "current").symlink_to("gateway-v1-00000000")
    write(tmp_path / "gateway-v1-00000000", make("c"))  # releases of one's own may have such a link, too
    write(tmp_path / "gateway-v1-00000000", read_expert(GatewayStore(connection), "a"))
    (tmp_path / ".lock").touch()
    for target in ("gateway-v1-00000000", "current"):
        with raises(SettingsError, about="current"):
            write(tmp_path / target, other, force=True)
        assert '"name": "a"' in (tmp_path / target / "fedmoe.json").read_text()


def test_sampling_values_of_the_base_model_stay(make: Make, tmp_path: Path) -> None:
    """Many a checkpoint has them beside do_sample false, which transformers loads and does not save."""
    base = save_tiny_model(tmp_path / "base")
    own = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (base / "generation_config.json").write_text(json.dumps(own))
    write_model(tmp_path / "out", make(), base_model=str(base))
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {"temperature": 0.6, "top_p": 0.9}.items() <= written.items()
    assert not written.get("do_sample")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.temperature == 0.6


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(make: Make, tmp_path: Path) -> None:
    """Safetensors has an error of its own for it."""
    export, before = make(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with raises(SettingsError, about="disk"):
            write_model(tmp_path / "out", export)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
