"""`fedmoe gateway serve` and `chat` beside an expert of another base model: it is left out, with one sentence."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from consumers.gateway.builder import GatewayBuilder
from fedmoe.errors import BaseModelError, RequestError
from fedmoe.protocol.names import GATEWAY
from fedmoe.settings import AnswerSettings, GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_gateway
from fedmoe.tools.serve.engine import Engine
from fedmoe.tools.serve.requests import ChatRequest
from tests.errors import raises
from tests.federation import make_expert
from tests.integration.test_serve import engine_of, make
from tests.processes import fedmoe_here
from tests.tiny import save_tiny_model, tiny_tokenizer

pytestmark = pytest.mark.one_server

ABOUT = {"shape": "hidden_size", "weights": "fingerprint", "tokenizer": "vocabulary"}


def make_foreign(connection: Connection, base: Path, name: str, *, differs: str, weight: float = 1.0) -> None:
    """An expert of other weights of the same shape, of another shape, or of another tokenizer."""
    make(connection, base, name, seed=9)
    keys = connection.keys.expert(name)
    if differs == "shape":
        spec = GatewayStore(connection).spec(name)
        other = replace(spec, base_model="nobody/large", base_config=spec.base_config | {"hidden_size": 4096})
        connection.client.delete(*connection.client.keys(f"fedmoe:{{{name}}}:*"))
        make_expert(connection, name, spec=other, version=1)
    elif differs == "weights":
        connection.client.hset(keys.meta, "base_fingerprint", "f" * 16)
    else:
        connection.client.hset(keys.meta, "tokenizer", "vocabulary:ffffffff")
    connection.client.hset(connection.keys.experts, name, str(weight))


@pytest.mark.parametrize("differs", ["shape", "weights", "tokenizer"])
def test_an_expert_of_another_base_model_is_left_out(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture, differs: str
) -> None:
    """Its weight in the merge is 0, and it is the first by its name; it is named once, also after its next version."""
    make(connection, tiny_model_dir, "b", seed=1)
    make_foreign(connection, tiny_model_dir, "a", differs=differs, weight=0.0)
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    export = read_gateway(GatewayStore(connection))
    assert export.config["base_model_name_or_path"] == str(tiny_model_dir)
    engine = engine_of(connection)
    assert [one.name for one in engine.models()] == [GATEWAY, "b", "base"]
    connection.client.hset(
        connection.keys.expert("a").meta, mapping={"version": 2, "weights_commit": "e" * 16}
    )
    engine.refresh()
    said = [r.message for r in caplog.records if "left out" in r.message]
    assert len(said) == 1
    assert said[0].startswith("a: it is left out, because it cannot be served beside the others: ")
    with raises(BaseModelError, about=ABOUT[differs]):
        Engine(GatewayStore(connection), AnswerSettings(device="cpu"), report=lambda _: None, wanted="a")


def test_one_that_comes_later_is_left_out(
    connection: Connection, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was added while the others are served; without any gateway the base model of most experts is loaded."""
    make(connection, tiny_model_dir, "a", seed=1)
    engine = engine_of(connection)
    make_foreign(connection, tiny_model_dir, "b", differs="weights")
    engine.refresh()
    for one in (engine, engine_of(connection)):
        assert [served.name for served in one.models()] == ["a", "base"]
    assert caplog.text.count("b: it is left out, because") == 2


def test_without_a_gateway_the_base_model_of_most_experts_is_loaded(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Not the first expert's; `fedmoe evaluate` has the same rule."""
    other = save_tiny_model(tmp_path / "other", seed=1)
    make(connection, other, "a", seed=1)
    connection.client.hset(connection.keys.expert("a").meta, "base_fingerprint", "f" * 16)
    for number, name in enumerate("bc"):
        make(connection, tiny_model_dir, name, seed=number)
    assert [one.name for one in engine_of(connection).models()] == ["b", "c", "base"]


SILENT = (
    "{% for m in messages if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)


def test_a_system_message_is_written_as_in_training(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """If the template drops it, it goes into the question; a message that is dropped all the same is refused."""
    shutil.copytree(tiny_model_dir, tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SILENT
    tokenizer.save_pretrained(tmp_path / "base")
    make(connection, tmp_path / "base", "a", seed=1)
    engine = engine_of(connection)
    question = {"role": "user", "content": "how many?"}

    def answer(*messages: dict[str, str]) -> tuple[int, str]:
        texts: list[str] = []
        request = ChatRequest(model="a", messages=messages, max_tokens=8, temperature=0.0)
        done = engine.answer(request, on_start=lambda _: None, on_text=texts.append)
        return done.prompt_tokens, "".join(texts)

    system = {"role": "system", "content": "be brief"}
    merged = {"role": "user", "content": "be brief\n\nhow many?"}
    assert answer(system, question) == answer(merged) != answer(question)
    with raises(RequestError, about="messages") as refused:
        answer(question, {"role": "tool", "content": "3"}, system)
    assert str(refused.value) == "the chat template drops the tool message"


@pytest.mark.parametrize("differs", ["shape", "weights", "tokenizer"])
@pytest.mark.parametrize("others", ["none", "trained gateway"])
def test_all_experts_or_the_gateway_of_another_base_model_is_one_sentence(
    connection: Connection, tiny_model_dir: Path, differs: str, others: str
) -> None:
    """The base model at hand is not theirs; an expert that fits it is no substitute for the gateway."""
    make_foreign(connection, tiny_model_dir, "a" if others == "none" else GATEWAY, differs=differs)
    if others != "none":
        make(connection, tiny_model_dir, "b", seed=1)
    settings = AnswerSettings(device="cpu", base_model=str(tiny_model_dir))
    with raises(BaseModelError, about=ABOUT[differs]):
        Engine(GatewayStore(connection), settings, report=lambda _: None)


def test_the_merged_gateway_of_another_base_model_is_one_sentence(
    connection: Connection, tiny_model_dir: Path
) -> None:
    """All experts in it are of another one than the base model at hand, which another expert has."""
    make_foreign(connection, tiny_model_dir, "a", differs="weights")
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    make(connection, tiny_model_dir, "b", seed=1)
    with raises(BaseModelError, about="fingerprint"):
        Engine(GatewayStore(connection), AnswerSettings(device="cpu"), report=lambda _: None)


@pytest.mark.parametrize("key", ["", " ", "clé"])
def test_a_key_that_no_client_can_send_is_refused(connection: Connection, key: str) -> None:
    """An empty one is an unset variable, and would let everybody in."""
    done = fedmoe_here("gateway", "serve", "--redis", connection.settings.url, "--api-key", key)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "fedmoe: --api-key must have printable ASCII characters only, and at least one"
    )
