"""The shape of the LoRA adapter, and the defaults of base model and wire format. Free of torch. Pure."""

import math
from dataclasses import dataclass

from fedmoe.errors import SettingsError
from fedmoe.util.setting import check, setting

DEFAULT_BASE_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
DEFAULT_WIRE_FORMAT = "int4"
WIRE_FORMATS = ("fp32", "bf16", "int8", "int4")
ALL_LINEAR = "all-linear"


def alpha_at(scaling: float, rank: int) -> int | float:
    """The alpha that gives alpha / rank = `scaling`; as an integer if it is one, because some readers take no other."""
    alpha = scaling * rank
    nearest = round(alpha)
    return nearest if nearest and math.isclose(alpha, nearest, rel_tol=1e-12) else alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Shape of the adapter: ΔW = (alpha / rank) · B A. Source: LoRA, arXiv 2106.09685."""

    rank: int = setting(16, "Rank of the LoRA adapter.", at_least=1, at_most=4096)
    alpha: float = setting(32.0, "Alpha of the LoRA adapter, which is scaled by alpha / rank.", above=0)
    targets: tuple[str, ...] = setting(
        (ALL_LINEAR,), "Names of the modules that get an adapter, separated by commas.", metavar="NAMES"
    )

    def __post_init__(self) -> None:
        check(self)
        if not self.targets:
            raise SettingsError("targets must name at least one module, for example q_proj", about="targets")

    @property
    def scaling(self) -> float:
        """The factor in front of B A."""
        return self.alpha / self.rank
