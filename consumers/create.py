"""Create the experts that do not exist yet, all of one base model and one LoRA initialisation.

What needs transformers and peft (the layout from the base model's config, its fingerprint) runs in a process of its
own, so that the daemon's memory stays that of its experts.
"""

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedmoe.errors import (
    BaseModelError,
    DamagedExpertError,
    FedMoEError,
    LostExpertError,
    RemovedExpertError,
    SettingsError,
    SpecError,
    StoppedError,
)
from fedmoe.protocol import records
from fedmoe.protocol.features import features_text
from fedmoe.protocol.identity import BaseIdentity
from fedmoe.protocol.layout import AdapterBuffer, Layout
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.names import check_expert
from fedmoe.protocol.records import Meta, reach_text
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import DEFAULT_BASE_MODEL, DEFAULT_WIRE_FORMAT, LoraSettings, Spec
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.lifecycle import new_id
from fedmoe.util.software import software
from fedmoe.util.template_file import template_digest

logger = logging.getLogger(__name__)

DEFAULT_EXPERTS = ("python_expert", "sql_expert", "docs_expert")
# In which every worker writes a heartbeat, also to a Redis that has just been emptied; they do every 5 s.
HEARD_WITHIN_S = 6.5
STOPPED = "stopped before it served any expert: nothing is lost"
NORM_BOUND = 10.0  # an update may be this many times as long as the initial adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecRequest:
    """What the operator asks new experts to be.

    `explicit` names the settings that the operator typed. If an expert that exists differs in one of them, that is an
    error (of what it is), or said (of its rules); a mere default never is. A max_norm that was not typed is ten times
    the norm of the initial adapter. `weighted` names the experts whose gateway weight was typed. With `new_lineage` an
    expert is created from zero although workers still train an earlier one of its name.
    """

    base_model: str = DEFAULT_BASE_MODEL
    lora: LoraSettings = field(default_factory=LoraSettings)
    rules: RuleSet = field(default_factory=RuleSet)
    wire_format: str = DEFAULT_WIRE_FORMAT
    seed: int = 0
    chat_template: str = ""
    explicit: frozenset[str] = frozenset()
    weighted: frozenset[str] = frozenset()
    new_lineage: bool = False


# What this process has found out about base models. Reading their weights takes long, and a creation is tried again
# while Redis is away or full. Failures are not kept: the base model may have been put right meanwhile.
_described: dict[SpecRequest, dict[str, Any]] = {}


def ensure_experts(
    connection: Connection,
    weights: Mapping[str, float],
    request: SpecRequest,
    *,
    stop: threading.Event | None = None,
) -> list[str]:
    """Create the experts of `weights` (name -> gateway weight) that do not exist yet; returns the new ones' names.

    One that workers train already, or that was found to be gone before, is not created: Redis was emptied. It is
    marked as lost, until somebody writes it back or asks for `new_lineage`.

    Raises:
        SpecError: if an expert is another one than explicitly asked for, or the federation's experts have another
            base model.
        BaseModelError: if the base model's config cannot be read.
        StoppedError: if `stop` is set meanwhile.
    """
    stop = stop or threading.Event()
    looked_at = time.monotonic()
    for name in weights:
        check_expert(name)
    stores = {name: ExpertStore(connection, name) for name in weights}
    missing = []
    for name, store in stores.items():
        if not store.exists():
            missing.append(name)
            continue
        try:
            store.check_protocol()
            check_identity(name, store.spec(), request)
            if meta := store.condition().meta:
                compare_rules(name, meta.rules, request)
            store.register(weights[name], overwrite=name in request.weighted)
        except DamagedExpertError as error:  # an aggregator may repair it; the others are served meanwhile
            logger.warning("%s", error)
        except RemovedExpertError:  # its ExpertServer reports it
            if request.new_lineage:
                missing.append(name)
    if not request.new_lineage:
        missing = [name for name in missing if not _was_lost(stores[name], stores[name].lost())]
    if not missing:
        return []
    described = _described.get(request) or _look_at_base(request, stop)
    spec = make_spec(request, described)
    rules = make_rules(request, spec)
    _check_federation(GatewayStore(connection), spec)
    buffer = AdapterBuffer(spec.layout)
    buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
    created = []
    if not request.new_lineage:
        stop.wait(max(0.0, looked_at + HEARD_WITHIN_S - time.monotonic()))
    known = {} if request.new_lineage else {name: stores[name].lineages() for name in missing}
    anybody = next((workers for workers in known.values() if workers), {})
    for name in missing:
        if stop.is_set():
            raise StoppedError(STOPPED)
        store = stores[name]
        if _was_lost(store, known.get(name) or anybody):  # an emptied Redis has lost all of them
            continue
        if not store.create(
            spec, _first_meta(spec, rules, described), buffer.file,
            gateway_weight=weights[name], though_removed=request.new_lineage,
        ):  # fmt: skip
            if not store.exists():
                raise SpecError(
                    f"expert {name!r} is in Redis only in part: restore a backup (fedmoe restore --replace), or remove "
                    f"the rest (fedmoe expert remove {name}) and create it from zero (fedmoe expert add {name})"
                )
            store.register(weights[name])  # somebody else was first
        else:
            created.append(name)
            logger.info(
                "created %s: %s, rank %d, %.1f MiB", name, spec.base_model, spec.lora.rank,
                spec.layout.file_bytes / 2**20,
            )  # fmt: skip
    return created


