"""`fedmoe gateway export` and `show`: what peft loads is what Redis holds, and nothing else is ever overwritten."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from consumers.gateway.builder import GatewayBuilder
from consumers.gateway.methods import METHODS
from fedmoe.errors import DamagedExpertError, FedMoEError, SettingsError, SpecError, UnknownExpertError
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import structure
from fedmoe.protocol.layout import AdapterBuffer, values_of
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export import Export, read_expert, read_gateway
from fedmoe.tools.export_files import write
from tests.errors import raises
from tests.federation import LAYOUT, ScriptedWorker, first_meta, make_expert, serve, small_spec
from tests.processes import fedmoe, fedmoe_here
from tests.strategies import randn
from tests.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.one_server

FILES = [".fedmoe", "README.md", "adapter_config.json", "adapter_model.safetensors", "fedmoe.json"]


def files_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def build_gateway(connection: Connection, method: str = "cat") -> None:
    GatewayBuilder(connection, GatewaySettings(method=method), holder="agg-1", lease_s=5.0).refresh()


def tiny_spec(rank: int = 4) -> Spec:
    lora = LoraSettings(rank=rank)
    config = tiny_config()
    return Spec(
        base_model="org/tiny", base_config=structure(config), layout=adapter_layout(config, lora), lora=lora
    )


def trained_expert(connection: Connection, name: str, seed: int, rank: int = 4) -> Meta:
    """An expert of the tiny model with random weights."""
    spec = tiny_spec(rank)
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, 0)).add_(randn(seed, spec.layout.numel), alpha=0.05)
    meta = first_meta(spec, version=seed)
    ExpertStore(connection, name).create(spec, meta, buffer.file, gateway_weight=1.0)
    return meta


def some_export(**changes: object) -> Export:
    buffer = AdapterBuffer(LAYOUT)
    content: dict[str, object] = {
        "name": "gateway", "file": bytes(buffer.file), "config": {"r": 2},
        "built_from": {"a": {"version": 3, "weights_commit": "c"}}, "behind": {}, "info": {"base_model": "org/tiny"},
    }  # fmt: skip
    return Export(**(content | changes))


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        model = PeftModel.from_pretrained(tiny_model(), str(directory))
        return model(torch.tensor([[5, 9, 77, 30]])).logits


def test_what_peft_loads_is_what_redis_holds(connection: Connection, tmp_path: Path) -> None:
    """Experts and the gateway, of another rank, load in peft; the gateway is the mean of the experts' products."""
    metas = {name: trained_expert(connection, name, seed) for seed, name in enumerate(("a", "b"), start=1)}
    build_gateway(connection)
    out = str(tmp_path / "gateway")
    done = fedmoe("gateway", "export", "--redis", connection.settings.url, "--out", out)
    assert done.returncode == 0
    assert (
        done.stderr
        == "without tokenizer: the base model org/tiny is not on this machine; --base-model says where it is\n"
    )
    assert "gateway (rank 8, " in done.stdout
    assert "built from a v1, b v2" in done.stdout
    for name in ("a", "b"):
        write(tmp_path / name, read_expert(GatewayStore(connection), name))
        stored = connection.client.get(f"fedmoe:{{{name}}}:weights")
        assert (tmp_path / name / "adapter_model.safetensors").read_bytes() == stored

    base = tiny_model()
    mean = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    for name in ("a", "b"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        for key, lora_a in tensors.items():
            if "lora_A" in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                product = tiny_spec().lora.scaling * tensors[key.replace("lora_A", "lora_B")] @ lora_a
                mean[f"{module}.weight"] += product / 2
    base.load_state_dict(mean)
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path / "gateway"), base(torch.tensor([[5, 9, 77, 30]])).logits)
    assert not torch.allclose(logits(tmp_path / "a"), logits(tmp_path / "b"), atol=1e-3)

    info = json.loads((tmp_path / "gateway" / "fedmoe.json").read_text())
    assert info["built_from"] == {
        n: {"version": meta.version, "weights_commit": meta.weights_commit} for n, meta in metas.items()
    }
    card = (tmp_path / "gateway" / "README.md").read_text()
    assert card.startswith("---\nbase_model: org/tiny\nbase_model_relation: adapter\nlibrary_name: peft\n")
    assert f"| b | 2 | `{metas['b'].weights_commit}` |" in card
    assert files_in(tmp_path / "gateway") == FILES


