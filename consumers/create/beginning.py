"""An expert at version 0: its spec, its first rules, its meta."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from consumers.create.request import SpecRequest
from fedmoe.protocol import records
from fedmoe.protocol.features import PARTS, features_text
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.weights_parts import MAX_STRING_BYTES
from fedmoe.store.lifecycle import new_id
from fedmoe.util.software import software

NORM_BOUND = 10.0  # default max_norm, as a multiple of the initial adapter's L2 norm


def make_spec(request: SpecRequest, described: Mapping[str, Any]) -> Spec:
    """The spec for a request, with the facts about the base model that `look_at_base` found."""
    layout = Layout(tuple((name, tuple(shape)) for name, shape in described["layout"]))
    return Spec(  # refuses a too large adapter before memory is allocated for it
        base_model=request.base_model,
        base_config=described["base_config"],
        layout=layout,
        lora=request.lora,
        wire_format=request.wire_format,
        init_seed=request.seed,
        chat_template=request.chat_template,
        towers=tuple(described["towers"]),
        requires=PARTS if layout.file_bytes > MAX_STRING_BYTES else "",
    )


def make_rules(request: SpecRequest, spec: Spec) -> RuleSet:
    """The first rule set for a request."""
    rules = replace(request.rules, number=1)
    if "max_norm" in request.explicit:
        return rules
    norm = float(torch.linalg.vector_norm(initial_weights(spec.layout, spec.init_seed)))
    return replace(rules, aggregation=replace(rules.aggregation, max_norm=round(NORM_BOUND * norm, 3)))


def first_meta(spec: Spec, rules: RuleSet, *, reach: float, not_reached: str) -> Meta:
    """Meta of a new expert: version 0, no component of the base model pinned."""
    commit, now = new_id(), time.time()
    return Meta(
        lineage=new_id(),
        commit=commit,
        weights_commit=commit,
        spec=spec.digest,
        rules=rules,
        base_model=spec.base_model,
        reach=reach,
        not_reached=not_reached,
        protocol=records.PROTOCOL,
        software=software(),
        knows=features_text(),
        created_at=now,
        updated_at=now,
    )


def pinned_meta(spec: Spec, rules: RuleSet, described: Mapping[str, Any]) -> Meta:
    """Like `first_meta`, with the components that `look_at_base` found pinned."""
    meta = first_meta(spec, rules, reach=described["reach"], not_reached=described["not_reached"])
    identity = BaseIdentity(fingerprint=described["fingerprint"], tokenizer=described["tokenizer"])
    return identity.pin(meta, "aggregator")
