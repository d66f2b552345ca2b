"""Every setting, declared once (see `fedmoe.util.setting`). Free of torch and redis.

Command-line options, keys of the TOML file, environment variables, checks and docs/settings.md come from here. What an
expert is and its rules are declared in the same way where they are used: `protocol.lora`, `protocol.rules`.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedmoe.errors import SettingsError
from fedmoe.protocol.keys import DEFAULT_PREFIX, Keys
from fedmoe.protocol.lora import DEFAULT_BASE_MODEL, DEFAULT_WIRE_FORMAT, WIRE_FORMATS, LoraSettings
from fedmoe.protocol.names import check_name, clean_name
from fedmoe.util.setting import check, setting

MAX_SECONDS = 86_400
METHODS = ("cat", "svd", "average", "ties", "dare")
WEIGHTINGS = ("config", "examples", "updates")
DEFAULT_URL = "redis://127.0.0.1:6379/0"

Learn = Literal["all", "last"]


# Settings that several commands have.
def _base_model() -> Any:
    return setting("", "Where the base model lies here.", words="as the spec says")


def _device() -> Any:
    return setting("auto", "auto, cpu, cuda, cuda:1, …")


def _precision() -> Any:
    return setting("auto", "auto: bf16 where the hardware has it.", choices=("auto", "fp32", "bf16"))


def _learn() -> Any:
    return setting("all", "Which answers of a conversation count in the loss.", choices=("all", "last"))


def _bad_rows() -> Any:
    text = "JSONL file for a list of the rows that cannot be used: file, line, reason and text."
    return setting(None, text, metavar="FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisSettings:
    """Where Redis is.

    Args:
        url: redis://, rediss:// (TLS), unix:// or sentinel:// URL (see store/url.py); may carry user and password.
        prefix: first part of every key, so that several federations can share a server.
        timeout_s: a command without an answer for so long has failed; above every blocking read (1 s).

    Raises:
        SettingsError: for another scheme or an impossible value.
    """

    url: str = setting(
        DEFAULT_URL,
        "redis://, rediss:// (TLS) or unix:// URL, or sentinel://HOST[:PORT][,HOST...]/MASTER; "
        "with user:password@ if need be.",
        option="redis", metavar="URL", variable="FEDMOE_REDIS",
    )  # fmt: skip
    prefix: str = setting(
        DEFAULT_PREFIX, "First part of every key; one federation each.", variable="FEDMOE_PREFIX"
    )
    timeout_s: float = setting(
        10.0, "Seconds after which an unanswered command has failed.", option="redis_timeout", at_least=2,
        at_most=MAX_SECONDS, unit="s", variable="FEDMOE_REDIS_TIMEOUT",
    )  # fmt: skip

    def __post_init__(self) -> None:
        from fedmoe.store.url import check as check_url  # it imports redis

        check_url(self.url)
        check(self)
        Keys(self.prefix)

    @property
    def shown(self) -> str:
        """The URL without login and options, for messages."""
        from fedmoe.store.url import shown

        return shown(self.url)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySettings:
    """What makes new experts themselves; it never changes (see `fedmoe.protocol.spec`)."""

    base_model: str = setting(DEFAULT_BASE_MODEL, "Hub id or directory; only its config is needed here.")
    lora: LoraSettings = field(default_factory=LoraSettings)
    chat_template: Path | None = setting(
        None, "Jinja chat template that all workers format their rows with.", metavar="FILE",
        words="the base model's own",
    )  # fmt: skip
    wire_format: str = setting(DEFAULT_WIRE_FORMAT, "How updates and pulls travel.", choices=WIRE_FORMATS)
    seed: int = setting(0, "Seed of the experts' common initialisation.", at_least=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """How the experts become the gateway: scale · Σ wᵢ ΔWᵢ / Σ wᵢ."""

    method: str = setting("cat", "How the experts are merged.", option="gateway_method", choices=METHODS)
    scale: float = setting(
        1.0, "Sum of the merge weights; 1 is the average.", option="gateway_scale", above=0
    )
    weighting: str = setting(
        "config", "What an expert weighs: its weight in the list of experts, or the rows or updates applied.",
        option="gateway_weights", choices=WEIGHTINGS,
    )  # fmt: skip
    rank: int = setting(0, "Rank of the svd merge.", option="gateway_rank", at_least=0,
                        words="the experts' rank")  # fmt: skip
    interval_s: float = setting(
        2.0, "Seconds between rebuilds.", option="gateway_interval", above=0, at_most=MAX_SECONDS, unit="s"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.rank and self.method != "svd":
            raise SettingsError(f"only the method svd has a rank of its own, {self.method!r} has not")


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorSettings:
    """How the aggregator runs."""

    lease_s: float = setting(5.0, "Seconds until a standby takes over.", option="lease", at_least=0.2,
                             at_most=MAX_SECONDS, unit="s")  # fmt: skip
    block_ms: int = setting(
        500, "Longest wait of a read, in milliseconds; also how long a stop may take.", at_least=1, at_most=1000,
        unit="ms",
    )  # fmt: skip
    batch: int = setting(64, "Updates that one commit takes at most.", at_least=1, at_most=1024)
    keep_updates: Path | None = setting(
        None, "Directory where applied updates are kept, for `fedmoe verify`."
    )
    keep_updates_for_s: float = setting(
        0.0, "Time after which kept updates are removed, like 7d, 12h or 30m; `fedmoe verify` then replays from the "
        "weights of a later version.", option="keep_updates_for", at_least=0, unit="s", is_duration=True,
        words="they are kept for ever",
    )  # fmt: skip
    burst: bool = setting(False, "End when nothing is waiting.")
    max_updates: int = setting(0, "End after so many decided updates of all experts together.", at_least=0,
                               words="never")  # fmt: skip
    new_lineage: bool = setting(
        False, "Create experts from zero that Redis has lost or an operator removed: what their workers trained before "
        "is forgotten.",
    )  # fmt: skip
    wait: bool = setting(True, "Fail if Redis cannot be reached, instead of waiting for it.")

    def __post_init__(self) -> None:
        check(self)
        if self.keep_updates_for_s and self.keep_updates is None:
            raise SettingsError("--keep-updates-for needs --keep-updates: nothing is kept without it")
        if self.block_ms > self.lease_s * 500:
            raise SettingsError(
                f"block_ms ({self.block_ms}) must be at most half the lease ({self.lease_s * 1000:.0f} ms), "
                "else it expires while its holder waits"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What is a worker's own; all else comes from the expert's spec and rules."""

    stream: str = setting(..., "The expert to train.", metavar="EXPERT")
    data: Path = setting(..., "JSONL file; never leaves this machine.")
    name: str = setting(
        "", "This worker's name, unique on its stream.", words="the name in --state-dir, else the host's"
    )
    base_model: str = _base_model()
    chat_template: Path | None = setting(
        None,
        "Jinja template, for an expert whose base model has none; it becomes the expert's.",
        metavar="FILE",
    )
    state_dir: Path | None = setting(None, "Directory for checkpoints; a restart with it goes on.")
    checkpoint_interval_s: float = setting(
        60.0, "Seconds between checkpoints; each new update writes one, too.", option="checkpoint_interval", at_least=1,
        unit="s",
    )  # fmt: skip
    device: str = _device()
    precision: str = _precision()
    batch_size: int = setting(0, "Rows in a micro-batch, for a smaller GPU.", at_least=0, at_most=10**9,
                              words="as the rules say")  # fmt: skip
    accumulate: int = setting(
        0, "Micro-batches in a step.", at_least=0, at_most=10**9, words="as the rules say"
    )
    max_steps: int = setting(0, "End after so many steps of this run.", at_least=0, words="never")
    max_epochs: float = setting(0.0, "End after so many passes over the data.", at_least=0, words="never")
    drain_s: float = setting(30.0, "Seconds to wait for the last decision when stopped.", option="drain", at_least=0,
                             unit="s")  # fmt: skip
    on_bad_row: Literal["skip", "fail"] = setting(
        "skip", "What to do with a row that cannot be used.", choices=("skip", "fail")
    )
    learn: Learn = _learn()
    bad_rows: Path | None = _bad_rows()
    wait: bool = setting(True, "Fail if Redis or the expert is not there yet.")
    log_interval_s: float = setting(5.0, "Seconds between progress lines.", option="log_interval", at_least=0,
                                    unit="s")  # fmt: skip

    def __post_init__(self) -> None:
        check_name("stream", self.stream)
        if self.name:
            check_name("worker name", self.name)
        check(self)

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self.name or clean_name(socket.gethostname())


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSettings:
    """What to measure on held-out rows.

    Args:
        data: see `tools.heldout.find_files`.
        extra: name -> directory of an adapter that is not the federation's.
    """

    data: Sequence[str]
    extra: Mapping[str, Path] = field(default_factory=dict)
    rows: int = setting(0, "Number of rows of each file to look at, evenly spread.", at_least=0, words="all")
    learn: Learn = _learn()
    bad_rows: Path | None = _bad_rows()
    base_model: str = _base_model()
    batch_size: int = setting(8, "Rows at a time.", at_least=1)
    device: str = _device()
    precision: str = _precision()

    def __post_init__(self) -> None:
        check(self)
