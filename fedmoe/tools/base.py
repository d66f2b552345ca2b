"""The base model of a federation, loaded and checked as a worker does."""

from collections.abc import Callable, Mapping
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
    name = settings.base_model or next(iter(specs.values())).base_model
    config = load_config(name)
    for spec in specs.values():
        check_structure(config, spec.base_config)
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
    for expert, meta in metas.items():
        theirs = tokenizer_fingerprint(with_template(tokenizer, templates[expert]))
        here = BaseIdentity(fingerprint=base.fingerprint, tokenizer=theirs)
        if refusal := here.refusal(meta, expert):
            raise BaseModelError(refusal, about=here.differing(meta)[0])
    check_padding(tokenizer, config, name)
    return base
