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
from ops.bench.processes import BenchError
from producers.trainer import Computed, Trainer

OWN, PARTNER = "default", "partner"  # the trained adapter, and one that is trained by the same pass


def linears_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen linear layers of a model, with or without adapters, in the dtype in which autocast computes.

    Autocast would convert their fp32 weights to it at every pass, to the same bits.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)


class Stage:
    """A model whose adapters are views of whatever flat vectors are shown on it."""

    def __init__(self, model: PreTrainedModel, spec: Spec) -> None:
        self.model, self._first = attach_adapter(model, spec)
        self.spec = spec
        self._active: tuple[str, ...] = (OWN,)
        self._parameters = {OWN: self._named(OWN)}

    def show(
        self,
        flat: torch.Tensor,
        *,
        grad: torch.Tensor | None = None,
        partner: tuple[torch.Tensor, torch.Tensor] | None = None,
        frozen: Sequence[torch.Tensor] = (),
    ) -> None:
        """Make the model's adapter a view of `flat` (numel,) fp32, with its gradients in `grad`.

        `partner` are values and gradient (numel,) of a second adapter that is active and trained, `frozen` the values
        of more adapters, which are active and not trained. The model computes with the sum of all.
        """
        self._point(OWN, self.spec.layout, flat)
        if grad is not None:
            self._grade(OWN, grad)
        active = [OWN]
        if partner is not None:
            self._add(PARTNER, self.spec.lora.rank)
            self._point(PARTNER, self.spec.layout, partner[0])
            self._grade(PARTNER, partner[1])
            active.append(PARTNER)
        for number, values in enumerate(frozen):
            name = f"frozen{number}"
            self._add(name, self.spec.lora.rank)
            self._point(name, self.spec.layout, values)
            active.append(name)
        self._activate(tuple(active))

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

    def _grade(self, adapter: str, grad: torch.Tensor) -> None:
        for name, view in self.spec.layout.views(grad).items():
            self._parameters[adapter][name].grad = view

    def _activate(self, adapters: tuple[str, ...], *, always: bool = False) -> None:
        if adapters == self._active and not always:
            return
        self._active = adapters
        self.model.base_model.set_adapter(list(adapters))  # this alone would train all that are active
        for name, parameters in self._parameters.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == OWN or (name == PARTNER and name in adapters))


class StageTrainer(Trainer):
    """A trainer that shares its model with other trainers.

    `frozen` are adapters (numel,) fp32 that are active beside the trained one; what they hold at a step counts.

    Args:
        leader: a trainer on the same rows whose passes compute the gradient of this one's adapter too, with both
            adapters active. Each of its steps is followed by one of this trainer.
    """

    def __init__(
        self, *, stage: Stage, flat: torch.Tensor, examples: Sequence[Example], pad_id: int,
        settings: TrainingSettings, seed: int, autocast: torch.dtype, leader: "StageTrainer | None" = None,
    ) -> None:  # fmt: skip
        stage.show(flat)
        super().__init__(
            model=stage.model, flat=flat, examples=examples, pad_id=pad_id, settings=settings, seed=seed,
            device=flat.device, autocast=autocast,
        )  # fmt: skip
        self.frozen: Sequence[torch.Tensor] = ()
        self._stage, self._leader = stage, leader
        self._partner: StageTrainer | None = None
        self._computed: Computed | None = None  # by this trainer, and not yet taken by its partner
        if leader is not None:
            leader._partner = self

    def compute(self) -> Computed:
        """Put the adapter on the model, and compute the gradient of the next step; or take the leader's."""
        if self._leader is not None:
            computed, self._leader._computed = self._leader._computed, None
            if computed is None:
                raise BenchError("a trainer took a step before the one whose passes it shares")
            return computed
        other = self._partner
        if other is not None:
            other._grad.zero_()
        self._stage.show(
            self.flat,
            grad=self._grad,
            partner=(other.flat, other._grad) if other is not None else None,
            frozen=self.frozen,
        )
        self._computed = super().compute()
        return self._computed
