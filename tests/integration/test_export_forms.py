"""`fedmoe gateway export` in the forms that servers take: bf16, another rank, with tokenizer, as a whole model."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from consumers.gateway.builder import GatewayBuilder
from consumers.gateway.rank import at_rank
from fedmoe.errors import BaseModelError, SettingsError, SpecError
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, structure
from fedmoe.model.tokenizer import tokenizer_fingerprint
from fedmoe.protocol.layout import AdapterBuffer, stamp_of
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.card import vllm_hint
from fedmoe.tools.export import Export, Team, read_expert, read_gateway
from fedmoe.tools.export_files import write
from fedmoe.tools.losses import Validation
from fedmoe.tools.shape import as_bf16
from fedmoe.tools.whole_model import write_model
from tests.errors import raises
from tests.federation import ScriptedWorker, first_meta, make_expert, serve, small_spec
from tests.processes import fedmoe_here
from tests.strategies import randn
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.one_server

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
INPUT = torch.tensor([[5, 9, 77, 30]])
Make = Callable[..., Export]


@pytest.fixture
def make(connection: Connection, tiny_model_dir: Path) -> Make:
    """An expert of the tiny model in Redis, with random weights; its export."""

    def expert(
        name: str = "a",
        *,
        rank: int = 4,
        seed: int = 1,
        scale: float = 0.05,
        template: str = "",
        **meta: object,
    ) -> Export:
        lora, config = LoraSettings(rank=rank), tiny_config()
        spec = Spec(
            base_model=str(tiny_model_dir), base_config=structure(config), layout=adapter_layout(config, lora),
            lora=lora, chat_template=template,
        )  # fmt: skip
        buffer = AdapterBuffer(spec.layout)
        buffer.flat.copy_(initial_weights(spec.layout, 0)).add_(randn(seed, spec.layout.numel), alpha=scale)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template or CHAT_TEMPLATE
        pinned = {
            "base_fingerprint": fingerprint(tiny_model()),
            "tokenizer": tokenizer_fingerprint(tokenizer),
        }
        first = first_meta(spec, version=seed, n_examples=40, loss=1.25, **(pinned | meta))
        ExpertStore(connection, name).create(spec, first, buffer.file, gateway_weight=1.0)
        return read_expert(GatewayStore(connection), name)

    return expert


def logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_model(), str(directory))(INPUT).logits


def model_logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory)(INPUT).logits.float()


def config_of(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "adapter_config.json").read_text()))


def test_bf16_halves_the_file_and_keeps_the_model(make: Make, connection: Connection, tmp_path: Path) -> None:
    """By the command; the values are the nearest bf16, the commit is still in the file, alpha is an integer."""
    export = make()
    write(tmp_path / "fp32", export)
    done = fedmoe_here(
        "gateway", "export", "--redis", connection.settings.url, "--expert", "a", "--dtype", "bf16",
        "--no-tokenizer", "--base-name", "served", "--out", str(tmp_path / "bf16"),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "a (rank 4, bf16, " in done.stdout
    whole, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("fp32", "bf16"))
    assert {name: tensor.to(torch.bfloat16) for name, tensor in whole.items()}.keys() == half.keys()
    assert all(torch.equal(half[name], tensor.to(torch.bfloat16)) for name, tensor in whole.items())
    file = (tmp_path / "bf16" / "adapter_model.safetensors").read_bytes()
    assert stamp_of(file) == stamp_of(export.file) == export.metas["a"].weights_commit
    assert len(file) < 0.6 * len(export.file)
    torch.testing.assert_close(logits(tmp_path / "bf16"), logits(tmp_path / "fp32"), atol=0.05, rtol=0.05)
    assert config_of(tmp_path / "bf16")["base_model_name_or_path"] == "served"
    assert '"lora_alpha": 32,' in (tmp_path / "bf16" / "adapter_config.json").read_text()
    assert json.loads((tmp_path / "bf16" / "fedmoe.json").read_text())["dtype"] == "bf16"


def test_a_higher_rank_is_the_same_model_and_a_lower_one_says_its_error(make: Make, tmp_path: Path) -> None:
    """Padding only adds zeros: every value that was there is there, at the same scaling."""
    export = make(rank=4)
    padded, text = at_rank(export, 8)
    assert text == "a: padded with zeros from rank 4 to 8, which changes nothing else"
    assert (padded.config["r"], padded.config["lora_alpha"]) == (8, 2 * export.config["lora_alpha"])
    for name, one in (("own", export), ("padded", padded)):
        write(tmp_path / name, one)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "padded"))
    for name, tensor in before.items():
        if "lora_A" in name:
            assert torch.equal(after[name][:4], tensor)
            assert not after[name][4:].any()
        else:
            assert torch.equal(after[name][:, :4], tensor)
            assert not after[name][:, 4:].any()
    torch.testing.assert_close(logits(tmp_path / "padded"), logits(tmp_path / "own"))
    cut, text = at_rank(export, 2)
    assert text.startswith("a: truncated from rank 4 to 2, relative error ")
    assert (cut.config["r"], cut.config["lora_alpha"]) == (2, export.config["lora_alpha"] / 2)
    assert type(cut.config["lora_alpha"]) is int
    assert at_rank(export, 4) == (export, "a has rank 4 already")


def test_the_tokenizer_goes_with_it(make: Make, connection: Connection, tmp_path: Path) -> None:
    """With the template of the expert's workers, else its own; a later export without it leaves no file behind."""
    make("a")
    make("b", template=TEMPLATE)
    url = connection.settings.url
    messages = [{"role": "user", "content": "hello"}]
    for name, shown in (("a", "<|im_start|>user\nhello<|im_end|>\n"), ("b", "<user>hello\n")):
        out = tmp_path / name
        done = fedmoe_here("gateway", "export", "--redis", url, "--expert", name, "--out", str(out))
        assert (done.returncode, done.stderr) == (0, "")
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer("def f(x)").input_ids == tiny_tokenizer()("def f(x)").input_ids
        assert tokenizer.apply_chat_template(messages, tokenize=False) == shown
        assert (out / "chat_template.jinja").is_file()
        assert logits(out).isfinite().all()  # peft loads it as before
        again = ("gateway", "export", "--redis", url, "--expert", name, "--no-tokenizer", "--out", str(out))
        assert fedmoe_here(*again).returncode == 0
        assert not (out / "tokenizer.json").is_symlink()
        assert (out / "chat_template.jinja").exists() == (name == "b")


