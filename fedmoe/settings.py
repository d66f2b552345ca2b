"""Every setting, declared once (see `fedmoe.util.setting`). Free of torch and redis.

Command-line options, keys of the TOML file, environment variables, checks and docs/settings.md come from here. The
shape of an adapter and the rules of an expert are declared in the same way in `protocol.lora` and `protocol.rules`.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedmoe.errors import SettingsError
from fedmoe.protocol.lora import DEFAULT_BASE_MODEL, DEFAULT_WIRE_FORMAT, WIRE_FORMATS, LoraSettings
from fedmoe.protocol.names import check_domain, check_name, clean_name
from fedmoe.protocol.rules import learning_rate_of
from fedmoe.redis_settings import MAX_SECONDS
from fedmoe.redis_settings import RedisSettings as RedisSettings  # the settings of all commands
from fedmoe.util.hold_back import HoldBack
from fedmoe.util.setting import check, setting

METHODS = ("cat", "svd", "average", "ties", "dare")
WEIGHTINGS = ("config", "examples", "updates")

Learn = Literal["all", "last"]


# Settings that several commands have.
def _base_model() -> Any:
    return setting("", "Hub id or local directory of the base model.", words="as the spec says")


def _device() -> Any:
    return setting("auto", "Device to compute on: auto, cpu, cuda or one GPU, like cuda:1.")


def _precision() -> Any:
    return setting(
        "auto",
        "Precision to compute in; auto is bf16 where the hardware supports it.",
        choices=("auto", "fp32", "bf16"),
    )


def _learn() -> Any:
    return setting("all", "Answers of a conversation that count in the loss.", choices=("all", "last"))


def _bad_rows() -> Any:
    text = "JSONL file to list the rows that cannot be used, with file, line, reason and text."
    return setting(None, text, metavar="FILE")


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySettings:
    """The identity of new experts; it never changes (see `fedmoe.protocol.spec`)."""

    base_model: str = setting(
        DEFAULT_BASE_MODEL, "Hub id or directory of the base model; only its config is needed here."
    )
    lora: LoraSettings = field(default_factory=LoraSettings)
    chat_template: Path | None = setting(
        None, "Jinja chat template with which all workers format their rows.", metavar="FILE",
        words="the base model's own",
    )  # fmt: skip
    wire_format: str = setting(
        DEFAULT_WIRE_FORMAT, "Encoding of the values in updates and pulls.", choices=WIRE_FORMATS
    )
    seed: int = setting(0, "Seed of the experts' common initialisation.", at_least=0)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """How the experts become the gateway: scale · Σ wᵢ ΔWᵢ / Σ wᵢ.

    Args:
        weights_given: options for scale and weights that a person gave, for the warning that a fit replaces them.
    """

    method: str = setting(
        "cat", "Method that merges the experts into the gateway.", option="gateway_method", choices=METHODS
    )
    scale: float = setting(
        1.0,
        "Sum of the merge weights; with 1 the gateway is the weighted average.",
        option="gateway_scale",
        above=0,
    )
    weighting: str = setting(
        "config", "Source of the merge weights: the weight in the list of experts (config), or the rows (examples) or "
        "updates applied to the expert.",
        option="gateway_weights", choices=WEIGHTINGS,
    )  # fmt: skip
    rank: int = setting(0, "Rank of the SVD merge.", option="gateway_rank", at_least=0,
                        words="the experts' rank")  # fmt: skip
    interval_s: float = setting(
        2.0,
        "Seconds between two rebuilds of the gateway; more if they need more than a tenth of a core.",
        option="gateway_interval",
        above=0,
        at_most=MAX_SECONDS,
        unit="s",
    )
    weights_given: Sequence[str] = ()

    def __post_init__(self) -> None:
        check(self)
        if self.rank and self.method != "svd":
            raise SettingsError(
                f"gateway_rank is for the method svd only, not for {self.method!r}: leave it out",
                about="gateway_rank",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregatorSettings:
    """How the aggregator runs."""

    lease_s: float = setting(5.0, "Seconds without a renewal of a lease until another aggregator takes over.",
                             option="lease", at_least=0.2, at_most=MAX_SECONDS, unit="s")  # fmt: skip
    block_ms: int = setting(
        500, "Milliseconds that one read waits for new entries; stopping may take as long.", at_least=1, at_most=1000,
        unit="ms",
    )  # fmt: skip
    batch: int = setting(
        64, "Maximum number of updates in one commit.", at_least=1, at_most=1024, unit="updates"
    )
    threads: int = setting(
        0, "Threads that fold and pack the parts of large updates, of all experts together.", at_least=0, at_most=256,
        unit="threads", words="one for each core",
    )  # fmt: skip
    keep_updates: Path | None = setting(
        None, "Directory in which applied updates are kept, for `fedmoe verify` and for resends."
    )
    keep_updates_for_s: float = setting(
        0.0, "Time with its unit, like 7d, 12h or 30m, after which kept updates are removed; `fedmoe verify` then "
        "replays from the weights of a later version.", option="keep_updates_for", at_least=0, unit="s",
        is_duration=True, words="they are kept for ever",
    )  # fmt: skip
    burst: bool = setting(False, "Exit when no update is waiting.")
    max_updates: int = setting(0, "Number of decided updates, over all experts, after which to exit.", at_least=0,
                               unit="updates", words="never")  # fmt: skip
    new_lineage: bool = setting(
        False, "Create from zero the experts that Redis lost or an operator removed; what their workers trained before "
        "is lost.",
    )  # fmt: skip
    wait: bool = setting(True, "Fail if Redis cannot be reached, instead of waiting for it.")

    def __post_init__(self) -> None:
        check(self)
        if self.keep_updates_for_s and self.keep_updates is None:
            raise SettingsError(
                "--keep-updates-for needs --keep-updates: nothing is kept without it",
                about="keep_updates_for",
            )
        if self.block_ms > self.lease_s * 500:
            raise SettingsError(
                f"block_ms ({self.block_ms}) must be at most half the lease ({self.lease_s * 1000:.0f} ms), "
                "else the lease expires while its holder waits for a read",
                about="block_ms",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """The settings of one worker; all others come from the expert's spec and rules."""

    stream: str = setting("", "Name of the expert to train.", metavar="EXPERT", words="the enrolment's")
    data: Path = setting(..., "JSONL file with the training rows; it never leaves this machine.")
    name: str = setting(
        "",
        "Name of this worker; no other worker of the expert may have it.",
        words="the name in --state-dir, else the host's",
    )
    base_model: str = _base_model()
    chat_template: Path | None = setting(
        None,
        "Jinja chat template, for a base model that has none; it becomes the template of the expert.",
        metavar="FILE",
    )
    state_dir: Path | None = setting(
        None, "Directory for checkpoints, from which a restarted worker resumes."
    )
    checkpoint_interval_s: float = setting(
        60.0, "Seconds between two checkpoints; each new update also writes one.", option="checkpoint_interval",
        at_least=1, unit="s",
    )  # fmt: skip
    device: str = _device()
    precision: str = _precision()
    batch_size: int = setting(0, "Rows in a micro-batch; a smaller GPU needs fewer.", at_least=0, at_most=10**9,
                              unit="rows", words="as the rules say")  # fmt: skip
    accumulate: int = setting(
        0,
        "Micro-batches in one optimizer step.",
        at_least=0,
        at_most=10**9,
        unit="micro-batches",
        words="as the rules say",
    )
    max_steps: int = setting(
        0,
        "Optimizer steps after which to end, of expert and gateway together, counted from this start; dropped steps do "
        "not count.",
        at_least=0,
        unit="steps",
        words="never",
    )
    max_epochs: float = setting(
        0.0, "Epochs (passes over the data) after which to end.", at_least=0, unit="epochs", words="never"
    )
    drain_s: float = setting(
        30.0, "Seconds that a stopped worker waits for the decision of its last update.", option="drain",
        at_least=0, unit="s",
    )  # fmt: skip
    on_bad_row: Literal["skip", "fail"] = setting(
        "skip",
        "Reaction to a row that cannot be used: leave it out and report it, or fail.",
        choices=("skip", "fail"),
    )
    learn: Learn = _learn()
    validate: str = setting(
        "2%", "Rows to hold back from training, to measure the validation loss on: a share, like 2%, or a number; "
        "0 for none.", metavar="ROWS",
    )  # fmt: skip
    bad_rows: Path | None = _bad_rows()
    domain_vector: bool = setting(
        True,
        "Publish no domain vector, by which a router finds this worker's expert, and take back an earlier one.",
    )
    vector_rows: int = setting(
        40, "Rows whose prompts the domain vector is the mean of, spread evenly over the data.", at_least=1,
        at_most=10_000, unit="rows",
    )  # fmt: skip
    vector_noise: float = setting(
        0.0, "Standard deviation of the Gaussian noise on each value of the domain vector, as a multiple of 2 / rows, "
        "the most by which one of its rows can move the vector.", at_least=0, at_most=1e6,
    )  # fmt: skip
    wait: bool = setting(
        True, "Fail if Redis cannot be reached or has no experts yet, instead of waiting for them."
    )
    log_interval_s: float = setting(5.0, "Seconds between two progress lines.", option="log_interval", at_least=0,
                                    unit="s")  # fmt: skip

    def __post_init__(self) -> None:
        if not self.stream:
            raise SettingsError(
                "no expert to train: name it (--stream EXPERT), or give an --enrolment that does",
                about="stream",
            )
        check_domain(self.stream)
        if self.name:
            check_name("worker name", self.name, setting="name")
        check(self)
        _ = self.hold_back

    @property
    def hold_back(self) -> HoldBack:
        """The rows to hold back from training."""
        return HoldBack.parse(self.validate)

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self.name or clean_name(socket.gethostname())


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings:
    """How questions are answered (`fedmoe gateway serve` and `chat`)."""

    base_model: str = _base_model()
    device: str = _device()
    precision: str = _precision()
    max_tokens: int = setting(
        512, "Tokens of an answer at most, unless a request says otherwise.", at_least=1, unit="tokens"
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutSettings:
    """How the loss on held-out rows is measured.

    Args:
        data: see `tools.heldout.find_files`.
        extra: name -> directory of an adapter that is not in the federation.
        train: see `tools.rows.find_training_files`.
    """

    data: Sequence[str]
    extra: Mapping[str, Path] = field(default_factory=dict)
    train: Sequence[str] = ()
    rows: int = setting(
        0, "Rows of each file to measure, spread evenly over the file.", at_least=0, unit="rows", words="all"
    )
    learn: Learn = _learn()
    bad_rows: Path | None = _bad_rows()
    base_model: str = _base_model()
    batch_size: int = setting(8, "Rows in one batch.", at_least=1, unit="rows")
    device: str = _device()
    precision: str = _precision()
    centralised: bool = setting(
        False, "Train one adapter on the rows of all experts (--train) and evaluate it too, as a bound."
    )
    steps: int | None = setting(
        None, "Optimizer steps of the centralised adapter.", at_least=1, unit="steps",
        words="as many as the experts' updates are worth",
    )  # fmt: skip
    learning_rates: tuple[str, ...] = setting(
        (), "Learning rates to try for the centralised adapter, separated by commas; the best on rows held out of "
        "--train is taken.",
        words="that of the rules, its half and its quarter",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)
        if self.centralised and not self.train:
            raise SettingsError(
                "--centralised needs the training rows of the experts: --train EXPERT=FILE or --train DIR",
                about="train",
            )
        for name in ("train", "steps", "learning_rates"):
            if getattr(self, name) and not self.centralised:
                raise SettingsError(
                    f"--{name.replace('_', '-')} is for --centralised only: add that, or leave it out",
                    about=name,
                )
        _ = self.rates

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates as numbers, each once."""
        return tuple(dict.fromkeys(map(learning_rate_of, self.learning_rates)))


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """How the weights of the merged gateway are fitted.

    Args:
        data: see `tools.rows.find_validation_files`.
    """

    data: Sequence[str]
    layer_groups: int = setting(
        1, "Groups of layers in which each expert has a weight of its own.", at_least=1, at_most=1000,
        unit="groups",
    )  # fmt: skip
    max_passes: int = setting(20, "Passes over the rows with gradient, after which the search ends.", at_least=1,
                              unit="passes")  # fmt: skip
    rows: int = setting(
        0, "Rows of each file to fit on, spread evenly over the file.", at_least=0, unit="rows", words="all"
    )
    learn: Learn = _learn()
    bad_rows: Path | None = _bad_rows()
    base_model: str = _base_model()
    batch_size: int = setting(4, "Rows in one batch.", at_least=1, unit="rows")
    device: str = _device()
    precision: str = _precision()

    def __post_init__(self) -> None:
        check(self)
