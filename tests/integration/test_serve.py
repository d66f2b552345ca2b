"""`fedmoe gateway serve` and `chat`, asked by OpenAI's own client: the model that was named answers, in its version."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel

from consumers.gateway.builder import GatewayBuilder
from fedmoe.cli.main import cli
from fedmoe.errors import UnknownExpertError, UnknownModelError
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, structure
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.spec import Spec
from fedmoe.settings import AnswerSettings, GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_expert, read_gateway
from fedmoe.tools.export_files import write
from fedmoe.tools.http_server import HttpServer
from fedmoe.tools.serve.app import Endpoint
from fedmoe.tools.serve.chat import Chat
from fedmoe.tools.serve.engine import Engine, Finish
from fedmoe.tools.serve.requests import ChatRequest
from tests.errors import raises
from tests.federation import make_expert
from tests.processes import eventually, fedmoe_here, running, terminate
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.one_server

QUESTION: Any = {"role": "user", "content": "How many users are there?"}


def make(
    connection: Connection, base: Path, name: str, *, seed: int, rank: int = 4, version: int = 1
) -> None:
    """An expert of the tiny model with large random weights, so that each answers something of its own."""
    for key in connection.client.keys(f"fedmoe:{{{name}}}:*"):
        connection.client.delete(key)
    config, lora = tiny_config(), LoraSettings(rank=rank)
    spec = Spec(
        base_model=str(base), base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )
    weights = initial_weights(spec.layout, 0) + 0.2 * randn(seed, spec.layout.numel)
    pinned = fingerprint(tiny_model())
    make_expert(connection, name, spec=spec, weights=weights, version=version, base_fingerprint=pinned)


@pytest.fixture
def federation(connection: Connection, tiny_model_dir: Path) -> Connection:
    """Two experts and their merge, which has another rank."""
    for seed, name in enumerate(("a", "b.c"), start=1):
        make(connection, tiny_model_dir, name, seed=seed)
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    return connection


def engine_of(connection: Connection) -> Engine:
    engine = Engine(
        GatewayStore(connection), AnswerSettings(device="cpu", precision="fp32"), report=lambda _: None
    )
    engine.refresh()
    return engine


@pytest.fixture
def serving(federation: Connection) -> Iterator[Callable[..., tuple[openai.OpenAI, Engine]]]:
    """Serve the federation; a client of the endpoint, and the engine behind it."""
    ends: list[Callable[[], None]] = []

    def start(*, api_key: str = "") -> tuple[openai.OpenAI, Engine]:
        engine = engine_of(federation)
        endpoint = Endpoint(engine, api_key=api_key)
        server = HttpServer(endpoint.app, "127.0.0.1", 0)
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1",
            api_key=api_key or "none",
            max_retries=0,
            timeout=60,
        )
        ends.extend((client.close, endpoint.closing.set, server.stop, server.join))
        return client, engine

    yield start
    for end in ends:
        end()


def by_hand(directory: Path, connection: Connection, name: str, n: int = 12) -> str:
    """What peft and transformers answer with the export."""
    store = GatewayStore(connection)
    tokenizer, model = tiny_tokenizer(), tiny_model()
    if name != "base":
        write(directory / name, read_gateway(store) if name == GATEWAY else read_expert(store, name))
        model = PeftModel.from_pretrained(model, str(directory / name)).eval()
    prompt = tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        tokens = model.generate(
            **prompt, max_new_tokens=n, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    text: str = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_the_model_that_is_named_answers(
    serving: Callable[..., tuple[openai.OpenAI, Engine]], federation: Connection, tmp_path: Path
) -> None:
    """Exactly what peft computes with the export, whole and streamed; by turns, so that nothing of another stays."""
    client, _ = serving()
    names = [GATEWAY, "a", "b.c", "base"]
    assert list(client.models.list()) == [client.models.retrieve(name) for name in names]
    assert [model.id for model in client.models.list()] == names
    with pytest.raises(openai.NotFoundError, match="there is no model 'c'; there are: gateway, a"):
        client.models.retrieve("c")
    wanted = {name: by_hand(tmp_path, federation, name) for name in names}
    assert len(set(wanted.values())) == 4
    for name in (*names, *reversed(names)):
        answer = client.chat.completions.create(model=name, messages=[QUESTION], max_tokens=12, temperature=0)
        assert answer.choices[0].message.content == wanted[name]
        assert answer.model == name
        assert answer.choices[0].finish_reason in ("length", "stop")
        version = answer.system_fingerprint
        assert version is not None
        assert (
            version == "base"
            if name == "base"
            else version.startswith(f"{name}-v{2 if name == GATEWAY else 1}-")
        )
        stream = client.chat.completions.create(
            model=name, messages=[QUESTION], max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == wanted[name]
        assert {chunk.system_fingerprint for chunk in chunks} == {version}
        assert chunks[-1].usage == answer.usage
        assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_new_version_answers_from_then_on(
    federation: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """An expert that changed, another rank of it, a trained gateway, one that is gone; Redis away changes nothing.

    A merge of the same experts by other settings is another version, too.
    """
    engine = engine_of(federation)
    merged = engine.model(GATEWAY).version
    GatewayBuilder(federation, GatewaySettings(scale=1.8), holder="one", lease_s=5.0).refresh()
    engine.refresh()
    assert engine.model(GATEWAY).version != merged

    def ask(name: str) -> tuple[str, str]:
        said: list[str] = []
        versions: list[str] = []
        request = ChatRequest(model=name, messages=(QUESTION,), max_tokens=12, temperature=0.0)
        engine.answer(request, on_start=versions.append, on_text=said.append)
        return "".join(said), versions[0]

    before = ask("a")
    make(federation, tiny_model_dir, "a", seed=9, rank=8, version=5)
    assert ask("a") == before
    engine.refresh()
    text, version = ask("a")
    assert text == by_hand(tmp_path / "new", federation, "a")
    assert version.startswith("a-v5-")
    assert ask("b.c")[0] == by_hand(tmp_path / "other", federation, "b.c")
    make(federation, tiny_model_dir, GATEWAY, seed=11, version=7)
    federation.client.hdel("fedmoe:experts", "b.c")
    engine.refresh()
    assert ask(GATEWAY)[1].startswith("gateway-v7-")
    assert ask(GATEWAY)[0] == by_hand(tmp_path / "trained", federation, GATEWAY)
    with raises(UnknownModelError, about="model"):
        ask("b.c")
    federation.client.set(federation.keys.expert("a").weights, "damaged")
    federation.client.hset(federation.keys.expert("a").meta, "weights_commit", "another")
    engine.refresh()  # reported, and the version before answers
    assert ask("a") == (text, version)


def test_what_cannot_be_answered_is_an_error_of_the_api(
    serving: Callable[..., tuple[openai.OpenAI, Engine]],
) -> None:
    """With the field that is wrong; the server answers the next one."""
    client, _ = serving(api_key="secret")
    ask = client.chat.completions.create
    with pytest.raises(
        openai.NotFoundError, match=r"no model 'c'; there are: gateway, a, b\.c, base"
    ) as missing:
        ask(model="c", messages=[QUESTION])
    assert missing.value.param == "model"
    with pytest.raises(openai.BadRequestError) as refused:
        ask(model="a", messages=[QUESTION], n=2)
    assert refused.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="top_k is not supported here: leave it out"):
        ask(model="a", messages=[QUESTION], extra_body={"top_k": 3})
    for streamed in (False, True):
        raw = client.chat.completions.with_raw_response.create(
            model="a", messages=[QUESTION], user="me", store=True, max_tokens=1, stream=streamed
        )
        assert raw.headers["X-FedMoE-Ignored"] == "store, user"
        assert "X-FedMoE-Ignored" not in client.models.with_raw_response.list().headers
    with pytest.raises(openai.BadRequestError, match="the model takes 1024: shorten them"):
        ask(model="a", messages=[QUESTION | {"content": "x" * 2000}])
    with pytest.raises(openai.BadRequestError, match="the model takes 1024: shorten them"):
        ask(model="a", messages=[QUESTION | {"content": "x" * 2000}], stream=True)
    with pytest.raises(openai.BadRequestError, match="at most 4 MiB"):
        ask(model="a", messages=[QUESTION | {"content": "x" * 5 * 2**20}])
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.retrieve("a")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="a", input="x")
    assert ask(model="a", messages=[QUESTION], max_tokens=1).choices[0].finish_reason == "length"


def test_sampling_stop_and_seed(serving: Callable[..., tuple[openai.OpenAI, Engine]]) -> None:
    """The same seed gives the same answer, another one another; a stop text is not part of the answer."""
    client, _ = serving()

    def ask(**more: object) -> openai.types.chat.ChatCompletion:
        options: dict[str, object] = {"model": "a", "messages": [QUESTION], "max_tokens": 16} | more
        completion: openai.types.chat.ChatCompletion = client.chat.completions.create(**options)  # type: ignore[call-overload]
        return completion

    one, same, other = (ask(temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    assert one == same != other
    whole = ask(temperature=0).choices[0].message.content
    assert whole
    assert ask(temperature=1e-40).choices[0].message.content == whole  # divided by it, logits overflow
    stop = whole[3:5]
    cut = ask(temperature=0, stop=[stop])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_client_that_leaves_ends_its_answer(
    serving: Callable[..., tuple[openai.OpenAI, Engine]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streamed or whole: the model is free for the next one soon, not only after 900 tokens."""
    client, engine = serving()
    made: list[int] = []
    answer = engine.answer

    def counted(request: ChatRequest, **more: Any) -> Finish:
        finish = answer(request, **more)
        made.append(finish.completion_tokens)
        return finish

    monkeypatch.setattr(engine, "answer", counted)
    stream = client.chat.completions.create(
        model="a", messages=[QUESTION], max_tokens=900, temperature=0, stream=True
    )
    next(iter(stream))
    stream.close()
    eventually("the end of the streamed one", lambda: len(made) == 1)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(
            model="a", messages=[QUESTION], max_tokens=900, temperature=0
        )
    eventually("the end of the whole one", lambda: len(made) == 2)
    client.chat.completions.create(model="a", messages=[QUESTION], max_tokens=900, temperature=0)
    assert max(made[:2]) < made[2]


