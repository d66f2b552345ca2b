"""What an adapter reaches of base models that are not plain stacks of linear modules, and what it leaves out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from fedmoe.errors import SettingsError
from fedmoe.model.adapter import adapter_loaded, attach_adapter, plan_adapter
from fedmoe.model.base import structure
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.spec import Spec
from fedmoe.tools.export import Export
from fedmoe.tools.export_files import write
from tests.errors import raises
from tests.tiny import tiny_config

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
LORA = LoraSettings(rank=2, alpha=4.0)
TOKENS = torch.arange(1, 9).view(1, 8)
MIXTURE = Qwen3MoeConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip
MIXTRAL = MixtralConfig(
    vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4,
)  # fmt: skip


def with_eyes() -> Gemma3Config:
    """A Gemma 3 with a vision tower whose modules bear the text model's names, and others."""
    text = Gemma3TextConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )  # fmt: skip
    return Gemma3Config(text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4)


def spec_of(config: PretrainedConfig) -> Spec:
    plan = plan_adapter(config, LORA)
    return Spec(
        base_model="tiny", base_config=structure(config), layout=plan.layout, lora=LORA, towers=plan.towers
    )


def model_of(config: PretrainedConfig) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [tiny_config(), GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4), OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )],
    ids=["qwen2", "gpt2", "opt"],
)  # fmt: skip
def test_a_plain_model_is_reached_whole(config: PretrainedConfig) -> None:
    """All but its norms and biases; it has no other towers."""
    plan = plan_adapter(config, LORA)
    assert plan.towers == ()
    assert plan.reach.share > 0.95


@pytest.mark.parametrize("config", [MIXTURE, MIXTRAL], ids=["qwen3_moe", "mixtral"])
def test_the_experts_of_a_mixture_are_said_not_to_be_reached(config: PretrainedConfig) -> None:
    """They are fused parameters, no linear modules; the shares are of all weights beside the embeddings."""
    plan = plan_adapter(config, LORA)
    model = model_of(config)
    apart = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    sizes = {name: p.numel() for name, p in model.named_parameters() if id(p) not in apart}
    attention = sum(size for name, size in sizes.items() if "_proj.weight" in name and "self_attn" in name)
    experts = sum(size for name, size in sizes.items() if name.endswith("experts.gate_up_proj"))
    assert plan.reach.share == pytest.approx(attention / sum(sizes.values()))
    assert plan.reach.share < 0.4
    assert plan.reach.not_reached.startswith(
        f"mlp.experts.gate_up_proj ({experts / sum(sizes.values()):.0%}), "
    )
    assert "mlp.experts.down_proj" in plan.reach.not_reached


def test_a_vision_tower_is_left_out() -> None:
    """No text goes through it; modules of the same name in the text model are reached."""
    config = with_eyes()
    plan = plan_adapter(config, LORA)
    assert plan.towers == ("model.vision_tower",)
    names = {name for name, _ in plan.layout.tensors}
    assert {name.split(".")[3] for name in names} == {"language_model"}
    assert len(names) == 2 * 2 * 7
    assert "model.vision_tower (" in plan.reach.not_reached
    with raises(SettingsError, about="targets"):
        plan_adapter(config, replace(LORA, targets=("fc1",)))


def test_an_adapter_beside_a_vision_tower_goes_all_the_way(tmp_path: Path) -> None:
    """Attached, loaded to evaluate, and exported and loaded by peft, it has the same tensors and gives the same."""
    config = with_eyes()
    spec = spec_of(config)
    assert Spec.from_json(spec.to_json()) == spec
    buffer = AdapterBuffer(spec.layout)
    adapted, flat = attach_adapter(model_of(config), spec)
    with torch.no_grad():
        flat.copy_(torch.randn(len(flat), generator=torch.Generator().manual_seed(1)))
        buffer.flat.copy_(flat)
        wanted = adapted(input_ids=TOKENS).logits
        with adapter_loaded(model_of(config), buffer.file, spec.adapter_config()) as loaded:
            assert torch.equal(loaded(input_ids=TOKENS).logits, wanted)
        export = Export(
            name="a", file=bytes(buffer.file), config=spec.adapter_config(), built_from={}, behind={},
            info={"base_model": "tiny"},
        )  # fmt: skip
        write(tmp_path, export)
        peft_model = PeftModel.from_pretrained(model_of(config), tmp_path)
        assert torch.allclose(peft_model(input_ids=TOKENS).logits, wanted, atol=1e-5)