def test_exporting_again_replaces_only_what_was_exported(tmp_path: Path) -> None:
    """Also the second time; what somebody put beside the adapter stays."""
    write(tmp_path / "new" / "out", some_export())
    (tmp_path / "new" / "out" / "notes.txt").write_text("mine")
    write(tmp_path / "new" / "out", some_export(config={"r": 3}))
    assert files_in(tmp_path / "new") == ["out"]
    assert files_in(tmp_path / "new" / "out") == sorted([*FILES, "notes.txt"])
    assert json.loads((tmp_path / "new" / "out" / "adapter_config.json").read_text()) == {"r": 3}
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", some_export())
    assert files_in(tmp_path / "empty") == FILES


@pytest.mark.parametrize(("foreign", "about"), [("adapter_config.json", "adapter"), ("thesis.tex", "files")])
def test_what_fedmoe_did_not_write_is_not_overwritten(tmp_path: Path, foreign: str, about: str) -> None:
    """Without --force nothing is touched, and with it only files of the adapter's names."""
    (tmp_path / foreign).write_text("mine")
    (tmp_path / "README.md").write_text("mine")
    with raises(SettingsError, about=about):
        write(tmp_path, some_export())
    assert files_in(tmp_path) == sorted(["README.md", foreign])
    assert (tmp_path / "README.md").read_text() == "mine"
    write(tmp_path, some_export(), force=True)
    assert files_in(tmp_path) == sorted({*FILES, foreign})


@pytest.mark.parametrize("force", [False, True])
def test_a_base_model_never_gets_an_adapter(tmp_path: Path, force: bool) -> None:
    """Whoever loads the model from there would get both; also beside an export of before."""
    write(tmp_path, some_export())
    (tmp_path / "config.json").write_text("{}")
    before = files_in(tmp_path)
    with raises(SettingsError, about="config.json"):
        write(tmp_path, some_export(), force=force)
    assert files_in(tmp_path) == before


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    """As the target, or where a directory on the way to it should be."""
    (tmp_path / "file").write_text("")
    with raises(SettingsError, about="file"):
        write(tmp_path / "file", some_export())
    with raises(SettingsError, about="disk"):
        write(tmp_path / "file" / "deeper", some_export())


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "no space left for .*, 0 MiB are needed"),
        (errno.EROFS, "Read-only file system.*choose"),
    ],
)
def test_a_disk_that_refuses_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool, code: int, message: str
) -> None:
    """A full or a read-only disk: one sentence, no half-written directory, an earlier export intact."""
    target = tmp_path / "out"
    if there:
        write(target, some_export())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SettingsError, match=message):
        write(target, some_export(config={"r": 3}))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert files_in(tmp_path) == (["out"] if there else [])


def test_weights_that_are_no_adapter_are_not_exported(connection: Connection, tmp_path: Path) -> None:
    """A key that something else wrote."""
    make_expert(connection)
    connection.client.set("fedmoe:{sql_expert}:weights", "text that is longer than eight bytes")
    with raises(DamagedExpertError, about="sql_expert") as caught:
        write(tmp_path / "out", read_expert(GatewayStore(connection), "sql_expert"))
    assert caught.value.damage.startswith("its weights belong to commit unknown")
    assert files_in(tmp_path) == []


def test_a_gateway_older_than_its_experts_is_exported_and_said(
    connection: Connection, tmp_path: Path
) -> None:
    """With both versions, on stderr and in fedmoe.json; a half-missing expert does not hinder it."""
    expert = make_expert(connection)
    build_gateway(connection)
    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    connection.client.hset("fedmoe:experts", "lost_expert", 1)
    done = fedmoe_here(
        "gateway", "export", "--redis", connection.settings.url, "--out", str(tmp_path / "out")
    )
    assert done.returncode == 0
    assert "built from sql_expert v0" in done.stdout
    assert "not the newest: sql_expert is at v1; export again" in done.stderr
    assert json.loads((tmp_path / "out" / "fedmoe.json").read_text())["behind"] == {"sql_expert": 1}