def test_another_tokenizer_is_left_out_or_refused(make: Make, connection: Connection, tmp_path: Path) -> None:
    """Left out, with the reason, if it was only found; refused if the operator named it."""
    make(tokenizer="vocabulary:259-000000000000")
    base = str(save_tiny_model(tmp_path / "base"))
    command = (
        "gateway",
        "export",
        "--redis",
        connection.settings.url,
        "--expert",
        "a",
        "--out",
        str(tmp_path / "out"),
    )
    found = fedmoe_here(*command)
    assert found.returncode == 0
    assert found.stderr.startswith(
        "without tokenizer: the base model, tokenizer or chat template does not match expert"
    )
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    named = fedmoe_here(*command, "--base-model", base)
    assert named.returncode == 1
    assert "its tokenizer differs from the expert's" in named.stderr


def test_a_whole_model_is_what_peft_makes_of_both(make: Make, connection: Connection, tmp_path: Path) -> None:
    """The merged gateway in the base checkpoint's own dtype, with tokenizer and card; a second one replaces it."""
    make("a", seed=1)
    make("b", seed=2)
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    write(tmp_path / "adapter", read_gateway(GatewayStore(connection)))
    out = tmp_path / "model"
    command = ("gateway", "export", "--redis", connection.settings.url, "--merged", "--out", str(out))
    done = fedmoe_here(*command)
    assert done.returncode == 0, done.stderr
    assert "merged gateway as a whole model (" in done.stdout
    torch.testing.assert_close(model_logits(out), logits(tmp_path / "adapter"), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model_logits(out), tiny_model()(INPUT).logits, atol=1e-2)
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    assert not list(out.glob("adapter*"))
    card = (out / "README.md").read_text()
    assert "library_name: transformers\n" in card
    assert json.loads((out / "fedmoe.json").read_text())["built_from"].keys() == {"a", "b"}

    half = fedmoe_here(*command, "--dtype", "bf16", "--kind", "merged")
    assert half.returncode == 0, half.stderr
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert "merged into its weights, which are bf16.\n" in (out / "README.md").read_text()
    torch.testing.assert_close(model_logits(out), logits(tmp_path / "adapter"), atol=0.1, rtol=0.1)
    with raises(SettingsError, about="config.json"):
        write(out, read_gateway(GatewayStore(connection)), force=True)  # an adapter into a whole model


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("there", "about"),
    [
        ("config.json", "config.json"), ("model.safetensors", "model.safetensors"),
        ("model-00001-of-00002.safetensors", "model-00001-of-00002.safetensors"),
        ("pytorch_model.bin", "pytorch_model.bin"), ("tiny.gguf", "tiny.gguf"),
        ("adapter_config.json", "adapter_config.json"),
    ],
)  # fmt: skip
def test_no_model_of_others_is_overwritten(
    make: Make, tmp_path: Path, there: str, about: str, force: bool
) -> None:
    """Neither by a whole model nor by an adapter, whether forced or not."""
    (tmp_path / there).write_text("{}")
    with raises(SettingsError, about=about):
        write_model(tmp_path, make(), force=force)
    if there != "adapter_config.json":  # that one is an adapter's own file
        with raises(SettingsError, about=about):
            write(tmp_path, make("b"), force=force) if force else write(tmp_path, make("b"))
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "{}"


