"""The LoRA adapter on a base model: its layout, and its parameters as one flat vector.

Training, publishing and pulling all work on that vector: a pull is one `add_`, an optimizer step one pass.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedmoe.errors import SettingsError, SpecError
from fedmoe.model.reach import Reach, other_towers, reach_of
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora import ALL_LINEAR, LoraSettings
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.spec import Spec, beneath

TAKE_CONFIG = "Take the LoraConfig of the expert: fedmoe.connect(url).expert(name).lora_config()"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPlan:
    """The plan of an adapter that does not exist yet.

    Args:
        layout: its tensors.
        towers: parts of the base model without an adapter, because no text goes through them.
        reach: the share of the weights that the adapter covers.
    """

    layout: Layout
    towers: tuple[str, ...]
    reach: Reach


def plan_adapter(config: PretrainedConfig, lora: LoraSettings) -> AdapterPlan:
    """Plan the adapter from the model's config alone; tensors are named as in adapter_model.safetensors.

    Raises:
        SettingsError: if a target is not the name of a linear module of the text model.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        towers = other_towers(model)
        options = {"r": lora.rank, "target_modules": _target_names(model, lora.targets, towers)}
        if towers:
            options["exclude_modules"] = beneath(towers)
        peft_model = _inject(model, options | {"task_type": "CAUSAL_LM"})
    parameters = _lora_parameters(peft_model)
    layout = Layout.of((name, parameter.shape) for name, parameter in parameters.items())
    return AdapterPlan(layout=layout, towers=towers, reach=reach_of(peft_model.unload(), layout, towers))


def adapter_layout(config: PretrainedConfig, lora: LoraSettings) -> Layout:
    """The layout of `plan_adapter`."""
    return plan_adapter(config, lora).layout


def attach_adapter(
    model: PreTrainedModel | PeftModel, spec: Spec, name: str = "default", *, trainable: bool = True
) -> tuple[PeftModel, torch.Tensor]:
    """Put the spec's adapter, with its initial weights, on a model that is already on its device.

    A model may get several adapters; `switch_to` says with which one it computes. One that is not `trainable` gets no
    gradient.

    Returns:
        The peft model, and the flat vector (numel,) fp32; all LoRA parameters of this adapter are views of it.

    Raises:
        SpecError: if the model does not have the spec's tensors.
    """
    peft_model = _inject(model, spec.adapter_config() | {"inference_mode": False}, name)
    parameters = _lora_parameters(peft_model, name)
    _check_tensors(parameters, dict(spec.layout.tensors))
    flat = initial_weights(spec.layout, spec.init_seed).to(model.device, copy=True)
    for tensor, view in spec.layout.views(flat).items():
        parameters[tensor].data = view
        parameters[tensor].requires_grad_(trainable)
    return peft_model, flat


def switch_to(model: PeftModel, name: str) -> Callable[[], None]:
    """A function that lets the model compute with this one of its adapters from then on.

    A gradient reaches only the adapter that computed. peft's own `set_adapter` walks over all modules, which takes
    milliseconds, and a worker that trains by turns switches at each step; so this one keeps the list of layers, until
    the model gets another adapter, which may be on layers that had none.
    """
    layers: list[BaseTunerLayer] = []
    adapters = 0

    def switch() -> None:
        nonlocal adapters
        if adapters != len(model.peft_config):
            adapters = len(model.peft_config)
            layers[:] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for layer in layers:
            layer._active_adapter = [name]  # there is no public setter but the slow one

    return switch


@contextmanager
def adapter_loaded(
    model: PreTrainedModel, file: bytes | memoryview, adapter_config: Mapping[str, Any]
) -> Iterator[PeftModel]:
    """Put an adapter of any rank on the model for the duration of the context, then remove it.

    Raises:
        SpecError: if the file is not a safetensors file, or its tensors do not fit the model and the config.
    """
    try:
        tensors = load(bytes(file))
    except SafetensorError as error:
        raise SpecError(
            f"the adapter's weights are not a safetensors file ({error})", about="safetensors"
        ) from error
    peft_model = _inject(model, adapter_config)
    try:
        parameters = _lora_parameters(peft_model)
        _check_tensors(parameters, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[name])
        yield peft_model.eval()
    finally:
        peft_model.unload()


