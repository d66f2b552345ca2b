"""The base model of a federation, loaded and checked as a worker does."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedmoe.data.examples import padding_id
from fedmoe.data.template import end_ids
from fedmoe.errors import BaseModelError
from fedmoe.model.base import (
    check_structure,
    choose_device,
    choose_precision,
    fingerprint,
    load_base,
    load_config,
)
from fedmoe.model.bounds import check_padding
from fedmoe.model.tokenizer import load_tokenizer, tokenizer_fingerprint
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.settings import FitSettings, HeldOutSettings
from fedmoe.tools.rows import with_template


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A base model on its device; it computes in `autocast`."""

    name: str
    model: PreTrainedModel
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    device: torch.device
    autocast: torch.dtype

    def is_of(self, spec: Spec, meta: Meta) -> bool:
        """True if this is the base model of the expert, as far as is known."""
        try:
            check_structure(self.config, spec.base_config)
        except BaseModelError:
            return False
        return meta.base_fingerprint in ("", self.fingerprint)

    @property
    def pad_id(self) -> int:
        """The token that fills up a batch."""
        return padding_id(self.tokenizer)

    def end_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer: the base model's own, and those of the tokenizer's chat template."""
        own = self.model.generation_config.eos_token_id
        return sorted(
            {*(own if isinstance(own, list) else [] if own is None else [own]), *end_ids(tokenizer)}
        )


def base_model_of(specs: Mapping[str, Spec], weights: Mapping[str, float]) -> str:
    """The base model of most of these experts that have a gateway weight; if none has one, of most of them."""
    counted = Counter(spec.base_model for name, spec in specs.items() if weights.get(name))
    return (counted or Counter(spec.base_model for spec in specs.values())).most_common(1)[0][0]


def load(
    settings: HeldOutSettings | FitSettings,
    specs: Mapping[str, Spec],
    metas: Mapping[str, Meta],
    templates: Mapping[str, str],
    report: Callable[[str], None],
    *,
    dtype: torch.dtype | str | None = None,
) -> Base:
    """Load the base model of the experts; `dtype` as in `load_base`, None is a worker's.

    Raises:
        BaseModelError: if an expert is trained on another base model, or with another tokenizer or template.
    """
    return load_for_some(settings, specs, metas, templates, report, needed=specs, dtype=dtype)[0]


def load_for_some(
    settings: HeldOutSettings | FitSettings,
    specs: Mapping[str, Spec],
    metas: Mapping[str, Meta],
    templates: Mapping[str, str],
    report: Callable[[str], None],
    *,
    needed: Collection[str] = (),
    dtype: torch.dtype | str | None = None,
) -> tuple[Base, list[str]]:
    """Load the base model as `load` does; experts of another base model are left out, but none of those `needed`.

    Returns:
        The base model, and the names of the experts that are left out.

    Raises:
        BaseModelError: as `load`, of an expert that is needed, or if no expert is of this base model.
    """
    name = settings.base_model or specs[next(iter(needed or specs))].base_model
    config = load_config(name)
    odd: dict[str, BaseModelError] = {}
    for expert, spec in specs.items():
        try:
            check_structure(config, spec.base_config)
        except BaseModelError as error:
            odd[expert] = error
    _check_some(odd, specs, needed)
    device = choose_device(settings.device)
    autocast = choose_precision(settings.precision, device)
    report(f"loading {name} on {device}")
    tokenizer = load_tokenizer(name)
    if dtype is None:
        dtype = autocast if device.type != "cpu" else torch.float32
    model = load_base(name, device=device, dtype=dtype)
    base = Base(
        name=name,
        model=model,
        config=config,
        tokenizer=tokenizer,
        fingerprint=fingerprint(model),
        device=device,
        autocast=autocast,
    )
    alike = [expert for expert in metas if expert not in odd]
    for expert in alike:
        try:
            check_base_of(base, expert, specs[expert], metas[expert], templates[expert])
        except BaseModelError as error:
            if base.is_of(specs[expert], metas[expert]):  # but with another tokenizer
                raise
            odd[expert] = error
    # One that no worker has joined fits every base model of its shape, so it does not say that this one is right.
    known = [expert for expert in alike if metas[expert].base_fingerprint]
    _check_some(odd, known or specs, needed)
    check_padding(tokenizer, config, name)
    return base, list(odd)


def check_base_of(base: Base, name: str, spec: Spec, meta: Meta, template: str) -> None:
    """Raise BaseModelError unless this expert is trained on this base model, with its tokenizer and template."""
    check_structure(base.config, spec.base_config)
    tokenizer = tokenizer_fingerprint(with_template(base.tokenizer, template))
    here = BaseIdentity(fingerprint=base.fingerprint, tokenizer=tokenizer)
    if refusal := here.refusal(meta, name):
        raise BaseModelError(refusal, about=here.differing(meta)[0])


def _check_some(odd: Mapping[str, BaseModelError], experts: Collection[str], needed: Collection[str]) -> None:
    """Raise the error of the first expert that is needed, or of the first of these experts if all of them have one."""
    first = [name for name in needed if name in odd] or (list(experts) if odd.keys() >= set(experts) else [])
    if first:
        raise odd[first[0]]
