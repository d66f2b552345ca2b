"""The reach of an adapter: the parts of a base model that it may cover, and their share of the weights."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from fedmoe.protocol.layout import Layout

NAMED_FROM = 0.01  # smallest share of the weights that is named; norms and biases are smaller
MAX_NAMED = 6
_LAYER = re.compile(r"^.*?\.\d+\.|\.\d+(?=\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """The reach of an adapter.

    Args:
        share: covered share of the base model's weights without embeddings, 0 to 1.
        not_reached: the largest parts that are not covered, each with its share, for people; "" for none.
    """

    share: float
    not_reached: str


def other_towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the parts with linear modules outside the text model, for images or sound; () for a text model."""
    decoder = next((name for name, module in model.named_modules() if module is model.get_decoder()), "")
    output = model.get_output_embeddings()
    beside = []
    for depth in range(decoder.count(".") + 1 if decoder else 0):
        path = decoder.split(".")[: depth + 1]
        parent = model.get_submodule(".".join(path[:-1]))
        for name, child in parent.named_children():
            if name != path[-1] and child is not output and _has_linear(child):
                beside.append(".".join([*path[:-1], name]))
    return tuple(sorted(beside))


def _has_linear(module: nn.Module) -> bool:
    return any(isinstance(inner, nn.Linear) for inner in module.modules())


def reach_of(model: PreTrainedModel, layout: Layout, towers: Sequence[str]) -> Reach:
    """The reach of an adapter with this layout on `model`, which has no adapter."""
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name, _ in layout.tensors}
    output = model.get_output_embeddings()
    embeddings = [
        module for module in model.modules() if isinstance(module, nn.Embedding) or module is output
    ]
    apart = {id(parameter) for module in embeddings for parameter in module.parameters()}
    reached = 0
    others: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if id(parameter) in apart:
            continue
        tower = next((tower for tower in towers if name.startswith(f"{tower}.")), "")
        if name.rpartition(".")[0] in modules:
            reached += parameter.numel()
        else:
            others[tower or _LAYER.sub("", name)] += parameter.numel()
    total = max(1, reached + others.total())
    named = [
        f"{name} ({size / total:.0%})"
        for name, size in others.most_common(MAX_NAMED)
        if size / total >= NAMED_FROM
    ]
    return Reach(share=reached / total, not_reached=", ".join(named))