def _target_names(model: PreTrainedModel, targets: Sequence[str], towers: Sequence[str]) -> list[str]:
    """Last parts of the names of the linear modules that `targets` selects, without output layer and `towers`."""
    outside = tuple(f"{tower}." for tower in towers)
    output = model.get_output_embeddings()
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
            and module is not output
            and not f"{name}.".startswith(outside)
        }
    )
    if tuple(targets) == (ALL_LINEAR,):
        return linear
    unknown = sorted(set(targets) - set(linear))
    if unknown:
        raise SettingsError(
            f"the base model has no LoRA target {unknown[0]!r}: choose among {', '.join(linear)}, "
            f"or {ALL_LINEAR} alone",
            about="targets",
        )
    return list(targets)


def _inject(
    model: PreTrainedModel | PeftModel, adapter_config: Mapping[str, Any], adapter: str = "default"
) -> PeftModel:
    # peft warns if the base's name is not the model's directory, but a worker may keep the model anywhere.
    skipped = ("peft_type", "base_model_name_or_path")
    options = {name: value for name, value in adapter_config.items() if name not in skipped}
    # A Conv1D (GPT-2) stores its weight transposed; peft would correct the option, with a warning.
    options["fan_in_fan_out"] = any(isinstance(module, Conv1D) for module in model.modules())
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads an attribute that transformers 5.24 renamed; a user cannot change that.
            warnings.simplefilter("ignore", FutureWarning)
            if not isinstance(model, PeftModel):
                return get_peft_model(model, LoraConfig(**options), adapter_name=adapter)
            model.add_adapter(adapter, LoraConfig(**options))
            return model
    # peft: no module of the model has the name of a target, or a field is of another type
    except (ValueError, TypeError) as error:
        raise SpecError(f"the adapter does not fit the base model ({error})", about="base_model") from error