def test_experts_that_moved_are_told_by_their_meta_alone(connection: Connection) -> None:
    """No inspection of the whole federation: no SCAN, no INFO; whoever cannot be read is left out."""
    expert = make_expert(connection)
    build_gateway(connection)
    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    for name, fields in (("malformed", {"version": "x"}), ("removed", {"removed": "yesterday"})):
        connection.client.hset("fedmoe:experts", name, 1)
        connection.client.hset(connection.keys.expert(name).meta, mapping=fields)
    connection.client.hset("fedmoe:experts", "overwritten", "no number")
    connection.client.set(connection.keys.expert("overwritten").meta, "a string")
    connection.client.config_resetstat()
    assert read_gateway(GatewayStore(connection)).behind == {"sql_expert": 1}
    assert not {"cmdstat_scan", "cmdstat_info"} & connection.client.info("commandstats").keys()


@pytest.mark.parametrize(("field", "about"), [("built_from", "gateway"), ("adapter_config", "config")])
@pytest.mark.parametrize("junk", ["[1]", "{", '{"a": 1}', '{"a": {"version": "x"}}'])
def test_a_damaged_gateway_is_one_sentence(connection: Connection, field: str, about: str, junk: str) -> None:
    """It is either no gateway, or a malformed one; never a traceback."""
    make_expert(connection)
    build_gateway(connection)
    connection.client.hset("fedmoe:{merged}:meta", field, junk)
    with raises((SpecError, UnknownExpertError), about=about):
        read_gateway(GatewayStore(connection))


def test_no_gateway_yet_says_what_to_do(connection: Connection) -> None:
    """Nothing there; nobody to build it; somebody about to; and one that cannot be built."""
    store = GatewayStore(connection)

    def told() -> str:
        with pytest.raises(UnknownExpertError) as caught:
            read_gateway(store)
        return str(caught.value)

    assert told() == "there is no gateway yet, and no expert: start `fedmoe aggregator run`"
    make_expert(connection)
    assert told() == "there is no gateway yet and no aggregator to build it: start `fedmoe aggregator run`"
    connection.client.set("fedmoe:{merged}:lease", "agg-1", px=5000)
    assert told() == "there is no gateway yet: the aggregator builds it in a moment, try again"
    store.complain("every weight is 0")
    assert told() == "there is no merged gateway yet, because it cannot be built: every weight is 0"


def test_an_unknown_expert_lists_those_there_are(connection: Connection, tmp_path: Path) -> None:
    """By the command, with exit code 1 and no traceback; an impossible name is told apart."""
    make_expert(connection)
    arguments = (
        "gateway",
        "export",
        "--redis",
        connection.settings.url,
        "--out",
        str(tmp_path / "out"),
        "--expert",
    )
    done = fedmoe_here(*arguments, "sqlexpert")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fedmoe: there is no expert 'sqlexpert'; there are: sql_expert\n"
    with raises(FedMoEError, about="expert"):
        read_expert(GatewayStore(connection), "a:b")
    assert files_in(tmp_path) == []


def test_show_tells_versions_and_what_is_wrong(connection: Connection) -> None:
    """Text and JSON, of a gateway truncated to a rank."""
    expert = make_expert(connection)
    url = connection.settings.url
    assert fedmoe_here("gateway", "show", "--redis", url).stdout.splitlines()[1] == "merged gateway: none yet"
    build_gateway(connection, "svd")
    ScriptedWorker(connection, small_spec()).push(0.5)
    serve(expert)
    GatewayStore(connection).complain("no luck")
    lines = fedmoe_here("gateway", "show", "--redis", url, "--no-compare").stdout.splitlines()
    _, line, weights, error, problem = lines
    assert line == "merged gateway: svd, rank 2, built from sql_expert v0 (now v1)"
    assert (weights, error) == ("weights: sql_expert 1", "svd: exact")
    assert problem == "! merged gateway: cannot be built: no luck"
    shown = json.loads(fedmoe_here("gateway", "show", "--redis", url, "--json").stdout)["merged"]
    assert (shown["built_from"], shown["outdated"]) == ({"sql_expert": 0}, ["sql_expert"])