def _was_lost(store: ExpertStore, known: Mapping[str, str]) -> bool:
    """True, and marked and said, if `known` (worker -> lineage) tells that this expert was there before."""
    if not known:
        return False
    store.mark_lost(known)
    worker, lineage = next(iter(known.items()))
    logger.warning("%s", LostExpertError(store.name, f", but worker {worker} trains on (lineage {lineage})"))
    return True


def _look_at_base(request: SpecRequest, stop: threading.Event) -> dict[str, Any]:
    """Describe the base model, tell what an operator should know of it, and remember the description."""
    described = describe(request, stop)
    _tell(request, described)
    _described[request] = described
    return described


def _tell(request: SpecRequest, described: Mapping[str, Any]) -> None:
    """Say what an operator may not expect of this base model."""
    if described["template_missing"]:
        logger.warning(
            "the base model %s has no chat template: start the first worker with --chat-template FILE",
            request.base_model,
        )
    if described["towers"]:
        logger.info(
            "the parts %s of the base model get no adapter, because text does not pass through them: nothing to do",
            ", ".join(described["towers"]),
        )
    logger.info(
        "the adapter on %s covers %s",
        request.base_model,
        reach_text(described["reach"], described["not_reached"]),
    )


def make_spec(request: SpecRequest, described: Mapping[str, Any]) -> Spec:
    """The spec that a request leads to, with a base model that `describe` has looked at."""
    return Spec(  # refuses an adapter that is too large, before memory is taken for it
        base_model=request.base_model,
        base_config=described["base_config"],
        layout=Layout(tuple((name, tuple(shape)) for name, shape in described["layout"])),
        lora=request.lora,
        wire_format=request.wire_format,
        init_seed=request.seed,
        chat_template=request.chat_template,
        towers=tuple(described["towers"]),
    )


def make_rules(request: SpecRequest, spec: Spec) -> RuleSet:
    """The first rule set that a request leads to."""
    rules = replace(request.rules, number=1)
    if "max_norm" in request.explicit:
        return rules
    norm = float(torch.linalg.vector_norm(initial_weights(spec.layout, spec.init_seed)))
    return replace(rules, aggregation=replace(rules.aggregation, max_norm=round(NORM_BOUND * norm, 3)))


def describe(request: SpecRequest, stop: threading.Event) -> dict[str, Any]:
    """Ask a process of its own for the adapter's layout and the base model's fingerprint.

    If the weights are here but too large for this machine, that process is killed; then the config has to do, and the
    first worker that joins pins the fingerprint.
    """
    logger.info("looking at the base model %s", request.base_model)
    process = ask_process(_question(request, read_weights=True), stop)
    if process.returncode == -signal.SIGKILL:
        logger.warning(
            "the weights of %s do not fit into memory here; going on by its config", request.base_model
        )
        process = ask_process(_question(request, read_weights=False), stop)
    try:
        answer = json.loads(process.stdout.strip().rpartition("\n")[2])
    except ValueError as error:
        raise BaseModelError(
            f"could not look at the base model {request.base_model!r}: {process.stderr.strip()[-800:]}"
        ) from error
    if "error" in answer:
        raise (SettingsError if answer["of_settings"] else BaseModelError)(answer["error"])
    return dict(answer)