def test_a_chat_goes_on_and_changes_its_model(
    federation: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said before is part of the next question; commands change the model and begin anew."""
    engine = engine_of(federation)
    said: list[str] = []
    asked: list[ChatRequest] = []
    answer = engine.answer

    def remembering(request: ChatRequest, **more: Any) -> Finish:
        asked.append(request)
        return answer(request, **more)

    monkeypatch.setattr(engine, "answer", remembering)
    chat = Chat(engine, "", said.append, temperature=0.0)
    monkeypatch.setattr(engine, "_settings", AnswerSettings(max_tokens=4))
    lines = (
        "hello\n",
        "word " * 1000,
        "\n",
        "again",
        "/model a",
        "/model nobody",
        "/new",
        "first",
        "/models",
        "/help",
        "/quit",
        "no",
    )
    chat.run(lines)
    assert [request.model for request in asked] == [GATEWAY, GATEWAY, GATEWAY, "a"]
    assert [len(request.messages) for request in asked] == [1, 3, 3, 1]
    text = "".join(said)
    assert text.startswith("[gateway-v2-")
    assert "there is no model 'nobody'" in text
    assert "the model takes 1024: shorten them, or begin a new conversation with /new\n" in text
    assert "/model NAME asks another model" in text
    with raises(UnknownModelError, about="model"):
        Chat(engine, "nobody", said.append)


def test_a_line_of_other_bytes_is_no_question(federation: Connection) -> None:
    """As a pipe with Latin-1 gives it; the template is not blamed, and the chat goes on."""
    said: list[str] = []
    Chat(engine_of(federation), "base", said.append).run(["\udcff", "/models"])
    assert said[0] == "a message is not text in UTF-8: write it again\n"
    assert said[1].startswith("gateway-v")


def test_no_expert_yet_is_one_sentence(connection: Connection) -> None:
    """Before the base model is looked for."""
    with raises(UnknownExpertError, about="experts"):
        Engine(GatewayStore(connection), AnswerSettings(), report=lambda _: None)


@pytest.mark.timeout(300)
def test_a_real_server_ends_in_the_middle_of_an_answer(federation: Connection, tmp_path: Path) -> None:
    """SIGTERM; until then it answers, and another one on the same port is refused in one sentence."""
    url, log = federation.settings.url, tmp_path / "log"
    with running(log, "gateway", "serve", "--redis", url, "--port", "0", "--device", "cpu") as process:
        eventually("its address", lambda: "answers on" in log.read_text(), timeout_s=200)
        base = log.read_text().split("answers on ")[1].split("/v1")[0]
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(model="a", messages=[QUESTION], max_tokens=2).system_fingerprint
        taken = fedmoe_here(
            "gateway", "serve", "--redis", url, "--port", base.rpartition(":")[2], "--device", "cpu"
        )
        assert taken.returncode == 2
        assert "Address already in use" in taken.stderr
        assert "loading" not in taken.stderr

        def ask() -> None:
            with contextlib.suppress(openai.APIError):
                client.chat.completions.create(model="a", messages=[QUESTION], max_tokens=1000, temperature=0)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        began = time.monotonic()
        assert terminate(process) == 0, log.read_text()
        assert time.monotonic() - began < 10.0
        asking.join()
        client.close()
    assert "Traceback" not in log.read_text()


def test_a_chat_by_a_pipe(federation: Connection) -> None:
    """The command; a model that there is not is one sentence, before the base model is loaded."""
    command = [
        "gateway",
        "chat",
        "--redis",
        federation.settings.url,
        "--temperature",
        "0",
        "--max-tokens",
        "3",
    ]
    typed = CliRunner().invoke(cli, command, input="hello\n/model b.c\nhello\n")
    assert typed.exit_code == 0, typed.output
    assert re.search(r"^\[gateway-v2-\w+\] .*^\[b\.c-v1-\w+\] ", typed.stdout, flags=re.M | re.S)
    done = fedmoe_here(*command, "--model", "nobody")
    assert done.returncode == 1
    assert done.stderr == "fedmoe: there is no model 'nobody'; there are: gateway, a, b.c, base\n"