def test_export_says_what_vllm_needs_and_truncates_the_rank(connection: Connection, tmp_path: Path) -> None:
    """Three experts of rank 16 make a gateway of rank 48, which vLLM takes only as 64; 32 has a known error."""
    for seed, name in enumerate(("a", "b", "c")):
        trained_expert(connection, name, seed, rank=16)
    build_gateway(connection)
    url = ("--redis", connection.settings.url)
    whole = fedmoe_here("gateway", "export", *url, "--out", str(tmp_path / "whole"))
    assert (
        "vLLM needs --max-lora-rank 64 to serve it; `--rank 64` pads it with zeros, which changes nothing else; "
        "`--rank 32` lowers its rank" in whole.stdout
    )
    truncated = fedmoe_here("gateway", "export", *url, "--out", str(tmp_path / "cut"), "--rank", "32")
    told = re.search(r"gateway: truncated from rank 48 to 32, relative error (.*)%", truncated.stdout)
    assert (truncated.returncode, told is not None) == (0, True), truncated.stderr
    assert "vLLM needs --max-lora-rank 32" in truncated.stdout

    def products(directory: Path) -> torch.Tensor:
        tensors = load_file(directory / "adapter_model.safetensors")
        config = json.loads((directory / "adapter_config.json").read_text())
        assert {len(tensor) for name, tensor in tensors.items() if "lora_A" in name} == {config["r"]}
        scaling = config["lora_alpha"] / config["r"]
        return torch.cat(
            [
                (scaling * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]).flatten()
                for name in sorted(tensors)
                if "lora_A" in name
            ]
        )

    exact = products(tmp_path / "whole")
    error = float((products(tmp_path / "cut") - exact).norm() / exact.norm())
    assert told is not None
    assert error * 100 == pytest.approx(float(told[1]), abs=0.02)
    assert 0 < error < 1
    assert json.loads((tmp_path / "cut" / "fedmoe.json").read_text())["truncated_from_rank"] == 48
    assert logits(tmp_path / "cut").isfinite().all()
    one = fedmoe_here(
        "gateway", "export", *url, "--out", str(tmp_path / "a"), "--expert", "a", "--rank", "16"
    )
    assert "a has rank 16 already" in one.stdout
    assert "vLLM" not in one.stdout
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == connection.client.get(
        "fedmoe:{a}:weights"
    )


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.needs_init])
def test_method_that_needs_the_initialisation_gets_it(connection: Connection, method: str) -> None:
    """Experts that have learned nothing make a gateway that is the initialisation, of which nothing is dropped."""
    spec = tiny_spec()
    begun = initial_weights(spec.layout, spec.init_seed)
    for name in ("a_expert", "b_expert"):
        make_expert(connection, name, spec=spec, weights=begun)
    build_gateway(connection, method)
    loaded = GatewayStore(connection).load_merged()
    assert loaded is not None
    assert torch.equal(values_of(spec.layout, loaded[1]), begun)


def test_a_template_that_the_expert_brings_goes_with_it(connection: Connection, tmp_path: Path) -> None:
    """Also with the gateway, if all experts bring the same; a later export without one leaves none behind."""
    # As it is: not escaped, not shortened.
    template = "{% for m in messages %}\n" + "é" * 400 + "{% endfor %}"
    spec = replace(small_spec(), chat_template=template)
    make_expert(connection, "a", spec)
    make_expert(connection, "b", small_spec(), chat_template=template)
    build_gateway(connection)
    for export in (read_expert(GatewayStore(connection), "a"), read_gateway(GatewayStore(connection))):
        write(tmp_path / export.name, export)
        assert (tmp_path / export.name / "chat_template.jinja").read_text() == template
    make_expert(connection, "c", small_spec())
    build_gateway(connection)
    write(tmp_path / "gateway", read_gateway(GatewayStore(connection)))
    assert "chat_template.jinja" not in files_in(tmp_path / "gateway")


def test_exporting_imports_neither_peft_nor_transformers() -> None:
    """It must work on a machine that only looks after Redis."""
    imported = "import sys, fedmoe.tools.export_files, fedmoe.tools.shape"
    code = f"{imported}; print({{'peft', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
