"""The spec: all that the parties of one expert must agree on, written once when the expert is created.

A worker needs only a stream name, its data and a Redis URL, because everything else stands here.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from fedmoe.codec import FORMATS
from fedmoe.errors import FedMoEError, ProtocolError, SettingsError, SpecError
from fedmoe.features import check_requires
from fedmoe.layout import MAX_STRING_BYTES, Layout
from fedmoe.staleness import Decay
from fedmoe.template_file import MAX_TEMPLATE_CHARS

SPEC_FORMAT = 2  # 2: its rules are called aggregation
DEFAULT_WIRE_FORMAT = "int4"
DEFAULT_BASE_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
ALL_LINEAR = "all-linear"
LEAST_STALENESS_BOUND = 256
STALENESS_PER_WORKER = 4


def beneath(towers: Sequence[str]) -> str:
    """PEFT's `exclude_modules` for all modules in these parts of a model."""
    return f"({'|'.join(map(re.escape, towers))})\\..*"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(message)


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(
            isinstance(value, int | float) and math.isfinite(value) and value > 0,
            f"{name} must be a number above 0, not {value!r}",
        )


def _require_whole(owner: object, *names: str, minimum: int = 1) -> None:
    for name in names:
        value = getattr(owner, name)
        _require(
            isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
            f"{name} must be a whole number of at least {minimum}, not {value!r}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter: ΔW = (alpha / rank) · B A. Source: LoRA, arXiv 2106.09685."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (ALL_LINEAR,)

    def __post_init__(self) -> None:
        _require_whole(self, "rank")
        _require_positive(self, "alpha")
        _require(self.rank <= 4096, f"rank must be at most 4096, not {self.rank!r}")
        _require(len(self.targets) > 0, "targets must name at least one module, for example q_proj")

    @property
    def scaling(self) -> float:
        """The factor in front of B A."""
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationRules:
    """How updates become part of the expert: `weights += lr × decay(staleness) × Δ`, and what is refused.

    Args:
        lr: the aggregator's step; 1 makes one lone worker's model the expert.
        decay: the staleness decay.
        max_staleness: an update staler than this (in updates) is refused; None: see `staleness_bound`.
        max_norm: an update whose Euclidean norm (all tensors together) is above this is refused.
    """

    lr: float = 1.0
    decay: Decay = field(default_factory=Decay)
    max_staleness: int | None = None
    max_norm: float = 1000.0

    def __post_init__(self) -> None:
        _require_positive(self, "lr", "max_norm")
        if self.max_staleness is not None:
            _require_whole(self, "max_staleness", minimum=0)

    def staleness_bound(self, workers: int) -> int:
        """The largest staleness (in updates) that is not refused, if so many workers ever had an update decided.

        Workers in step are as stale as there are others, twice as stale if each has just missed a pull; so unless the
        operator chose a bound, it grows with them.
        """
        if self.max_staleness is not None:
            return self.max_staleness
        return max(LEAST_STALENESS_BOUND, STALENESS_PER_WORKER * workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How every worker of the expert fine-tunes. Tokens, rows and steps; learning_rate is AdamW's."""

    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    batch_size: int = 4
    accumulate: int = 1
    max_length: int = 512
    warmup_steps: int = 10
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "learning_rate", "clip_norm")
        _require(self.weight_decay >= 0, f"weight_decay must be at least 0, not {self.weight_decay!r}")
        _require_whole(self, "batch_size", "accumulate")
        _require_whole(self, "warmup_steps", minimum=0)
        _require_whole(self, "max_length", minimum=8)


_SECTIONS: dict[str, type] = {
    "lora": LoraSettings,
    "aggregation": AggregationRules,
    "training": TrainingSettings,
}


def _take_unknown(record: type, content: dict[str, Any]) -> dict[str, Any]:
    """Take out of a JSON object, and return, what a later FedMoE wrote."""
    known = {one.name for one in fields(record)} - {"unknown"}
    return {name: content.pop(name) for name in sorted(content.keys() - known)}


def _merge(content: dict[str, Any], more: dict[str, Any]) -> None:
    """Put back what was taken out."""
    for name, value in more.items():
        if name in content:
            _merge(content[name], value)
        else:
            content[name] = value


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Everything the parties of an expert agree on.

    Args:
        base_model: id or directory of the base model, as the operator named it; a worker's may lie elsewhere.
        base_config: the numbers of its config that make it that architecture (see `fedmoe.model.base`).
        layout: the adapter's tensors.
        init_seed: seed of the one LoRA initialisation that all experts of the base share.
        wire_format: how updates are encoded (see `fedmoe.codec`).
        sync_interval_s: a worker publishes this often.
        towers: parts of the base model that no text goes through, and that have no adapter.
        chat_template: that rows are written with (Jinja); "" is the base model's own, else the first worker's.
        requires: the features that whoever trains or serves the expert must know (see `fedmoe.features`).
        unknown: JSON of the fields that a later FedMoE wrote; kept, because the digest covers them.
    """

    base_model: str
    base_config: dict[str, Any]
    layout: Layout
    lora: LoraSettings = field(default_factory=LoraSettings)
    aggregation: AggregationRules = field(default_factory=AggregationRules)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    wire_format: str = DEFAULT_WIRE_FORMAT
    sync_interval_s: float = 10.0
    init_seed: int = 0
    chat_template: str = ""
    towers: tuple[str, ...] = ()
    requires: str = ""
    unknown: str = ""

    def __post_init__(self) -> None:
        _require(
            isinstance(self.base_model, str) and bool(self.base_model),
            "base_model must be a name or a directory",
        )
        _require(
            self.wire_format in FORMATS,
            f"wire format must be one of {', '.join(FORMATS)}, not {self.wire_format!r}",
        )
        _require_positive(self, "sync_interval_s")
        _require_whole(self, "init_seed", minimum=0)
        _require(
            isinstance(self.chat_template, str) and len(self.chat_template) <= MAX_TEMPLATE_CHARS,
            f"chat_template must be text of at most {MAX_TEMPLATE_CHARS} characters",
        )
        _require(
            self.layout.file_bytes <= MAX_STRING_BYTES,
            f"an adapter of {self.layout.file_bytes / 2**20:.0f} MiB does not fit into one Redis string "
            "(512 MiB): choose a smaller rank or fewer targets",
        )

    def to_json(self) -> str:
        """Canonical JSON: the same spec gives the same text on every machine."""
        content = {"spec_format": SPEC_FORMAT} | {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layout", "unknown")
        }
        for name in _SECTIONS:
            content[name] = asdict(content[name])
        for name in ("chat_template", "towers", "requires"):
            if not content[name]:  # else the digest of a spec that an earlier FedMoE wrote would be another
                del content[name]
        content["layout"] = [[name, list(shape)] for name, shape in self.layout.tensors]
        _merge(content, json.loads(self.unknown or "{}"))
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Spec":
        """Parse a stored spec.

        Raises:
            ProtocolError: if it has the format of a later or an earlier FedMoE.
            SpecError: if it is malformed.
        """
        try:
            content = json.loads(text)
            version = content.pop("spec_format")
            if version != SPEC_FORMAT:
                is_later = isinstance(version, int) and version > SPEC_FORMAT
                raise ProtocolError(
                    f"the expert's spec has format {version}, the FedMoE on this machine reads format {SPEC_FORMAT}: "
                    + (
                        "upgrade the FedMoE on this machine"
                        if is_later
                        else "serve the expert with the FedMoE that made it, or remove it (fedmoe expert remove)"
                    )
                )
            check_requires(str(content.get("requires", "")), "the expert")
            unknown = _take_unknown(cls, content)
            for name, section in _SECTIONS.items():
                if odd := _take_unknown(section, content[name]):
                    unknown[name] = odd
            if odd := _take_unknown(Decay, content["aggregation"]["decay"]):
                unknown.setdefault("aggregation", {})["decay"] = odd
            aggregation, lora, training = (content.pop(name) for name in ("aggregation", "lora", "training"))
            towers = tuple(content.pop("towers", ()))
            return cls(
                layout=Layout(tuple((name, tuple(shape)) for name, shape in content.pop("layout"))),
                aggregation=AggregationRules(**aggregation | {"decay": Decay(**aggregation["decay"])}),
                lora=LoraSettings(**lora | {"targets": tuple(lora["targets"])}),
                training=TrainingSettings(**training),
                towers=towers,
                unknown=json.dumps(unknown, sort_keys=True) if unknown else "",
                **content,
            )
        except FedMoEError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise SpecError(f"the stored spec is malformed ({error!r})") from error

    @cached_property
    def digest(self) -> str:
        """Short name of this spec: 16 hex digits of its SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def adapter_config(self, *, rank: int | None = None) -> dict[str, Any]:
        """Content of PEFT's adapter_config.json; with `rank` (the gateway's), at the same scaling."""
        rank = rank or self.lora.rank
        targets = sorted({name.split(".")[-3] for name, _ in self.layout.tensors})
        excluded = {"exclude_modules": beneath(self.towers)} if self.towers else {}
        return excluded | {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "r": rank,
            "lora_alpha": self.lora.scaling * rank,
            "lora_dropout": 0.0,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