def test_a_whole_model_of_another_base_is_refused(make: Make, tmp_path: Path) -> None:
    """By the fingerprint of its weights; and one that would hold values that are not finite."""
    other = save_tiny_model(tmp_path / "other", seed=7)
    with raises(BaseModelError, about="fingerprint"):
        write_model(tmp_path / "out", make(), base_model=str(other))
    with raises(SpecError, about="values"):
        write_model(tmp_path / "out", make("b", scale=float("inf")))
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_model_before(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room is looked at before anything is written; beside it, only one sentence."""
    out = tmp_path / "out"
    (out).mkdir()
    write_model(out, make())
    before = model_logits(out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("fedmoe.tools.whole_model.shutil.disk_usage", lambda path: usage._replace(free=10))
    with raises(SettingsError, about="disk"):
        write_model(out, make("b", seed=3))
    assert torch.equal(model_logits(out), before)


def test_the_card_says_what_is_in_it(make: Make, connection: Connection, tmp_path: Path) -> None:
    """Kind, versions, weights, losses of exactly these versions, the rank that vLLM needs."""
    a, _ = make("a", rank=16), make("b", rank=16, seed=2)
    connection.client.hset("fedmoe:experts", "b", 3)
    GatewayBuilder(connection, GatewaySettings(scale=1.8), holder="one", lease_s=5.0).refresh()
    connection.client.hset(connection.keys.expert("b").meta, "weights_commit", "another")
    for name, loss, version in (("a", 1.75, 0), ("a", 1.5, 1), ("b", 1.25, 2), ("b", 9.0, 3)):
        line = {"worker": "w", "val_loss": loss, "val_version": version, "val_set": "s"}
        connection.client.xadd(connection.keys.expert(name).log, line)
    export = read_gateway(GatewayStore(connection))
    write(tmp_path, export)
    card = (tmp_path / "README.md").read_text()
    assert "The merge of all experts of a FedMoE federation: a LoRA adapter (rank 32, alpha 64, fp32)" in card
    assert f"| a | 1 | `{a.metas['a'].weights_commit}` | 0.45 | 40 | 1.2500 | 1.5000 (v1) |\n" in card
    assert "| 1.35 |  |  | 1.2500 (v2) |\n" in card  # b moved on: its other figures are of a later version
    assert "fitted" not in card
    assert "Merged with `cat scale=1.8 rank=0 weights=" in card
    assert "--max-lora-rank 32 --lora-modules merged-gateway=" in card
    write(tmp_path, replace(export, validation=Validation(version=3, losses={"rows": 1.125})), force=True)
    assert "Validation loss of the merged gateway itself: 1.1250." in (tmp_path / "README.md").read_text()
    measured = replace(a, trained_by={"a": Team(2, 7, 1.5)})
    write(tmp_path, measured)
    assert "| a | 2 | 7 | 1.5000 |" in (tmp_path / "README.md").read_text()


def test_experts_of_two_base_models_are_not_merged(make: Make, connection: Connection) -> None:
    """One sentence; one of weight 0 is no part of the merge, so its base model and template do not count."""
    make("a")
    make("b", base_fingerprint="e" * 32, template=TEMPLATE)
    builder = GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0)
    with raises(SpecError, about="base_model") as caught:
        builder.refresh()
    assert "b is trained on another base model than a" in str(caught.value)
    connection.client.hset("fedmoe:experts", "b", 0)
    assert builder.refresh()
    export = read_gateway(GatewayStore(connection))
    assert list(export.specs) == ["a"]
    assert export.info["base_fingerprint"] == export.metas["a"].base_fingerprint


def test_what_is_not_of_the_expert_that_was_merged_is_not_said(make: Make, connection: Connection) -> None:
    """An expert that was created again under its name says nothing of losses and base model of the merge."""
    make("a")
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    line = {"worker": "w", "val_loss": 1.5, "val_version": 1, "val_set": "s"}
    connection.client.xadd(connection.keys.expert("a").log, line)
    export = read_gateway(GatewayStore(connection))
    assert export.validations["a"].mean == 1.5
    assert export.info["base_fingerprint"] == export.metas["a"].base_fingerprint
    connection.client.hset(
        connection.keys.expert("a").meta, mapping={"lineage": "f" * 16, "base_fingerprint": "e" * 16}
    )
    export = read_gateway(GatewayStore(connection))
    assert (export.validations, export.info["base_fingerprint"]) == ({}, "")


def test_a_trained_gateways_card_names_its_teams(connection: Connection, tmp_path: Path) -> None:
    """By its log: the workers of which experts, how often, and their last loss."""
    gateway = make_expert(connection, "gateway")
    for name in ("sql.alice", "sql.bob", "docs.alice"):
        ScriptedWorker(connection, small_spec(), name, "gateway").push(0.5)
        serve(gateway)
    export = read_gateway(GatewayStore(connection))
    assert export.kind == "trained"
    assert export.trained_by == {"docs": Team(1, 1, 1.5), "sql": Team(2, 2, 1.5)}
    write(tmp_path, as_bf16(export))
    assert (
        "The gateway, trained by the workers of all experts, of a FedMoE federation"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (1, ""), (16, ""), (17, "--max-lora-rank 32 .*--rank 16"), (64, "--max-lora-rank 64 .*--rank 32"),
        (300, "--max-lora-rank 320 .*--rank 256"), (512, "--max-lora-rank 512 .*--rank 320"),
        (513, "no adapter of a rank above 512: for vLLM, export with --rank 512"),
    ],
)  # fmt: skip
def test_vllm_takes_only_certain_ranks(rank: int, said: str) -> None:
    """The smallest that is enough, and the next below."""
    assert re.search(said, vllm_hint(rank))
    assert bool(vllm_hint(rank)) == bool(said)
