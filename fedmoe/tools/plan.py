"""`fedmoe plan`: the settings of a federation that does not exist yet, and what it needs (`fedmoe.protocol.plan`)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmoe.errors import BaseModelError, SettingsError
from fedmoe.protocol.lora import (
    ALL_LINEAR,
    DEFAULT_BASE_MODEL,
    DEFAULT_WIRE_FORMAT,
    WIRE_FORMATS,
    LoraSettings,
)
from fedmoe.protocol.rules import SERVER_OPTIMIZERS, SGD, TRAIN_BOTH, TRAIN_EXPERT, TRAINS
from fedmoe.settings import METHODS
from fedmoe.util.setting import check, setting

if TYPE_CHECKING:
    from fedmoe.protocol.plan import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """The federation to plan; the defaults are those of a real one."""

    experts: int = setting(3, "Number of experts, one for each domain.", at_least=1, at_most=100_000)
    workers: int = setting(3, "Number of workers, of all experts together.", at_least=1, at_most=1_000_000)
    base_model: str = setting(
        DEFAULT_BASE_MODEL, "Hub id or directory of the base model; only its config is needed here."
    )
    rank: int = setting(16, "Rank of the LoRA adapter.", at_least=1, at_most=4096)
    targets: tuple[str, ...] = setting(
        (ALL_LINEAR,), "Names of the modules that get an adapter, separated by commas.", metavar="NAMES"
    )
    values: int = setting(
        0, "Number of values of one adapter, if the base model's config is not at hand.", at_least=0,
        at_most=10**12, words="as base model, rank and targets say",
    )  # fmt: skip
    wire_format: str = setting(
        DEFAULT_WIRE_FORMAT, "Encoding of the values in updates and pulls.", choices=WIRE_FORMATS
    )
    sync_interval_s: float = setting(10.0, "Seconds between two publications of a worker.", option="sync_interval",
                                     above=0, at_most=86_400, unit="s")  # fmt: skip
    train: str = setting(
        TRAIN_EXPERT,
        "Model that the workers train: the expert, the gateway, or both by turns.",
        choices=TRAINS,
    )
    server_optimizer: str = setting(
        SGD, "Step by which an update changes the weights.", choices=SERVER_OPTIMIZERS
    )
    gateway_method: str = setting("cat", "Method that merges the experts into the gateway.", choices=METHODS)
    gateway_interval_s: float = setting(2.0, "Seconds between two rebuilds of the gateway.", option="gateway_interval",
                                        above=0, at_most=86_400, unit="s")  # fmt: skip
    keep: int = setting(7, "Number of backups that are kept.", at_least=0, at_most=100_000)

    def __post_init__(self) -> None:
        check(self)
        if not self.targets:
            raise SettingsError("targets must name at least one module, for example q_proj", about="targets")


def shape_of(settings: PlanSettings) -> "Shape":
    """The shape of the federation; without `values` it reads the base model's config.

    Raises:
        BaseModelError: if the config cannot be found.
        SettingsError: if a target is not the name of a linear module.
    """
    from fedmoe.protocol.plan import Shape  # it imports torch

    values = settings.values or _adapter_values(settings)
    return Shape(
        values=values,
        experts=settings.experts,
        trained_gateway=settings.train != TRAIN_EXPERT,
        memberships=settings.workers * (2 if settings.train == TRAIN_BOTH else 1),
        wire_format=settings.wire_format,
        sync_interval_s=settings.sync_interval_s,
        has_server_state=settings.server_optimizer != SGD,
        is_cat=settings.gateway_method == "cat",
        gateway_interval_s=settings.gateway_interval_s,
        keep=settings.keep,
    )


def _adapter_values(settings: PlanSettings) -> int:
    from fedmoe.model.adapter import adapter_layout
    from fedmoe.model.base import check_reachable, load_config

    lora = LoraSettings(rank=settings.rank, targets=settings.targets)
    try:
        check_reachable(settings.base_model)
        config: Any = load_config(settings.base_model)
    except BaseModelError as error:
        raise BaseModelError(
            f"{error}; or give the number of values of an adapter (--values)", about=error.about
        ) from error
    return adapter_layout(config, lora).numel