def _lora_parameters(peft_model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """The parameters of a LoRA adapter by their names in adapter_model.safetensors."""
    return {
        _saved_name(name, adapter): parameter
        for name, parameter in peft_model.named_parameters()
        if re.search(_NAME_OF.format(re.escape(adapter)), name)
    }


# The adapter's name, in that of a parameter, follows `lora_A` or `lora_B`.
_NAME_OF = r"(\.lora_\w+)\.{}(?=\.|$)"


def _saved_name(name: str, adapter: str) -> str:
    """A parameter's name in adapter_model.safetensors: without the adapter's."""
    return re.sub(_NAME_OF.format(re.escape(adapter)), r"\1", name)


def _check_tensors(have: Mapping[str, nn.Parameter], want: Mapping[str, tuple[int, ...]]) -> None:
    odd = sorted(have.keys() ^ want.keys())
    if odd:
        place = "the base model" if odd[0] in want else "the adapter"
        raise SpecError(
            f"{place} has no tensor {odd[0]!r} ({len(odd)} tensors differ in all): is this the base model of the spec?",
            about="tensors",
        )
    for name, shape in want.items():
        if tuple(have[name].shape) != shape:
            raise SpecError(
                f"tensor {name!r} has shape {list(shape)} in the adapter, "
                f"{list(have[name].shape)} on the base model: is this the base model of the spec?",
                about="shape",
            )


@dataclass(frozen=True, slots=True)
class BoundAdapter:
    """A LoRA adapter whose parameters are views of one flat vector (numel,) fp32.

    `places`: by the tensor's name, the module that has it, the name it has there, and the address of its values.
    """

    flat: torch.Tensor
    places: Mapping[str, tuple[nn.Module, str, int]]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The model's parameters now, by the tensor's name."""
        return {name: getattr(module, leaf) for name, (module, leaf, _) in self.places.items()}

    def check(self) -> None:
        """Raise SettingsError if the model's parameters are no longer those views."""
        for name, (module, leaf, address) in self.places.items():
            parameter = getattr(module, leaf)
            if parameter.data_ptr() != address or parameter.dtype != torch.float32:
                raise SettingsError(
                    f"the adapter's tensor {name!r} was replaced after joining (the model was moved, converted, loaded "
                    "again or joined again), so the expert would learn nothing from it: do that first, then join",
                    about="tensors",
                )


def bind_adapter(model: nn.Module, spec: Spec) -> BoundAdapter:
    """Make the LoRA parameters of a given PEFT model views of one flat vector, with the same values.

    The parameters stay the same objects, so an existing optimizer keeps working.

    Raises:
        SettingsError: if the model trains anything but one LoRA adapter in fp32 on one device, with the spec's tensors
            and scaling.
    """
    config = _lora_config(model)
    parameters = _lora_parameters(model, config.name)
    others = [name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name]
    if others:
        raise SettingsError(
            f"the model trains {len(others)} tensors beside its LoRA adapter, first {others[0]!r}: FedMoE shares an "
            "adapter only; freeze the base model, and give no bias or modules_to_save",
            about="trainable",
        )
    try:
        _check_tensors(parameters, dict(spec.layout.tensors))
    except SpecError as error:
        raise SettingsError(f"{error} {TAKE_CONFIG}", about=error.about) from error
    if odd := config.scalings - {spec.lora.scaling}:
        raise SettingsError(
            f"the adapter is scaled by {min(odd):g}, the expert's by {spec.lora.scaling:g}. {TAKE_CONFIG}",
            about="scaling",
        )
    kinds = {(parameter.dtype, parameter.device) for parameter in parameters.values()}
    if len(kinds) > 1 or {dtype for dtype, _ in kinds} != {torch.float32}:
        found = ", ".join(sorted(f"{str(d).removeprefix('torch.')} on {where}" for d, where in kinds))
        raise SettingsError(
            f"the adapter must be fp32 on one device, not {found}: load it in fp32, and compute in bf16 with autocast",
            about="dtype",
        )
    ((_, device),) = kinds
    flat = torch.empty(spec.layout.numel, dtype=torch.float32, device=device)
    for name, view in spec.layout.views(flat).items():
        view.copy_(parameters[name].data)
        parameters[name].data = view
        parameters[name].requires_grad_(True)
    places = {}
    for full, parameter in model.named_parameters():
        if ".lora_" in full:
            module, _, leaf = full.rpartition(".")
            places[_saved_name(full, config.name)] = (model.get_submodule(module), leaf, parameter.data_ptr())
    return BoundAdapter(flat, places)


@dataclass(frozen=True, slots=True)
class _Bound:
    name: str
    scalings: frozenset[float]


def _lora_config(model: nn.Module) -> _Bound:
    """The name and the scalings of the model's one LoRA adapter, which are one unless it has a pattern of them."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, PeftModel) or not configs:
        raise SettingsError(
            "the model has no LoRA adapter, so all its weights would be trained: put one on it "
            "(peft_config=fedmoe.connect(url).expert(name).lora_config())",
            about="adapter",
        )
    if len(configs) > 1:
        raise SettingsError(
            f"the model has the adapters {', '.join(configs)}: FedMoE trains one, so remove the others",
            about="adapters",
        )
    ((name, config),) = configs.items()
    if config.peft_type != PeftType.LORA or config.use_dora:
        raise SettingsError(f"the adapter {name!r} is not plain LoRA. {TAKE_CONFIG}", about="LoRA")
    found = (getattr(module, "scaling", None) for module in model.modules())
    return _Bound(name, frozenset(one[name] for one in found if isinstance(one, dict) and name in one))
