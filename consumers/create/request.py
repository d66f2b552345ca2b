"""An operator's request for experts, and how an existing expert differs from it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedmoe.errors import SettingsError, SpecError
from fedmoe.protocol.lora import DEFAULT_BASE_MODEL, DEFAULT_WIRE_FORMAT, LoraSettings
from fedmoe.protocol.names import check_domain
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.util.template_file import template_digest

logger = logging.getLogger(__name__)

DEFAULT_EXPERTS = ("python_expert", "sql_expert", "docs_expert")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecRequest:
    """The operator's request for new experts.

    `explicit` names the settings that the operator typed. If an existing expert differs in one of them, that is an
    error (spec) or a warning (rules); differences from defaults are ignored. Unless max_norm was typed, it is ten times
    the norm of the initial adapter. `weighted` names the experts whose gateway weight was typed. With `new_lineage` an
    expert is created from zero although workers still train an earlier lineage.
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


def parse_experts(texts: Sequence[str]) -> dict[str, float]:
    """Parse `sql_expert` or `sql_expert=2` (its gateway weight) into {name: weight}."""
    weights = {}
    for text in texts or DEFAULT_EXPERTS:
        name, _, weight = text.partition("=")
        try:
            weights[check_domain(name)] = float(weight or 1)
        except ValueError as error:
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(
                f"the gateway weight in {text!r} is not a number", about="gateway_weight"
            ) from error
        if not 0 <= weights[name] < float("inf"):
            raise SettingsError(f"the gateway weight in {text!r} must be at least 0", about="gateway_weight")
    return weights


def check_identity(name: str, spec: Spec, request: SpecRequest) -> None:
    """Raise SpecError if the existing expert's spec differs from an explicit setting of the request."""
    for key, (wanted, has) in _identity(request, spec).items():
        if key in request.explicit and wanted != has:
            raise SpecError(
                f"expert {name!r} exists with {key} {has!r}, not {wanted!r}: an expert's spec never changes, so start "
                "without this option, or choose another expert name or --prefix",
                about=key,
            )


def compare_rules(name: str, rules: RuleSet, request: SpecRequest) -> None:
    """Warn of explicit settings that differ from the rules in force, which stay because an operator chose them."""
    asked, present = request.rules.settings(), rules.settings()
    odd = [name for name in present if name in request.explicit and asked[name] != present[name]]
    if odd:
        logger.warning(
            "%s: rules %d stay in force: %s; to change them as requested here: fedmoe expert set %s %s",
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
