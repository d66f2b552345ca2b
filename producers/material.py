"""Prepares what a worker trains on: base model, tokenizer, chat template, and the examples of its rows."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from fedmoe.data.bad_rows import BadRows
from fedmoe.data.cache import RowCache
from fedmoe.data.examples import make_examples, padding_id
from fedmoe.data.jsonl import DataFile
from fedmoe.data.validation_split import split
from fedmoe.errors import BaseModelError
from fedmoe.model.adapter import attach_adapter, switch_to
from fedmoe.model.base import (
    check_structure,
    choose_device,
    choose_precision,
    fingerprint,
    load_base,
    load_config,
)
from fedmoe.model.bounds import check_examples, check_padding
from fedmoe.model.hidden import prompt_states
from fedmoe.model.tokenizer import load_tokenizer, tokenizer_fingerprint, use_template
from fedmoe.protocol.identity import BaseIdentity, expert_template
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import TrainingSettings
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.vectors import DomainVector
from fedmoe.settings import WorkerSettings
from fedmoe.util.template_file import read_template
from producers.trainer import Trainer
from producers.validation import Evaluator
from producers.vector import domain_vector


@dataclass(frozen=True, slots=True)
class Material:
    """The identity of the base model, the number of examples and their digest, and how to make trainers.

    `make_trainer` takes the spec and the training settings of the expert to train. It is called after the worker has
    joined, once for each expert; all of its trainers share the base model, which thereby has an adapter of
    each expert. The examples were truncated to `max_length` tokens. `n_examples` and `data` are of those trained on.
    `make_evaluator` makes what measures the loss of an expert on the rows that are held back; None if none are.
    `vector` is what this worker tells of its domain.
    """

    identity: BaseIdentity
    n_examples: int
    data: str
    max_length: int
    make_trainer: Callable[[Spec, TrainingSettings], Any]
    make_evaluator: Callable[[Spec, TrainingSettings], Evaluator | None] = lambda spec, training: None
    vector: DomainVector | None = None


def prepare(
    settings: WorkerSettings,
    spec: Spec,
    meta: Meta,
    data: DataFile,
    bad_rows: BadRows,
    *,
    max_length: int,
    cache: Path | None,
    stopped: Callable[[], bool],
    report: Callable[[str], None],
) -> Material:
    """Load the base model, its weights last, and encode the rows as examples of at most `max_length` tokens.

    `cache` is a directory that keeps the examples.

    Raises:
        FedMoEError: if the base model is not the expert's, or no row can be trained on.
        StoppedError: if `stopped` says so while the rows are tokenized.
    """
    base_model = settings.base_model or spec.base_model
    config = load_config(base_model)
    check_structure(config, spec.base_config)
    own = read_template(settings.chat_template) if settings.chat_template else ""
    tokenizer = load_tokenizer(base_model)
    use_template(
        tokenizer, expert=settings.stream, expert_template=expert_template(spec, meta), own=own, base_model=base_model
    )  # fmt: skip
    identity = BaseIdentity(fingerprint=meta.base_fingerprint, tokenizer=tokenizer_fingerprint(tokenizer))
    if refusal := identity.refusal(meta, settings.stream):
        raise BaseModelError(refusal, about=identity.differing(meta)[0])
    check_padding(tokenizer, config, base_model)
    device = choose_device(settings.device)
    autocast = choose_precision(settings.precision, device)
    report(f"loading {base_model} on {device} ({str(autocast).removeprefix('torch.')})")
    model = load_base(base_model, device=device, dtype=autocast if device.type != "cpu" else torch.float32)
    make = RowCache(cache, report=report).examples if cache else partial(make_examples, report=report)
    examples = make(data, tokenizer, max_length, bad_rows, learn=settings.learn, stopped=stopped)
    report(f"{settings.data}: {examples.summary()}")
    check_examples(examples.examples, settings.data, tokenizer, config)
    parts = split(examples.examples, settings.hold_back, where=str(settings.data))
    report(f"{settings.data}: {parts}")
    data_digest = examples.digest() if not parts.rows else f"{examples.digest()} without {parts.digest}"

    base = fingerprint(model)
    vector = domain_vector(
        settings, examples.examples, of=f"{base} {tokenizer_fingerprint(tokenizer)} {examples.digest()}",
        states=partial(
            prompt_states, model, pad_id=padding_id(tokenizer), device=device, autocast=autocast, stopped=stopped
        ),
        report=report,
    )  # fmt: skip
    adapted: list[PeftModel] = []

    def make_trainer(spec: Spec, training: TrainingSettings) -> Trainer:
        # Not named after the expert: peft makes a module of that name, and torch allows few names for modules.
        adapter = f"adapter_{len(adapted)}"
        made, flat = attach_adapter(adapted[0] if adapted else model, spec, adapter)
        adapted.append(made)
        return Trainer(
            model=made,
            flat=flat,
            examples=parts.training,
            pad_id=padding_id(tokenizer),
            settings=training,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            seed=spec.init_seed + _seed_of(settings.worker),
            device=device,
            autocast=autocast,
            activate=switch_to(made, adapter),
        )

    def make_evaluator(spec: Spec, training: TrainingSettings) -> Evaluator | None:
        if not parts.rows:
            return None
        adapter = f"validation_{len(adapted)}"
        made, flat = attach_adapter(adapted[0], spec, adapter, trainable=False)
        return Evaluator(
            model=made,
            flat=flat,
            activate=switch_to(made, adapter),
            examples=parts.validation,
            rows=parts.rows,
            rows_set=parts.digest,
            batch_size=settings.batch_size or training.batch_size,
            pad_id=padding_id(tokenizer),
            device=device,
            autocast=autocast,
        )

    # A template in the spec comes from the operator; without one this worker may contribute its own.
    brought = "" if spec.chat_template else own
    identity = replace(identity, fingerprint=base, chat_template=brought)
    return Material(
        identity,
        len(parts.training),
        data_digest,
        max_length,
        make_trainer,
        make_evaluator=make_evaluator,
        vector=vector,
    )


def _seed_of(name: str) -> int:
    """A seed from the worker's name, so that two workers with the same rows see them in different orders."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
