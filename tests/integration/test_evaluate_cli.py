"""`fedmoe evaluate`: the matrix is that of the adapters in Redis, and whatever does not fit is one sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.encode import Learn
from fedmoe.data.examples import make_examples, padding_id
from fedmoe.data.jsonl import open_data
from fedmoe.errors import BaseModelError, DataError, SettingsError, SpecError, UnknownExpertError
from fedmoe.model.base import fingerprint
from fedmoe.settings import HeldOutSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.evaluate import mean_loss
from fedmoe.tools.export import read_expert
from fedmoe.tools.export_files import write
from fedmoe.tools.heldout import HeldOut, measure, read_directory
from fedmoe.tools.rows import find_files, find_training_files
from fedmoe.tools.share import format_share
from tests.errors import raises
from tests.processes import fedmoe, fedmoe_here
from tests.tiny import save_tiny_model, tiny_model, tiny_tokenizer
from tests.tiny_federation import make_federation, write_rows

pytestmark = pytest.mark.one_server


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A directory of held-out rows, with files that must not be taken for them."""
    directory = tmp_path / "data"
    directory.mkdir()
    write_rows(directory / "red.test.jsonl", "red red")
    write_rows(directory / "red.jsonl", "what red was trained on")
    write_rows(directory / "blue.jsonl", "blue", n_rows=4)
    write_rows(directory / "green.jsonl", "nobody's")
    return directory


def run(connection: Connection, *data: str, said: list[str] | None = None, **settings: object) -> HeldOut:
    said = [] if said is None else said
    wanted = replace(HeldOutSettings(data=data, precision="fp32"), **settings)
    return measure(GatewayStore(connection), wanted, report=said.append)


