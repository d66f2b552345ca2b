"""Routers: the rows of `fedmoe evaluate`, and an export that answers without FedMoE."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.examples import make_examples
from fedmoe.data.jsonl import open_data
from fedmoe.errors import SettingsError, UnknownExpertError
from fedmoe.model.hidden import prompt_states
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.vectors import DomainVector
from fedmoe.settings import HeldOutSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import read_gateway
from fedmoe.tools.heldout import HeldOut, measure
from fedmoe.tools.router import read_for_export
from tests.errors import raises
from tests.processes import fedmoe_here
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_federation import make_federation

pytestmark = pytest.mark.one_server
CPU = torch.device("cpu")
SERVED = "served/tiny"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of two domains whose prompts differ."""
    directory = tmp_path / "data"
    directory.mkdir()
    for name, prompt in (("red", "red roses"), ("blue", "0123456789")):
        rows = [{"prompt": f"{prompt} {n}", "completion": f"{name} {n}"} for n in range(6)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def vector_of(file: Path) -> DomainVector:
    bad_rows = BadRows(report=print)
    examples = make_examples(open_data(file, bad_rows), tiny_tokenizer(), 512, bad_rows).examples
    return DomainVector.of(prompt_states(tiny_model(), examples, pad_id=0, device=CPU).mean(0), len(examples))


def publish(connection: Connection, expert: str, worker: str, vector: DomainVector) -> None:
    connection.client.hset(connection.keys.expert(expert).vectors, worker, vector.to_json())


def told(connection: Connection, data: Path) -> None:
    """Red's vector on its own chain; blue's worker trains only the gateway."""
    publish(connection, "red", "alice", vector_of(data / "red.jsonl"))
    publish(connection, GATEWAY, "blue.bob", vector_of(data / "blue.jsonl"))


def evaluated(connection: Connection, data: Path, said: list[str] | None = None) -> HeldOut:
    settings = HeldOutSettings(data=[str(data)], precision="fp32")
    return measure(GatewayStore(connection), settings, report=([] if said is None else said).append)


def test_rows_are_routed_to_the_expert_of_their_domain(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """All right here, so the row is that of perfect routing; with swapped vectors it is the other expert's."""
    make_federation(connection, tiny_model_dir)
    told(connection, data)
    said: list[str] = []
    found = evaluated(connection, data, said)
    assert list(found.share) == [
        "base",
        "blue",
        "red",
        "routed",
        "routed by domain vectors",
        "arrow",
        "gateway",
    ]
    assert found.routes == {"blue": {"blue": 6, "red": 0}, "red": {"blue": 0, "red": 6}}
    assert found.loss["routed by domain vectors"] == found.routed
    assert "rows that the domain vectors send to their own expert: blue 6 of 6, red 6 of 6" in said
    publish(connection, "red", "alice", vector_of(data / "blue.jsonl"))
    publish(connection, "blue", "bob", vector_of(data / "red.jsonl"))  # counts before that on the gateway
    swapped = evaluated(connection, data)
    assert swapped.routes["red"] == {"blue": 6, "red": 0}
    assert swapped.loss["routed by domain vectors"]["red"] == swapped.loss["blue"]["red"]


def test_a_vector_that_cannot_be_used_is_left_out_with_a_sentence(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """One worker's, or all of an expert's: then nothing is routed there; of one expert alone there is no router."""
    make_federation(connection, tiny_model_dir, ("red", "blue", "green"))
    told(connection, data)
    publish(connection, "red", "mallory", DomainVector(rows=9, values=bytes(16)))
    said: list[str] = []
    found = evaluated(connection, data, said)
    assert found.routes["red"] == {"blue": 0, "red": 6}
    of_mallory = "the domain vector of worker mallory of red is left out: it has 8 values, the hidden state of the base"
    assert [line for line in said if "domain vector" in line] == [
        f"{of_mallory} model has 64",
        "green has no domain vector, so no prompt is routed to it: none of its workers published one",
        "rows that the domain vectors send to their own expert: blue 6 of 6, red 6 of 6",
    ]
    connection.client.hdel(connection.keys.expert("red").vectors, "alice")
    said.clear()
    assert not evaluated(connection, data, said).routes
    assert any("left out: only blue has a domain vector" in line for line in said)


def test_rows_of_no_expert_have_no_expert_of_their_own(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """A name with a typo, for example: no sentence promises other domains, or says where rows of none went."""
    make_federation(connection, tiny_model_dir)
    told(connection, data)
    said: list[str] = []
    settings = HeldOutSettings(data=[f"rad={data / 'red.jsonl'}"], precision="fp32")
    found = measure(GatewayStore(connection), settings, report=said.append)
    assert found.routes == {"rad": {"blue": 0, "red": 6}}
    assert not [line for line in said if line.startswith("rows that the domain vectors")]
    assert said[-1] == "no expert of its own: rad (the experts are blue, red); so there is no share"


def test_a_row_that_is_left_out_names_what_there_is_to_do(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """Evaluate cannot leave an expert out; an export can."""
    make_federation(connection, tiny_model_dir)
    make_federation(connection, tiny_model_dir, ("green",), rank=2)
    said: list[str] = []
    assert "arrow" not in evaluated(connection, data, said).loss
    (line,) = (line for line in said if line.startswith("the row arrow is left out: "))
    assert "`fedmoe gateway export --router arrow` can leave one of them out (--leave-out green)" in line


def script(out: Path, base: Path, prompt: str) -> str:
    """What the export's own script prints; FedMoE cannot be imported there."""
    (blocked := out.parent / "blocked" / "fedmoe").mkdir(parents=True, exist_ok=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, out / "load.py", prompt, str(base)],
        env=os.environ | {"PYTHONPATH": str(blocked.parent)}, capture_output=True, text=True, check=False,
        cwd=out.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_domain_router_answers_without_fedmoe(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Each prompt by its own expert; the directory is the gateway's export, too; an expert can be left out later."""
    make_federation(connection, tiny_model_dir, ("red", "blue", "green"))
    told(connection, data)
    publish(connection, "green", "carol", DomainVector.of(torch.full((64,), -0.125), 40))
    out = tmp_path / "out"
    url = connection.settings.url
    done = fedmoe_here("gateway", "export", "--redis", url, "--out", str(out), "--router", "domain")
    assert done.returncode == 0, done.stderr
    assert "routes by domain among blue v4 (vector of 1 worker, 6 rows), green v5 " in done.stdout
    vectors = load_file(out / "router.safetensors")["vectors"]
    assert vectors.shape == (3, 64)
    assert json.loads((out / "router.json").read_text())["experts"] == ["blue", "green", "red"]
    assert torch.equal(vectors[0], vector_of(data / "blue.jsonl").tensor())
    for prompt, name in (("red roses 9", "red"), ("0123456789 9", "blue")):
        answer = script(out, tiny_model_dir, prompt)
        assert answer.startswith(f"{name}: ")
        alone = PeftModel.from_pretrained(tiny_model(), str(out / "experts" / name)).eval()
        chat = [{"role": "user", "content": prompt}]
        ids = tiny_tokenizer().apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        tokens = alone.generate(input_ids=ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :]
        assert (
            answer.partition(": ")[2].strip()
            == tiny_tokenizer().decode(tokens, skip_special_tokens=True).strip()
        )
    PeftModel.from_pretrained(tiny_model(), str(out))  # the gateway
    assert (
        "routed by domain among blue v4 (vector of 1 worker, 6 rows), green"
        in (out / "README.md").read_text()
    )
    bare = subprocess.run([sys.executable, out / "load.py"], capture_output=True, text=True, check=False)
    assert bare.returncode == 1
    assert bare.stderr.startswith("Answers a prompt with the expert whose domain it belongs to.")
    assert "Traceback" not in bare.stderr
    done = fedmoe_here(
        "gateway", "export", "--redis", url, "--out", str(out), "--router", "domain", "--leave-out", "green"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (out / "experts").iterdir()) == ["blue", "red"]
    assert load_file(out / "router.safetensors")["vectors"].shape == (2, 64)


def test_each_expert_of_a_router_answers_by_its_own_chat_template(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Red's workers were trained with another one than the base model's, which blue has."""
    make_federation(connection, tiny_model_dir)
    told(connection, data)
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    connection.client.hset(connection.keys.expert("red").meta, "chat_template", template)
    out = tmp_path / "out"
    words = ("--redis", connection.settings.url, "--out", str(out), "--router", "domain", "--no-tokenizer")
    assert fedmoe_here("gateway", "export", *words).returncode == 0
    show = (
        "import load; print(load.tokens_of('q', load.templates[{0}])['input_ids'].shape[1], load.names[{0}])"
    )
    code = ";".join(show.format(number) for number in (0, 1))
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.argv = ['load.py', 'q', {str(tiny_model_dir)!r}]; {code}",
    ]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, check=False)
    lengths = {line.split()[1]: int(line.split()[0]) for line in done.stdout.splitlines()}
    tokenizer, chat = tiny_tokenizer(), [{"role": "user", "content": "q"}]
    for name, one in (("blue", tokenizer.chat_template), ("red", template)):
        tokens = tokenizer.apply_chat_template(
            chat, chat_template=one, add_generation_prompt=True, return_dict=True
        )
        assert lengths[name] == len(tokens["input_ids"])
    assert lengths["red"] != lengths["blue"]


def test_an_arrow_router_answers_without_fedmoe_or_vectors(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With peft's own function, in place of a domain router in the same directory."""
    make_federation(connection, tiny_model_dir)
    out = tmp_path / "out"
    done = fedmoe_here(
        "gateway", "export", "--redis", connection.settings.url, "--out", str(out), "--router", "arrow"
    )
    assert done.returncode == 0, done.stderr
    assert "routes by arrow among blue v4, red v3" in done.stdout
    assert not (out / "router.safetensors").exists()
    assert script(out, tiny_model_dir, "red roses 9")
    done = fedmoe_here("gateway", "export", "--redis", connection.settings.url, "--out", str(out))
    assert (
        "also holds the router of an earlier export (load.py, experts/), which stays as it was" in done.stderr
    )


def test_each_adapter_of_a_router_has_the_rank_type_and_base_name_that_were_asked_for(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The experts answer, so what holds for the gateway alone changes nothing; padding keeps the answers."""
    make_federation(connection, tiny_model_dir)
    told(connection, data)
    url = connection.settings.url
    for kind in ("domain", "arrow"):
        common = ("gateway", "export", "--redis", url, "--router", kind, "--no-tokenizer", "--out")
        plain, out = tmp_path / f"{kind}-plain", tmp_path / kind
        assert fedmoe_here(*common, str(plain)).returncode == 0
        wide = tmp_path / f"{kind}-wide"
        assert fedmoe_here(*common, str(wide), "--rank", "8").returncode == 0
        done = fedmoe_here(*common, str(out), "--rank", "8", "--dtype", "bf16", "--base-name", SERVED)
        assert done.returncode == 0, done.stderr
        assert "blue: padded with zeros from rank 4 to 8" in done.stdout
        for place in (out, out / "experts" / "red", out / "experts" / "blue"):
            config = json.loads((place / "adapter_config.json").read_text())
            assert (config["r"], config["base_model_name_or_path"]) == (8, SERVED)
            assert {value.dtype for value in load_file(place / "adapter_model.safetensors").values()} == {
                torch.bfloat16
            }
        about = json.loads((out / "router.json").read_text())
        assert about["base_model"] == SERVED
    prompt = "red roses 9"
    assert script(wide, tiny_model_dir, prompt) == script(plain, tiny_model_dir, prompt)


def test_arrow_takes_experts_of_two_ranks_if_the_export_gives_them_one(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_federation(connection, tiny_model_dir)
    make_federation(connection, tiny_model_dir, ("green",), rank=2)
    common = ("gateway", "export", "--redis", connection.settings.url, "--router", "arrow", "--out")
    done = fedmoe_here(*common, str(tmp_path / "out"))
    assert done.returncode != 0
    assert "adapters of equal rank and targets" in done.stderr
    assert "--rank" in done.stderr
    done = fedmoe_here(*common, str(tmp_path / "out"), "--rank", "4")
    assert done.returncode == 0, done.stderr
    assert script(tmp_path / "out", tiny_model_dir, "red roses 9")


def test_a_router_that_cannot_be_made_is_one_sentence(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Without vectors, with one alone, of unlike bases or ranks, of an unknown expert, or into a base model."""
    make_federation(connection, tiny_model_dir)
    store, said = GatewayStore(connection), list[str]()
    gateway = read_gateway(store)

    def export(kind: str, *leave_out: str) -> None:
        read_for_export(store, kind, gateway, leave_out=leave_out, report=said.append)

    with raises(SettingsError, about="vectors"):
        export("domain")
    publish(connection, "red", "alice", vector_of(data / "red.jsonl"))
    with raises(SettingsError, about="vectors"):
        export("domain")
    with raises(SettingsError, about="experts"):
        export("arrow", "red")
    with raises(UnknownExpertError, about="green"):
        export("arrow", "green")
    told(connection, data)
    connection.client.hset(connection.keys.expert("red").meta, "base_fingerprint", "f" * 16)
    with raises(SettingsError, about="base_model"):
        export("domain")
    base = ["gateway", "export", "--redis", connection.settings.url, "--router", "arrow", "--out"]
    for words, about in (
        ([*base, str(tmp_path / "x"), "--expert", "red"], "--router chooses among the experts"),
        ([*base[:4], "--leave-out", "red", "--out", str(tmp_path / "x")], "--leave-out is for --router only"),
        (
            [*base, str(tmp_path / "x"), "--no-tokenizer", "--base-model", "nowhere"],
            "leave out one of the two",
        ),
    ):
        done = fedmoe_here(*words)
        assert done.returncode != 0
        assert about in done.stderr
    connection.client.hset(connection.keys.expert("red").meta, "base_fingerprint", "")
    done = fedmoe_here(*base, str(tiny_model_dir))
    assert done.returncode != 0
    assert "holds a model (config.json)" in done.stderr
    assert not (tiny_model_dir / "load.py").exists()
