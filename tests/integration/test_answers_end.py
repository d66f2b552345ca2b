"""Answers end where the workers' rows end, also on a base model whose own settings name another token."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GenerationConfig

from fedmoe.settings import AnswerSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_gateway
from fedmoe.tools.serve.engine import Engine
from fedmoe.tools.serve.requests import ChatRequest
from fedmoe.tools.whole_model import write_model
from tests.processes import fedmoe_here
from tests.tiny import END, PAD, save_tiny_model, tiny_tokenizer
from tests.tiny_federation import make_federation

pytestmark = pytest.mark.one_server

END_ID, PAD_ID = tiny_tokenizer().convert_tokens_to_ids([END, PAD])


@pytest.fixture
def base(connection: Connection, tmp_path: Path) -> Path:
    """A base model that was never trained to chat: its generation ends at the end of a document. It says END only."""
    base = save_tiny_model(tmp_path / "base")
    others = [i for i in range(len(tiny_tokenizer())) if i != END_ID]
    GenerationConfig(eos_token_id=PAD_ID, pad_token_id=PAD_ID, suppress_tokens=others).save_pretrained(base)
    make_federation(connection, base)
    return base


@pytest.mark.parametrize("model", ["gateway", "base"])
def test_an_answer_of_the_endpoint_ends(connection: Connection, base: Path, model: str) -> None:
    settings = AnswerSettings(device="cpu", precision="fp32")
    engine = Engine(GatewayStore(connection), settings, report=lambda _: None)
    engine.refresh()
    question = ChatRequest(model=model, messages=({"role": "user", "content": "q"},), max_tokens=9)
    finish = engine.answer(question, on_start=lambda _: None, on_text=lambda _: None)
    assert (finish.reason, finish.completion_tokens) == ("stop", 1)


def test_a_whole_model_says_where_its_answers_end(connection: Connection, base: Path, tmp_path: Path) -> None:
    """As vLLM and TGI read it."""
    write_model(tmp_path / "model", read_gateway(GatewayStore(connection)))
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert sorted(written["eos_token_id"]) == sorted([END_ID, PAD_ID])


def test_an_answer_of_a_routers_script_ends(connection: Connection, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    url = connection.settings.url
    done = fedmoe_here("gateway", "export", "--redis", url, "--out", str(out), "--router", "arrow")
    assert done.returncode == 0, done.stderr
    asked = "import load; print(load.end_ids())"
    ends = subprocess.run(
        [sys.executable, "-c", asked, "prompt"], cwd=out, capture_output=True, text=True, check=False
    )
    assert json.loads(ends.stdout) == [END_ID, PAD_ID], ends.stderr
