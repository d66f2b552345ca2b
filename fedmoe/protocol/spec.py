"""The spec: what makes an expert itself. It is written once, at creation, and never changes.

Headers, checkpoints and `meta` carry its digest. The rules of aggregation and training may change (see
`fedmoe.protocol.rules`). A worker needs only a stream name, its data and a Redis URL; spec and rules hold the rest.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from fedmoe.errors import FedMoEError, ProtocolError, SettingsError, SpecError
from fedmoe.protocol.codec import part_lengths
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import put_back, take_unknown
from fedmoe.protocol.formats import EXACT, FORMATS
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.lora import DEFAULT_WIRE_FORMAT, LoraSettings, alpha_at
from fedmoe.protocol.update import MAX_PARTS
from fedmoe.protocol.weights_parts import MAX_STRING_BYTES
from fedmoe.util.setting import check_whole
from fedmoe.util.template_file import MAX_TEMPLATE_CHARS

PREAMBLE_BYTES = 49  # of packed weights (packed.py)
SPEC_FORMAT = 3  # 3: the spec holds no rules


def beneath(towers: Sequence[str]) -> str:
    """PEFT's `exclude_modules` pattern for all modules in these parts of a model."""
    return f"({'|'.join(map(re.escape, towers))})\\..*"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What makes an expert itself.

    Args:
        base_model: id or directory of the base model, as the operator named it; a worker may keep it elsewhere.
        base_config: the numbers of its config that define the architecture (see `fedmoe.model.base`).
        layout: the adapter's tensors.
        init_seed: seed of the one LoRA initialisation that all experts of the base share.
        wire_format: how updates are encoded (see `fedmoe.protocol.formats`).
        towers: parts of the base model that process no text and have no adapter.
        chat_template: formats the rows (Jinja); "" means the base model's template, or else the first worker's.
        requires: features needed to train or serve the expert (see `fedmoe.protocol.features`).
        unknown: JSON of the fields that a later FedMoE wrote; kept, because the digest covers them.
    """

    base_model: str
    base_config: dict[str, Any]
    layout: Layout
    lora: LoraSettings = field(default_factory=LoraSettings)
    wire_format: str = DEFAULT_WIRE_FORMAT
    init_seed: int = 0
    chat_template: str = ""
    towers: tuple[str, ...] = ()
    requires: str = ""
    unknown: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.base_model, str) and self.base_model):
            raise SettingsError("base_model must be a name or a directory", about="base_model")
        if self.wire_format not in FORMATS:
            raise SettingsError(
                f"wire_format must be one of {', '.join(FORMATS)}, not {self.wire_format!r}",
                about="wire_format",
            )
        check_whole("init_seed", self.init_seed, at_least=0)
        if not (isinstance(self.chat_template, str) and len(self.chat_template) <= MAX_TEMPLATE_CHARS):
            raise SettingsError(
                f"chat_template must be text of at most {MAX_TEMPLATE_CHARS} characters",
                about="chat_template",
            )
        if self.layout.file_bytes > MAX_STRING_BYTES:  # then it lies in parts (fedmoe.protocol.weights_parts)
            self._check_large()

    def _check_large(self) -> None:
        """Raise SettingsError if an update has too many parts, or packed weights do not fit into one Redis string."""
        lengths = part_lengths(self.layout.numel, self.wire_format)
        packed = 0 if self.wire_format == EXACT else PREAMBLE_BYTES + sum(lengths)
        if len(lengths) > MAX_PARTS or packed > MAX_STRING_BYTES:
            raise SettingsError(
                f"an adapter of {self.layout.file_bytes / 2**20:.0f} MiB is too large for format {self.wire_format}: "
                f"an update would have {len(lengths)} parts (at most {MAX_PARTS}) and {sum(lengths) / 2**20:.0f} MiB "
                "(at most 512, in fp32 1024); choose a smaller rank, fewer targets, or another format",
                about="layout",
            )

    def to_json(self) -> str:
        """Canonical JSON: the same spec gives the same text on every machine."""
        content = {"spec_format": SPEC_FORMAT} | {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layout", "unknown")
        }
        content["lora"] = asdict(self.lora)
        for name in ("chat_template", "towers", "requires"):
            if not content[name]:  # an empty field would change the digest of an earlier FedMoE's spec
                del content[name]
        content["layout"] = [[name, list(shape)] for name, shape in self.layout.tensors]
        put_back(content, json.loads(self.unknown or "{}"))
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Spec":
        """Parse a stored spec.

        Raises:
            ProtocolError: if it has the format of a later or an earlier FedMoE, or needs an unknown feature.
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
                    ),
                    about="spec_format",
                )
            check_requires(str(content.get("requires", "")), "the expert")
            unknown = take_unknown(cls, content)
            lora = content.pop("lora")
            if odd := take_unknown(LoraSettings, lora):
                unknown["lora"] = odd
            towers = tuple(content.pop("towers", ()))
            return cls(
                layout=Layout(tuple((name, tuple(shape)) for name, shape in content.pop("layout"))),
                lora=LoraSettings(**lora | {"targets": tuple(lora["targets"])}),
                towers=towers,
                unknown=json.dumps(unknown, sort_keys=True) if unknown else "",
                **content,
            )
        except FedMoEError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise SpecError(f"the stored spec is malformed ({error!r})", about="spec") from error

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
            "lora_alpha": alpha_at(self.lora.scaling, rank),
            "lora_dropout": 0.0,
            "target_modules": targets,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
