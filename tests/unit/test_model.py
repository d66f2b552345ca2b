"""fedmoe.model and fedmoe.protocol.lora_init: a wrong base is told from the right one; the adapter is one vector."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
)

from fedmoe.errors import BaseModelError, SettingsError, SpecError
from fedmoe.model.adapter import adapter_layout, adapter_loaded, attach_adapter
from fedmoe.model.base import (
    check_structure,
    choose_device,
    choose_precision,
    fingerprint,
    has_weights,
    load_base,
    load_config,
    structure,
)
from fedmoe.model.local import has_tokenizer
from fedmoe.model.tokenizer import load_tokenizer
from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import Spec
from tests.errors import raises
from tests.strategies import randn
from tests.tiny import save_tiny_model, tiny_config, tiny_model

# What peft warns of when the tests call it themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:fan_in_fan_out")
CPU = torch.device("cpu")
COMMIT = "0" * 40
TOKENS = torch.arange(1, 25).view(2, 12)
CONFIGS = {
    "qwen2": tiny_config(),
    "llama": LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ),
    # Conv1D modules, whose weights are stored transposed.
    "gpt2": GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
every_architecture = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make_spec(config: PretrainedConfig, *, rank: int = 4, targets: tuple[str, ...] = ("all-linear",)) -> Spec:
    lora = LoraSettings(rank=rank, alpha=8.0, targets=targets)
    layout = adapter_layout(config, lora)
    return Spec(base_model="tiny", base_config=structure(config), layout=layout, lora=lora)


def adapter_file(layout: Layout, flat: torch.Tensor) -> memoryview:
    buffer = AdapterBuffer(layout)
    buffer.flat.copy_(flat)
    return buffer.file


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(input_ids=TOKENS).logits.float()
    return values


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy_of_tiny(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "copy"))


# The base model


def test_only_a_config_of_another_structure_is_refused_and_the_field_named(tiny_dir: Path) -> None:
    """The spec's numbers against a config's: equal ones pass, one that differs is named with both values."""
    config = load_config(str(tiny_dir))
    spec_numbers = json.loads(json.dumps(structure(config)))
    check_structure(config, spec_numbers)
    with raises(BaseModelError, about="hidden_size"):
        check_structure(config, spec_numbers | {"hidden_size": 896})
    with raises(BaseModelError, about="model_type"):
        check_structure(CONFIGS["llama"], spec_numbers)


@pytest.mark.parametrize(
    ("config", "about"),
    [
        (None, "config.json"),
        ("{", "base_model"),
        ({"model_type": "no_such_type"}, "base_model"),
        (T5Config().to_dict(), "architectures"),
        (BertConfig(architectures=["BertForMaskedLM"]).to_dict(), "architectures"),
        (tiny_config().to_dict() | {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_is_no_causal_model_is_refused(tmp_path: Path, config: object, about: str) -> None:
    """A directory without a usable config, of another kind of model, or of a quantised one."""
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    with raises(BaseModelError, about=about):
        load_config(str(tmp_path))


def test_a_missing_directory_is_said_to_be_missing(tmp_path: Path) -> None:
    """A path that does not exist and cannot be a hub id, for the config and for the weights."""
    missing = str(tmp_path / "none")
    for about, load in (
        ("base_model", load_config), ("tokenizer", load_tokenizer),
        ("weights", lambda path: load_base(path, device=CPU)),
    ):  # fmt: skip
        with pytest.raises(BaseModelError, match="neither a directory nor in the local cache") as caught:
            load(missing)
        assert caught.value.about == about
    assert not has_weights(missing)


def test_weights_are_there_only_if_every_shard_is(copy_of_tiny: Path) -> None:
    """A whole checkpoint, one in shards, one whose last shard is missing, one whose index is damaged."""
    assert has_weights(str(copy_of_tiny))
    (copy_of_tiny / "model.safetensors").unlink()
    assert not has_weights(str(copy_of_tiny))
    tiny_model().save_pretrained(copy_of_tiny, max_shard_size="100KB")
    shards = sorted(copy_of_tiny.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert has_weights(str(copy_of_tiny))
    shards[-1].unlink()
    assert not has_weights(str(copy_of_tiny))
    (copy_of_tiny / "model.safetensors.index.json").write_text("{}")
    with raises(BaseModelError, about="model.safetensors.index.json"):
        has_weights(str(copy_of_tiny))


def test_a_cached_hub_model_is_loaded_without_the_network(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id whose files are in the local cache: config, weights and tokenizer come without a request."""
    repository = tmp_path / "models--org--tiny"
    shutil.copytree(tiny_dir, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    requests: list[object] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *where, **_: requests.append(where))
    assert structure(load_config("org/tiny")) == structure(load_config(str(tiny_dir)))
    assert has_weights("org/tiny")
    assert not has_weights("org/other")
    assert fingerprint(load_base("org/tiny", device=CPU)) == fingerprint(tiny_model())
    assert len(load_tokenizer("org/tiny")) == tiny_config().vocab_size
    assert (has_tokenizer("org/tiny"), has_tokenizer("org/other")) == (True, False)
    assert not requests


