"""One base model for all virtual chains: each puts its own adapter on it before it computes."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from consumers.gateway.merge import Merged
from fedmoe.data.encode import Example
from fedmoe.model.adapter import attach_adapter
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from producers.trainer import Computed, Trainer

OWN, UNDER = "default", "under"  # the trained adapter, and the frozen one under it


class Stage:
    """A model whose adapters are views of whatever flat vectors are shown on it."""

    def __init__(self, model: PreTrainedModel, spec: Spec) -> None:
        self.model, self._first = attach_adapter(model, spec)
        self.spec = spec
        self._active: tuple[str, ...] = (OWN,)
        self._parameters = {OWN: self._named(OWN)}

    def show(
        self, flat: torch.Tensor, *, grad: torch.Tensor | None = None, under: torch.Tensor | None = None
    ) -> None:
        """Make the model's adapter a view of `flat` (numel,) fp32, with its gradients in `grad`.

        `under` (numel,) is a second adapter that is active and frozen.
        """
        if under is not None:
            self._add(UNDER, self.spec.lora.rank)
            self._point(UNDER, self.spec.layout, under)
        self._point(OWN, self.spec.layout, flat)
        self._activate((OWN,) if under is None else (OWN, UNDER))
        if grad is not None:
            for name, view in self.spec.layout.views(grad).items():
                self._parameters[OWN][name].grad = view

    def show_merged(self, merged: Merged) -> str:
        """Make a merged adapter, of any rank, the model's only one; returns its name."""
        name = f"merged{merged.rank}"
        self._add(name, merged.rank)
        self._point(name, merged.layout, merged.flat)
        self._activate((name,))
        return name

    def _add(self, adapter: str, rank: int) -> None:
        if adapter in self._parameters:
            return
        skipped = ("peft_type", "base_model_name_or_path", "inference_mode")
        config = self.spec.adapter_config(rank=rank)
        options: dict[str, Any] = {name: value for name, value in config.items() if name not in skipped}
        self.model.add_adapter(adapter, LoraConfig(**options))
        self._parameters[adapter] = self._named(adapter)
        self._activate(self._active, always=True)

    def _named(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in its layout."""
        ending = re.compile(rf"(\.lora_\w+)\.{re.escape(adapter)}(?=\.|$)")
        return {
            ending.sub(r"\1", name): parameter
            for name, parameter in self.model.named_parameters()
            if ending.search(name)
        }

    def _point(self, adapter: str, layout: Layout, flat: torch.Tensor) -> None:
        for name, view in layout.views(flat).items():
            self._parameters[adapter][name].data = view

    def _activate(self, adapters: tuple[str, ...], *, always: bool = False) -> None:
        if adapters == self._active and not always:
            return
        self._active = adapters
        self.model.base_model.set_adapter(list(adapters))  # this alone would train all that are active
        for name, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == OWN)


class StageTrainer(Trainer):
    """A trainer that shares its model with other trainers.

    Args:
        under: a frozen adapter (numel,) fp32 under the trained one; what it holds at a step counts.
    """

    def __init__(
        self, *, stage: Stage, flat: torch.Tensor, examples: Sequence[Example], pad_id: int,
        settings: TrainingSettings, seed: int, autocast: torch.dtype, under: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        stage.show(flat)
        super().__init__(
            model=stage.model, flat=flat, examples=examples, pad_id=pad_id, settings=settings, seed=seed,
            device=flat.device, autocast=autocast,
        )  # fmt: skip
        self._stage, self._under = stage, under

    def compute(self) -> Computed:
        """Put the adapter on the model, then compute the gradient of the next step."""
        self._stage.show(self.flat, grad=self._grad, under=self._under)
        return super().compute()
