"""The base model: find it, check that it is the right one, and load it.

All workers of an expert must train on the same base model. Its config is compared with the spec, and its weights by a
fingerprint of sampled values, which takes milliseconds and distinguishes an Instruct from a Base checkpoint.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedmoe.errors import BaseModelError, SettingsError
from fedmoe.model.local import local_file

STRUCTURE = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "hidden_act",
)
ADAPTER_CONFIG = "adapter_config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SAMPLES_PER_TENSOR = 16
HUB_TIMEOUT_S = 10.0
PRECISIONS = ("auto", "fp32", "bf16")
_WITH_ADAPTER = (
    "the base model {} holds an adapter_config.json, so an adapter would be loaded with it: take the bare base model, "
    "or merge the adapter into its weights first"
)
_GOLDEN_PRIME = 2654435761  # 2^32 / golden ratio: multiples of it spread evenly over rows and columns


def load_config(base_model: str) -> PretrainedConfig:
    """Load the config of a model directory or hub id; a file in the local cache is never requested from the network.

    Raises:
        BaseModelError: if it cannot be found, is not a causal language model, is quantised, or has an adapter.
    """
    cached = local_file(base_model, "config.json") is not None
    if Path(base_model).is_dir() and not cached:
        raise BaseModelError(
            f"the directory {base_model} holds no config.json, so it is not a model", about="config.json"
        )
    if local_file(base_model, ADAPTER_CONFIG) is not None:
        raise BaseModelError(_WITH_ADAPTER.format(base_model), about="adapter_config.json")
    try:
        config = AutoConfig.from_pretrained(base_model, local_files_only=cached, trust_remote_code=False)
    except Exception as error:  # transformers raises many unrelated types
        raise BaseModelError(why_not(base_model, error), about="base_model") from error
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    architectures = config.architectures or [causal]
    if causal is None or causal not in architectures:
        kind = ", ".join(map(str, config.architectures or [config.model_type]))
        raise BaseModelError(
            f"the base model {base_model} is a {kind}: take a causal language model", about="architectures"
        )
    if getattr(config, "quantization_config", None):
        raise BaseModelError(
            f"the base model {base_model} is quantised: take its unquantised checkpoint",
            about="quantization_config",
        )
    return config


def check_reachable(base_model: str) -> None:
    """Ask the hub once for a model that is not on this machine; without this, its library retries for half a minute.

    Raises:
        BaseModelError: if the hub cannot be reached; another error is left for `load_config` to name.
    """
    if Path(base_model).is_dir() or local_file(base_model, "config.json") is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(base_model, "config.json"), timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        pass  # the hub has answered
    except Exception as error:  # of its HTTP library, which changes
        raise BaseModelError(why_not(base_model, error), about="base_model") from error


def structure(config: PretrainedConfig) -> dict[str, Any]:
    """The fields of this config that define the architecture, as values for JSON."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in STRUCTURE}
    return {name: value for name, value in found.items() if value is not None}


def check_structure(config: PretrainedConfig, expected: dict[str, Any]) -> None:
    """Compare a config with the spec's `base_config`; a field that only one of them has is not compared.

    Raises:
        BaseModelError: if a field differs; the message names the first one.
    """
    where = config.name_or_path or "the config at hand"
    for name, have in structure(config).items():
        want = expected.get(name, have)
        if have != want:
            raise BaseModelError(
                f"{name} is {want} in the expert's spec, {have} in {where}: "
                "train on the base model that the spec names",
                about=name,
            )


def has_weights(base_model: str) -> bool:
    """True if all weight files are in the directory or the local hub cache; uses no network.

    Raises:
        BaseModelError: if the list of the shards cannot be read.
    """
    for name in WEIGHT_FILES:
        if local_file(base_model, name) is not None:
            return True
        index = local_file(base_model, f"{name}.index.json")
        if index is not None:
            return all(local_file(base_model, shard) is not None for shard in _shards(index))
    return False


def load_base(
    base_model: str, *, device: torch.device, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Load the weights; the model is frozen and in eval mode, without dropout.

    Args:
        base_model: directory or hub id.
        device: device of the model.
        dtype: of the weights, "auto" for the checkpoint's own. On a CPU fp32 is faster than bf16, also with
            bf16 autocast (1.6 against 2.0 s a step of SmolLM2); on a GPU bf16 halves the memory.

    Raises:
        BaseModelError: if it cannot be loaded, lacks weights, or has an adapter.
    """
    config_file = local_file(base_model, "config.json")
    # A cached hub model is loaded as a directory, because transformers would use the network for its id.
    source = str(config_file.parent) if config_file and has_weights(base_model) else base_model
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # transformers and safetensors raise many unrelated types
        raise BaseModelError(why_not(base_model, error), about="weights") from error
    if getattr(
        model, "_hf_peft_config_loaded", False
    ):  # transformers found an adapter on the hub and attached it
        raise BaseModelError(_WITH_ADAPTER.format(base_model), about="adapter_config.json")
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BaseModelError(
            f"the base model {base_model} lacks {len(missing)} of its tensors ({missing[0]}): "
            "take a whole checkpoint",
            about="tensors",
        )
    model.requires_grad_(False)
    placed: PreTrainedModel = model.to(device).eval()
    return placed


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits that distinguish checkpoints of one architecture, with or without an adapter attached.

    They cover the name, the shape and a few values of each tensor. The values are taken as bf16, so that a checkpoint
    loaded as bf16 and as fp32 gives the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted((_base_name(name), p) for name, p in model.named_parameters()):
        if ".lora_" in name:
            continue
        size = parameter.numel()
        places = [k * _GOLDEN_PRIME % size for k in range(min(size, SAMPLES_PER_TENSOR))]
        sample = parameter.detach().reshape(-1)[places].to(torch.bfloat16).view(torch.int16)
        digest.update(repr((name, tuple(parameter.shape), sample.tolist())).encode())
    return digest.hexdigest()[:16]


def choose_device(name: str = "auto") -> torch.device:
    """The device of that name; "auto" is the first CUDA GPU, else the CPU.

    Raises:
        SettingsError: if it cannot be used on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise SettingsError(
            f"device {name!r} cannot be used on this machine: try auto or cpu", about="device"
        ) from error


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in (autocast); "auto" is bf16 where the hardware supports it, else fp32.

    Raises:
        SettingsError: if there is no precision of that name.
    """
    if name not in PRECISIONS:
        raise SettingsError(
            f"precision must be one of {', '.join(PRECISIONS)}, not {name!r}", about="precision"
        )
    if name == "auto":
        name = "bf16" if _has_native_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return False


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"{index} is damaged: download the base model again", about=index.name
        ) from error


def _base_name(name: str) -> str:
    """The name that a parameter had before peft wrapped its module."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def why_not(base_model: str, error: Exception, what: str = "the base model") -> str:
    """A sentence: why a part of the base model cannot be loaded, and what to do."""
    reason = str(error).strip().partition("\n")[0].rstrip(". ") or type(error).__name__
    if Path(base_model).is_dir() or has_weights(base_model):
        return f"{what} {base_model} cannot be loaded ({reason}): is its download complete?"
    return (
        f"{what} {base_model} is neither a directory nor in the local cache, nor can it be fetched "
        f"({reason}): give a model's directory, or a hub id on a machine that reaches the hub"
    )