def test_the_loaded_base_is_frozen_and_in_eval_mode(tiny_dir: Path) -> None:
    """Neither gradients nor dropout in the base; fp32 by default, and the tokenizer is the model's."""
    model, tokenizer = load_base(str(tiny_dir), device=CPU), load_tokenizer(str(tiny_dir))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size


def test_a_checkpoint_that_lacks_a_weight_is_refused(copy_of_tiny: Path) -> None:
    """The library would fill the gap with random values and a warning."""
    weights = load_file(copy_of_tiny / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy_of_tiny / "model.safetensors", metadata={"format": "pt"})
    with raises(BaseModelError, about="tensors"):
        load_base(str(copy_of_tiny), device=CPU)


def test_a_base_that_bears_an_adapter_is_refused(copy_of_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library would put the adapter on, and the fingerprint would not see it: nobody's base is the same."""
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(copy_of_tiny)
    loaded = AutoModelForCausalLM.from_pretrained(copy_of_tiny)
    assert loaded._hf_peft_config_loaded
    assert fingerprint(loaded) == fingerprint(tiny_model())
    for load in (load_config, lambda path: load_base(path, device=CPU)):
        with raises(BaseModelError, about="adapter_config.json"):
            load(str(copy_of_tiny))


def test_a_damaged_checkpoint_is_refused_in_a_sentence(copy_of_tiny: Path) -> None:
    """A download that broke off."""
    path = copy_of_tiny / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with raises(BaseModelError, about="weights"):
        load_base(str(copy_of_tiny), device=CPU)


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_the_fingerprint_is_of_the_checkpoint_and_not_of_how_it_was_loaded(
    tmp_path: Path, saved: torch.dtype
) -> None:
    """Loaded as fp32 and as bf16, with and without an adapter, it is one; of another seed, another."""
    save_tiny_model(tmp_path)
    tiny_model().to(saved).save_pretrained(tmp_path)
    full = load_base(str(tmp_path), device=CPU)
    half = load_base(str(tmp_path), device=CPU, dtype=torch.bfloat16)
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    before = fingerprint(full)
    assert len(before) == 16
    assert before == fingerprint(half)
    peft_model, _ = attach_adapter(full, make_spec(tiny_config()))
    assert fingerprint(peft_model) == before
    assert fingerprint(tiny_model(seed=1)) != before


def test_the_fingerprint_sees_a_change_of_any_tensor() -> None:
    """One tensor changed throughout, the smallest there is: another fingerprint."""
    model = tiny_model()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight.add_(0.1)
    assert fingerprint(model) != before


def test_devices_and_precisions_that_cannot_be_used_are_refused() -> None:
    """By name; auto is whatever the machine has."""
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with raises(SettingsError, about="device"):
        choose_device("tpu9")
    assert choose_precision("fp32", CPU) == torch.float32
    assert choose_precision("bf16", CPU) == torch.bfloat16
    with raises(SettingsError, about="precision"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(("flag", "dtype"), [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)])
def test_auto_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, flag: str, dtype: torch.dtype
) -> None:
    """bf16 on a CPU that multiplies it, fp32 on one that would emulate it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
    assert choose_precision("auto", CPU) == dtype


# The initial weights


def test_the_initialisation_depends_on_seed_and_name_alone() -> None:
    """The same tensor gets the same values in any layout; another name or seed gives others; B is zero."""
    a, other, b = ("x.lora_A.weight", (2, 8)), ("y.lora_A.weight", (2, 8)), ("x.lora_B.weight", (8, 2))
    one = Layout.of([a])
    both = Layout.of([a, other, b])
    views = both.views(initial_weights(both, 7))
    assert torch.equal(initial_weights(one, 7), views[a[0]].flatten())
    assert not torch.equal(views[a[0]], views[other[0]])
    assert not torch.equal(initial_weights(one, 8), views[a[0]].flatten())
    assert not views[b[0]].any()


def test_the_initialisation_is_the_same_on_every_machine() -> None:
    """The very bits of a few values: a change here changes version 0 of every expert."""
    flat = initial_weights(Layout.of([("x.lora_A.weight", (1, 4))]), 0)
    assert [value.hex() for value in flat.tolist()] == [
        "0x1.76f0e80000000p-2",
        "-0x1.d54c7c0000000p-2",
        "-0x1.0566e00000000p-5",
        "0x1.3351800000000p-4",
    ]


def test_the_initialisation_is_spread_as_pefts() -> None:
    """A is uniform within ±1/√in: same bound and variance as the one peft draws."""
    flat = initial_weights(Layout.of([("x.lora_A.weight", (16, 64))]), 0)
    linear = torch.nn.Sequential(torch.nn.Linear(64, 8))
    theirs = get_peft_model(linear, LoraConfig(r=16, target_modules=["0"]))
    (drawn,) = (p for name, p in theirs.named_parameters() if "lora_A" in name)
    assert flat.abs().max().item() == pytest.approx(drawn.abs().max().item(), rel=0.02)
    assert flat.abs().max().item() <= 1 / 8
    assert flat.std().item() == pytest.approx(drawn.std().item(), rel=0.1)
    assert abs(flat.mean().item()) < 0.01


# The adapter


@every_architecture
def test_the_layout_from_the_config_is_pefts_saved_adapter(config: PretrainedConfig, tmp_path: Path) -> None:
    """Without weights, the names and shapes that peft's own `all-linear` saves in a safetensors file."""
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(random_model(config), peft_config).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    assert dict(adapter_layout(config, LoraSettings(rank=4)).tensors) == theirs