def _question(request: SpecRequest, *, read_weights: bool) -> dict[str, Any]:
    return {
        "base_model": request.base_model,
        "rank": request.lora.rank,
        "alpha": request.lora.alpha,
        "targets": list(request.lora.targets),
        "chat_template": request.chat_template,
        "max_length": request.rules.training.max_length,
        "read_weights": read_weights,
    }


def ask_process(question: Mapping[str, Any], stop: threading.Event) -> "subprocess.CompletedProcess[str]":
    """Put a question to `fedmoe.model.describe`, in a process of its own; StoppedError once `stop` is set."""
    with subprocess.Popen(
        [sys.executable, "-m", "fedmoe.model.describe"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for the daemon, which ends this one
    ) as process:
        text: str | None = json.dumps(question)
        while True:
            try:
                out, err = process.communicate(text, timeout=0.1)
                return subprocess.CompletedProcess(process.args, process.returncode, out, err)
            except subprocess.TimeoutExpired:
                text = None  # communicate goes on with what it was given first
            if stop.is_set():
                process.kill()
                raise StoppedError(STOPPED)


def first_meta(spec: Spec, rules: RuleSet, *, reach: float, not_reached: str) -> Meta:
    """Meta of a new expert: version 0, and nothing of the base model pinned."""
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


def _first_meta(spec: Spec, rules: RuleSet, described: Mapping[str, Any]) -> Meta:
    meta = first_meta(spec, rules, reach=described["reach"], not_reached=described["not_reached"])
    identity = BaseIdentity(fingerprint=described["fingerprint"], tokenizer=described["tokenizer"])
    return identity.pin(meta, "aggregator")


def check_identity(name: str, spec: Spec, request: SpecRequest) -> None:
    """Raise SpecError if the existing expert is not what an explicit setting of the request says."""
    for key, (wanted, has) in _identity(request, spec).items():
        if key in request.explicit and wanted != has:
            raise SpecError(
                f"expert {name!r} exists with {key} {has!r}, not {wanted!r}: what an expert is never changes, so start "
                "without this option, or choose another expert name or --prefix"
            )


def compare_rules(name: str, rules: RuleSet, request: SpecRequest) -> None:
    """Say which explicit settings of the request are not the rules in force; those stay, an operator chose them."""
    asked, present = request.rules.settings(), rules.settings()
    odd = [name for name in present if name in request.explicit and asked[name] != present[name]]
    if odd:
        logger.warning(
            "%s: rules %d are in force, and stay so: %s; to have what is asked for here: fedmoe expert set %s %s",
            name, rules.number, ", ".join(f"{one} {present[one]}" for one in odd),
            name, " ".join(f"--{one.replace('_', '-')} {asked[one]}" for one in odd),
        )  # fmt: skip


def _identity(request: SpecRequest, spec: Spec) -> dict[str, tuple[object, object]]:
    return {
        "base_model": (request.base_model, spec.base_model),
        "rank": (request.lora.rank, spec.lora.rank),
        "alpha": (request.lora.alpha, spec.lora.alpha),
        "targets": (request.lora.targets, spec.lora.targets),
        "wire_format": (request.wire_format, spec.wire_format),
        "seed": (request.seed, spec.init_seed),
        "chat_template": (template_digest(request.chat_template), template_digest(spec.chat_template)),
    }


def _check_federation(gateway: GatewayStore, spec: Spec) -> None:
    """All experts of a federation share base model and initialisation, else there is no gateway."""
    for name in gateway.experts():
        try:
            other = gateway.spec(name)
        except FedMoEError:
            continue
        for what, new, old in (
            ("base model", spec.base_config, other.base_config),
            ("LoRA settings", spec.lora, other.lora),
            ("seed", spec.init_seed, other.init_seed),
            ("chat template", template_digest(spec.chat_template), template_digest(other.chat_template)),
        ):
            if new != old:
                raise SpecError(
                    f"the new experts would have another {what} ({new}) than expert {name!r} ({old}): experts of "
                    "different bases have no common gateway, use another --prefix"
                )


def parse_experts(texts: Sequence[str]) -> dict[str, float]:
    """`sql_expert` or `sql_expert=2` (its gateway weight) -> {name: weight}."""
    weights = {}
    for text in texts or DEFAULT_EXPERTS:
        name, _, weight = text.partition("=")
        try:
            weights[check_expert(name)] = float(weight or 1)
        except ValueError as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"the gateway weight in {text!r} is not a number") from error
        if not 0 <= weights[name] < float("inf"):
            raise SettingsError(f"the gateway weight in {text!r} must be at least 0")
    return weights