def test_the_command_prints_the_matrix_and_writes_it(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Base, experts, gateway and an adapter of one's own, on each domain; the base's loss is the model's."""
    make_federation(connection, tiny_model_dir)
    write(tmp_path / "copy", read_expert(GatewayStore(connection), "blue"))
    file = tmp_path / "loss.json"
    done = fedmoe(
        "evaluate", "--redis", connection.settings.url, "--data", str(data), "--adapter", f"copy={tmp_path / 'copy'}",
        "--json", str(file), "--precision", "fp32", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{data / 'red.test.jsonl'}: 6 rows: 6 used, 0 dropped" in done.stderr
    (*head, last), *rows = (line.split() for line in done.stdout.splitlines())
    assert (head, last) == (["blue", "red", "mean"], "share")
    assert [row[0] for row in rows] == ["base", "blue", "red", "routed", "arrow", "gateway", "copy"]
    result = json.loads(file.read_text())
    loss = result["loss"]
    shown = {row[0]: [cell.rstrip("*") for cell in row[1:-1]] for row in rows}
    assert shown == {
        name: [f"{row[column]:.3f}" for column in head]
        for name, row in (loss | {"routed": result["routed"]}).items()
    }
    assert [result["routed"][name] for name in ("blue", "red")] == [
        loss[name][name] for name in ("blue", "red")
    ]
    assert list(result["share"]) == [row[0] for row in rows]
    assert [row[-1] for row in rows] == [format_share(share) for share in result["share"].values()]
    bad_rows = BadRows(report=print)
    rows_of_red = open_data(data / "red.test.jsonl", bad_rows)
    examples = make_examples(rows_of_red, tiny_tokenizer(), 512, bad_rows).examples
    direct = mean_loss(
        tiny_model(), examples, pad_id=padding_id(tiny_tokenizer()), batch_size=8, device=torch.device("cpu")
    )
    assert loss["base"]["red"] == pytest.approx(direct, rel=1e-5)
    assert loss["copy"] == loss["blue"]
    assert len({row["red"] for row in loss.values()}) == 5
    assert "the row routed by domain vectors is left out: no expert has a domain vector" in done.stderr
    assert result["rows"] == {"blue": 4, "red": 6}
    assert result["base_fingerprint"] == fingerprint(tiny_model())
    assert {n: part["version"] for n, part in result["built_from"]["gateway"].items()} == {
        "red": 3,
        "blue": 4,
    }
    done = fedmoe_here(
        "evaluate", "--redis", connection.settings.url, "--data", f"red={data / 'red.test.jsonl'}", "--json", "-",
        "--rows", "2",
    )  # fmt: skip
    assert json.loads(done.stdout)["rows"] == {"red": 2}


def test_rows_that_cannot_be_used_are_named(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Of each file by line and reason, and all of them in --bad-rows."""
    make_federation(connection, tiny_model_dir)
    for name, row in (("red.test", "{"), ("blue", '{"prompt": "q", "completion": ""}')):
        file = data / f"{name}.jsonl"
        file.write_text(file.read_text() + row + "\n")
    listed = tmp_path / "bad.jsonl"
    done = fedmoe_here(
        "evaluate", "--redis", connection.settings.url, "--data", str(data), "--bad-rows", str(listed),
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{data / 'red.test.jsonl'} line 7: it is not JSON" in done.stderr
    assert f"{data / 'blue.jsonl'} line 5: its answer is empty" in done.stderr
    assert f"{data / 'blue.jsonl'}: 5 rows: 4 used, 1 dropped (1 × its answer is empty)" in done.stderr
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    assert sorted((Path(row["file"]).name, row["line"]) for row in rows) == [
        ("blue.jsonl", 5), ("red.test.jsonl", 7)
    ]  # fmt: skip


def test_all_answers_or_the_last_are_measured(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """`--learn` says which, as for a worker."""
    make_federation(connection, tiny_model_dir)
    texts = {"q": "user", "aaaaaaaa": "assistant", "r": "user", "?": "assistant"}
    turns = [{"role": role, "content": text} for text, role in texts.items()]
    file = data / "red.test.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    bad_rows = BadRows(report=print)
    expected: dict[Learn, float] = {}
    for learn in get_args(Learn):
        examples = make_examples(
            open_data(file, bad_rows), tiny_tokenizer(), 512, bad_rows, learn=learn
        ).examples
        expected[learn] = mean_loss(
            tiny_model(), examples, pad_id=0, batch_size=8, device=torch.device("cpu")
        )
        loss = run(connection, f"red={file}", learn=learn).loss["base"]["red"]
        assert loss == pytest.approx(expected[learn], rel=1e-5)
    assert expected["all"] != pytest.approx(expected["last"], rel=1e-4)


def test_another_base_model_is_refused(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Other weights by their fingerprint, another architecture by its config."""
    make_federation(connection, tiny_model_dir)
    other = save_tiny_model(tmp_path / "other", seed=1)
    with raises(BaseModelError, about="fingerprint"):
        run(connection, str(data), base_model=str(other))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with raises(BaseModelError, about="intermediate_size"):
        run(connection, str(data), base_model=str(other))


def test_what_is_not_there_is_said_and_left_out(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """A federation without a gateway, and an expert that lost its weights."""
    make_federation(connection, tiny_model_dir)
    connection.client.delete("fedmoe:{merged}:meta", "fedmoe:{blue}:weights")
    said: list[str] = []
    assert list(run(connection, str(data), said=said).loss) == ["base", "red"]
    assert said[0].startswith(
        "blue is left out: expert 'blue' in Redis is damaged: its weights are missing; an"
    )
    assert said[1].startswith("the gateway is left out: there is no gateway yet")
    connection.client.delete("fedmoe:experts")
    with raises(UnknownExpertError, about="experts"):
        run(connection, str(data))


def test_trained_gateway_is_the_gateway_unless_it_is_of_another_base(
    connection: Connection, tiny_model_dir: Path, data: Path
) -> None:
    """Then it is left out with a sentence, and the merged one has a row of its own as before."""
    make_federation(connection, tiny_model_dir, ("gateway", "red", "blue"))
    found = run(connection, str(data))
    assert list(found.loss) == ["base", "blue", "red", "arrow", "gateway", "merged"]
    assert found.built_from["gateway"].keys() == {"gateway"}
    connection.client.hset(connection.keys.expert("gateway").meta, "base_fingerprint", "e" * 32)
    said: list[str] = []
    found = run(connection, str(data), said=said)
    assert list(found.loss) == ["base", "blue", "red", "arrow", "merged"]
    assert any(
        line.startswith("the gateway is left out: it is an adapter of another base model than ")
        for line in said
    )


def test_an_adapter_of_another_model_is_one_sentence(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """And so are a taken name and a directory that is no adapter."""
    make_federation(connection, tiny_model_dir)
    export = read_expert(GatewayStore(connection), "red")
    write(tmp_path / "odd", replace(export, config=export.config | {"r": 8}))
    with raises(SpecError, about="shape"):
        run(connection, str(data), extra={"odd": tmp_path / "odd"})
    with raises(SettingsError, about="name"):
        run(connection, str(data), extra={"gateway": tmp_path / "odd"})
    with raises(SettingsError, about="adapter_config.json"):
        run(connection, str(data), extra={"data": data})


def test_adapters_that_peft_saved_can_be_read(tmp_path: Path) -> None:
    """Of its own initialisation, with all the fields of the present version; not other kinds than LoRA."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="gaussian", task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), lora).save_pretrained(tmp_path)
    adapter = read_directory(tmp_path)
    assert (adapter.config["r"], adapter.config["init_lora_weights"]) == (2, True)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with raises(SettingsError, about="peft_type"):
        read_directory(tmp_path)
    config.write_text("{")
    with raises(SettingsError, about="adapter"):
        read_directory(tmp_path)


def test_files_are_found_by_expert(data: Path) -> None:
    """Test rows before training rows, explicit files beside directories, no name twice."""
    assert find_files([str(data)], ["red", "blue"]) == {
        "red": data / "red.test.jsonl", "blue": data / "blue.jsonl"
    }  # fmt: skip
    assert find_files([str(data), f"other={data / 'green.jsonl'}"], ["red"]).keys() == {"red", "other"}
    for texts, about in (
        ([str(data), f"red={data / 'red.jsonl'}"], "red"),
        ([f"mean={data / 'red.jsonl'}"], "mean"),
        ([f"a:b={data}"], "domain"),
        ([str(data / "nowhere")], "data"),
    ):
        with raises(SettingsError, about=about):
            find_files(texts, ["red"])
    with raises(DataError, about="data"):
        find_files([str(data)], ["yellow"])


def test_a_result_that_could_not_be_kept_is_not_computed(tmp_path: Path) -> None:
    """A wrong --json or --adapter fails before Redis is even asked."""
    arguments = ("evaluate", "--data", str(tmp_path), "--redis", "redis://127.0.0.1:1/0")
    (tmp_path / "d.png").mkdir()
    for more, message in (
        (("--json", str(tmp_path)), f"fedmoe: --json {tmp_path} cannot be written"),
        (("--json", str(tmp_path / "no" / "x.json")), "cannot be written"),
        (("--plot", str(tmp_path / "d.png")), f"fedmoe: --plot {tmp_path / 'd.png'} cannot be written"),
        (("--plot", str(tmp_path / "x.pdf")), f"a PNG file: name it {tmp_path / 'x.pdf.png'}"),
        (("--plot", str(tmp_path / "x")), f"{tmp_path / 'x'} does not end in .png"),
        (("--adapter", "x"), "fedmoe: --adapter 'x' must be NAME=DIR"),
        (("--adapter", "x=a", "--adapter", "x=b"), "fedmoe: --adapter has the name 'x' twice"),
    ):
        done = fedmoe_here(*arguments, *more)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert message in done.stderr


def test_share_is_undefined_if_the_experts_gain_nothing(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """Untrained experts gain nothing; a domain of nobody's is named once; an expert named as a row is left out."""
    make_federation(connection, tiny_model_dir, ("red", "routed"), scale=0.0)
    said: list[str] = []
    result = run(connection, f"red={data / 'red.jsonl'}", f"green={data / 'green.jsonl'}", said=said)
    assert result.loss["red"] == result.loss["base"]
    assert result.share == {"base": None, "red": None, "routed": None, "gateway": None}
    assert result.routed == {"red": result.loss["red"]["red"], "green": None, "mean": None}
    assert said[-2:] == [
        "no expert of its own: green (the experts are red); the share is that of the other domains",
        "no share: the experts gain nothing over the base model on their own domains",
    ]
    assert said[0].startswith("routed is left out, because the table has a row of that name")


def test_centralised_adapter_is_a_row_of_its_own(
    connection: Connection, data: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Trained on the rows of all experts as long as they were; the JSON says how, and the picture is a PNG file."""
    make_federation(connection, tiny_model_dir)
    for name, answer in (("red", "red red"), ("blue", "blue")):
        write_rows(data / f"{name}.train.jsonl", answer, n_rows=20)
    file, plot = tmp_path / "loss.json", tmp_path / "loss.png"
    done = fedmoe_here(
        "evaluate", "--redis", connection.settings.url, "--data", str(data), "--centralised", "--train", str(data),
        "--learning-rates", "0.01, 1e-9", "--json", str(file), "--plot", str(plot), "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["centralised"]["rows"] == {"blue": 12, "red": 12}
    assert result["centralised"]["steps"] == 5  # 20 rows in steps of 4
    assert result["centralised"]["learning_rate"] == 0.01
    assert list(result["centralised"]["validation"]) == ["0.01", "1e-09"]
    loss = result["loss"]
    assert loss["centralised"]["mean"] < loss["base"]["mean"] - 0.05
    assert list(result["share"]) == ["base", "blue", "red", "routed", "arrow", "gateway", "centralised"]
    assert "training centralised with learning rate 0.01: 5 steps" in done.stderr
    assert "centralised has learning rate 0.01, the best of 0.01, 1e-09" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("centralised ")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_training_files_are_those_of_experts_and_no_test_files(data: Path) -> None:
    """Found as test files are, by another name."""
    test = find_files([str(data)], ["red", "blue"])
    write_rows(data / "blue.train.jsonl", "blue")
    found = find_training_files([str(data)], ["red", "blue"], test)
    assert found == {"red": data / "red.jsonl", "blue": data / "blue.train.jsonl"}
    with raises(UnknownExpertError, about="green"):
        find_training_files([f"green={data / 'green.jsonl'}"], ["red", "blue"], test)
    for text, about in ((f"red={data / 'red.test.jsonl'}", "train"), (str(data / "nowhere"), "train")):
        with raises(SettingsError, about=about):
            find_training_files([text], ["red", "blue"], test)
    with raises(DataError, about="train"):
        find_training_files([str(data)], ["yellow"], test)


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"centralised": True}, "train"),
        ({"train": ["red=x"]}, "train"),
        ({"steps": 3}, "steps"),
        ({"learning_rates": ("1e-3",)}, "learning_rates"),
        ({"centralised": True, "train": ["red=x"], "steps": 0}, "steps"),
        ({"centralised": True, "train": ["red=x"], "learning_rates": ("1e-3", "fast")}, "learning_rates"),
        ({"centralised": True, "train": ["red=x"], "learning_rates": ("0",)}, "learning_rates"),
    ],
)
def test_settings_of_the_centralised_adapter_are_checked(options: dict[str, Any], about: str) -> None:
    """Before anything is read."""
    with raises(SettingsError, about=about):
        HeldOutSettings(data=["."], **options)


def test_centralised_without_rows_or_updates_is_one_sentence(
    connection: Connection, data: Path, tiny_model_dir: Path
) -> None:
    """Of too few rows, of an expert that there is not, and of experts that nobody trained."""
    make_federation(connection, tiny_model_dir)
    few, enough = data / "few.jsonl", write_rows(data / "enough.jsonl", "red", n_rows=12)
    write_rows(few, "red", n_rows=8)
    for train, message in (
        (f"red={few}", "fedmoe: --train has 8 rows of red, and 8 are held out"),
        (f"green={enough}", "fedmoe: --train names the expert 'green', which there is not"),
        (f"red={enough}", "fedmoe: the experts were not trained yet"),
    ):
        done = fedmoe_here(
            "evaluate", "--redis", connection.settings.url, "--data", f"red={data / 'red.test.jsonl'}",
            "--centralised", "--train", train, "--device", "cpu",
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.splitlines()[-1].startswith(message)