def test_targets_by_name_and_unknown_targets() -> None:
    """Only the named modules get an adapter; a name that is none is refused with those there are."""
    layout = adapter_layout(tiny_config(), LoraSettings(rank=2, targets=("q_proj", "v_proj")))
    assert {name.split(".")[-3] for name, _ in layout.tensors} == {"q_proj", "v_proj"}
    for wrong in ("q_porj", "lm_head", "embed_tokens"):
        with pytest.raises(
            SettingsError, match=f"no LoRA target '{wrong}': choose among down_proj, gate_proj"
        ):
            adapter_layout(tiny_config(), LoraSettings(rank=2, targets=("q_proj", wrong)))


@every_architecture
def test_the_exported_adapter_computes_what_the_attached_one_does(
    config: PretrainedConfig, tmp_path: Path
) -> None:
    """The exported directory, loaded by peft alone, gives the logits of the flat vector that was attached."""
    spec = make_spec(config)
    peft_model, flat = attach_adapter(random_model(config), spec)
    untrained = logits(peft_model)
    flat.add_(randn(0, flat.numel()), alpha=0.1)
    trained = logits(peft_model)
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter_file(spec.layout, flat))
    (tmp_path / "adapter_config.json").write_text(json.dumps(spec.adapter_config()))
    loaded = PeftModel.from_pretrained(random_model(config), str(tmp_path))
    torch.testing.assert_close(logits(loaded), trained)
    torch.testing.assert_close(untrained, logits(random_model(config)))
    assert (trained - untrained).abs().max() > 0.1


def test_the_attached_adapter_is_version_0_in_fp32_also_on_a_bf16_base() -> None:
    """The flat vector is the shared initialisation, and the only thing that trains."""
    spec = make_spec(tiny_config())
    peft_model, flat = attach_adapter(random_model(tiny_config()).to(torch.bfloat16), spec)
    begun = initial_weights(spec.layout, spec.init_seed).clone()
    assert torch.equal(flat, begun)
    flat.add_(1.0)
    assert torch.equal(initial_weights(spec.layout, spec.init_seed), begun), "training changed what all share"
    flat.copy_(begun)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert sum(parameter.numel() for parameter in trained) == flat.numel()
    assert logits(peft_model).isfinite().all()


@pytest.mark.parametrize(
    ("other", "about"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=4), "base_model"),
        (
            LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4),
            "tensors",
        ),
        (
            LlamaConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
            "shape",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(other: PretrainedConfig, about: str) -> None:
    """Other modules, more layers, other shapes: both when it is attached and when a file of it is loaded."""
    other.vocab_size = 100
    spec = make_spec(CONFIGS["llama"])
    with raises(SpecError, about=about):
        attach_adapter(random_model(other), spec)
    model = random_model(other)
    file = adapter_file(spec.layout, initial_weights(spec.layout, 0))
    with raises(SpecError, about=about), adapter_loaded(model, file, spec.adapter_config()):
        pass
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_an_adapter_is_on_the_model_only_while_it_is_loaded() -> None:
    """Adapters of different rank in turn, each as if it were the first; the base is bare again."""
    model = random_model(tiny_config())
    bare = logits(model)
    for rank in (2, 6):
        spec = make_spec(tiny_config(), rank=rank)
        attached, flat = attach_adapter(random_model(tiny_config()), spec)
        flat.add_(randn(rank, flat.numel()), alpha=0.1)
        with adapter_loaded(model, adapter_file(spec.layout, flat), spec.adapter_config()) as loaded:
            torch.testing.assert_close(logits(loaded), logits(attached))
        assert torch.equal(logits(model), bare)
    with raises(SpecError, about="safetensors"), adapter_loaded(model, b"garbage", {}):
        pass
