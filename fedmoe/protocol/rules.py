"""The rule set of an expert: how it is aggregated and trained. Pure.

The spec says what an expert is, and never changes. Rules may change while the expert is served and trained
(`fedmoe expert set`). Each change is a commit on the expert's chain and gives the rule set the next number. An update
is decided under the rules in force when it is applied, and its line of the log names them.

`meta` holds the rule set in force. The log line of a change holds the rule set before the change. So a replay finds
every rule set that a line names, either in a later line or in `meta`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

from fedmoe.errors import FedMoEError, SettingsError, SpecError
from fedmoe.protocol import features
from fedmoe.protocol.features import check_requires, with_feature
from fedmoe.protocol.fields import put_back, take_unknown
from fedmoe.protocol.staleness import Decay
from fedmoe.protocol.validation import HOLD, ON_WORSE, WARN
from fedmoe.util.setting import changed, check, check_whole, setting, values

LEAST_STALENESS_BOUND = 256
STALENESS_PER_WORKER = 4
# These bounds keep every weight within the range of fp32 (3e38), and catch typing errors.
MAX_LR, MAX_NORM, MAX_WHOLE = 1000, 1e9, 10**9
MAX_MOMENTUM = 0.999  # with more, what was learnt a thousand rounds ago would still move the weights
TRAIN_EXPERT, TRAIN_GATEWAY, TRAIN_BOTH = TRAINS = ("expert", "gateway", "both")
BY_WORKER, BY_DOMAIN = BALANCES = ("worker", "domain")
SGD, NESTEROV, ADAPTIVE = SERVER_OPTIMIZERS = ("sgd", "nesterov", "adaptive")
MAX_REASON_CHARS = 300
# Left out of the stored text at their default: an earlier FedMoE, which lacks them, wrote the same text.
LATER = ("requires", "train", "on_worse", "held", "released")
LATER_IN_AGGREGATION = (
    "gain",
    "balance",
    "server_optimizer",
    "server_momentum",
    "server_beta2",
    "server_epsilon",
)
# What a new gateway has where the expert that it is created like has the default; docs/benchmarks.md has the figures.
FOR_GATEWAY = {"gain": 2.0, "balance": BY_DOMAIN}
AUTO = "auto"  # for max_staleness: the bound grows with the number of workers


@dataclass(frozen=True, slots=True, kw_only=True)
class AggregationRules:
    """How updates become part of the expert, and which ones are refused.

    With the server optimizer `sgd`, `weights += factor × Δ`; `fedmoe.protocol.server` has the steps of the others.
    """

    lr: float = setting(
        1.0, "Factor of every update: weights += lr × decay × Δ; with 1 the expert equals the model of a lone worker.",
        above=0, at_most=MAX_LR,
    )  # fmt: skip
    decay: Decay = field(default_factory=Decay)
    gain: float = setting(
        1.0, "Weight of a round in which every worker publishes once, without a unit: an update counts "
        "lr × min(1, gain × decay), so a lone worker's never counts more than lr.", above=0, at_most=MAX_LR,
    )  # fmt: skip
    balance: str = setting(
        BY_WORKER, "Unit that counts the same in a round: each worker, or on the gateway each domain.",
        choices=BALANCES,
    )  # fmt: skip
    server_optimizer: str = setting(
        SGD, "Step by which an update changes the weights: by itself, with momentum once a round (nesterov), or scaled "
        "for each value by the size of past updates (adaptive).", choices=SERVER_OPTIMIZERS,
    )  # fmt: skip
    server_momentum: float = setting(
        0.5, "Share of a round's movement that the next round repeats (server optimizer nesterov).",
        at_least=0, at_most=MAX_MOMENTUM,
    )  # fmt: skip
    server_beta2: float = setting(
        0.99, "Share of the mean square that stays when an update arrives (server optimizer adaptive).",
        at_least=0, at_most=MAX_MOMENTUM,
    )  # fmt: skip
    server_epsilon: float = setting(
        1e-3, "Size of an update's value, in units of the weights, below which steps are not scaled up further (server "
        "optimizer adaptive).", above=0, at_most=MAX_LR,
    )  # fmt: skip
    max_staleness: int | None = setting(
        None,
        "Refuse an update if more than this many updates were applied since its base; auto is 256, or 4 per worker if "
        "that is more.",
        at_least=0, at_most=MAX_WHOLE, none=AUTO, unit="updates",
    )  # fmt: skip
    max_norm: float = setting(
        1000.0, "Refuse an update whose L2 norm, over all tensors together, exceeds this.", above=0, at_most=MAX_NORM,
        words="ten times the initial adapter's norm",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)

    def factor(self, staleness: int, weight: float = 1.0) -> float:
        """The factor of an update of this staleness (in updates): lr × min(1, gain × decay(staleness) × weight).

        M equal workers in rotation have staleness M − 1. With the default decay, 1 / (1 + staleness), a round of their
        updates then counts as `gain` times its mean. The minimum bounds the gain by the number of workers: a lone
        worker's updates count lr. docs/protocol.md derives for which gain this is stable.

        `weight` is that of its worker beside the others (see `fedmoe.protocol.balance`).

        Source of a server learning rate above 1: Reddi et al., arXiv 2003.00295.
        """
        return self.lr * min(1.0, self.gain * self.decay(staleness) * weight)

    def staleness_bound(self, workers: int) -> int:
        """The largest staleness (in updates) that is not refused; `workers` ever had an update decided.

        With M workers in step the staleness is M−1, and twice that if each has just missed a pull. So the bound grows
        with the number of workers, unless the operator chose one.
        """
        if self.max_staleness is not None:
            return self.max_staleness
        return max(LEAST_STALENESS_BOUND, STALENESS_PER_WORKER * workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How every worker of the expert fine-tunes."""

    learning_rate: float = setting(2e-4, "AdamW learning rate (workers).", above=0, at_most=MAX_LR)
    weight_decay: float = setting(0.0, "AdamW weight decay (workers).", at_least=0, at_most=MAX_LR)
    batch_size: int = setting(
        4, "Rows in a micro-batch of a worker.", at_least=1, at_most=MAX_WHOLE, unit="rows"
    )
    accumulate: int = setting(
        1,
        "Micro-batches in one optimizer step of a worker.",
        at_least=1,
        at_most=MAX_WHOLE,
        unit="micro-batches",
    )
    max_length: int = setting(
        512,
        "Maximum length of a row in tokens; a longer answer is truncated.",
        at_least=8,
        at_most=MAX_WHOLE,
        unit="tokens",
    )
    warmup_steps: int = setting(
        10,
        "Optimizer steps over which a worker's learning rate rises to its full value.",
        at_least=0,
        at_most=MAX_WHOLE,
        unit="steps",
    )
    clip_norm: float = setting(
        1.0,
        "Maximum L2 norm of a worker's gradient; a larger gradient is scaled down.",
        above=0,
        at_most=MAX_NORM,
    )

    def __post_init__(self) -> None:
        check(self)


def learning_rate_of(text: str) -> float:
    """A learning rate that was typed. Raises SettingsError unless it is within the bounds of the rule."""
    try:
        return replace(TrainingSettings(), learning_rate=float(text)).learning_rate
    except ValueError as error:
        raise SettingsError(
            f"learning_rates must be numbers above 0, like 2e-4,1e-4, not {text!r}", about="learning_rates"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """The rules of an expert under one number.

    Args:
        number: 1 for the rules that the expert was created with, one more after each change.
        aggregation: how updates become part of the expert.
        training: how its workers train.
        sync_interval_s: seconds between two publications of a worker.
        train: what its workers train: the expert, the gateway, or both by turns.
        on_worse: what happens if the validation losses of workers get worse.
        held: why no updates are applied now; "" if they are.
        released: version of the expert when an operator last released it, 0 if it was never held; validation losses
            of earlier versions do not count any more.
        requires: names of the features that a reader of these rules must know (see `fedmoe.protocol.features`).
        unknown: fields that a later FedMoE wrote, as JSON; they are kept, so that a change of rules drops none of them.
    """

    number: int = 1
    aggregation: AggregationRules = field(default_factory=AggregationRules)
    sync_interval_s: float = setting(10.0, "Seconds between two publications of a worker.", option="sync_interval",
                                     above=0, at_most=86_400, unit="s")  # fmt: skip
    train: str = setting(
        TRAIN_EXPERT, "Model that the workers of the expert train: the expert, the gateway, or both by turns.",
        choices=TRAINS,
    )  # fmt: skip
    on_worse: str = setting(
        WARN, "Reaction if the validation loss of workers gets worse: warn, or hold the expert if two workers agree.",
        choices=ON_WORSE,
    )  # fmt: skip
    training: TrainingSettings = field(default_factory=TrainingSettings)
    held: str = ""
    released: int = 0
    requires: str = ""
    unknown: str = ""

    def __post_init__(self) -> None:
        check_whole("number", self.number, at_least=1)
        check_whole("released", self.released, at_least=0)
        if not isinstance(self.held, str) or len(self.held) > MAX_REASON_CHARS:
            raise SettingsError(
                f"the reason of a hold must be a text of at most {MAX_REASON_CHARS} characters", about="held"
            )
        check(self)
        # An aggregator that lacks them would apply the updates of a held expert, or fold all of them by sgd.
        requires = with_feature(self.requires, features.HOLD, bool(self.held) or self.on_worse == HOLD)
        has_optimizer = self.aggregation.server_optimizer != SGD
        requires = with_feature(requires, features.SERVER_OPTIMIZER, has_optimizer)
        object.__setattr__(self, "requires", requires)

    def to_json(self) -> str:
        """Canonical JSON: the same rules give the same text on every machine."""
        content = asdict(self)
        unknown = json.loads(content.pop("unknown") or "{}")
        without = RuleSet()
        for rules, default, names in (
            (content, without, LATER),
            (content["aggregation"], without.aggregation, LATER_IN_AGGREGATION),
        ):
            for name in names:
                if rules[name] == getattr(default, name):
                    del rules[name]
        put_back(content, unknown)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "RuleSet":
        """Parse a stored rule set.

        Raises:
            ProtocolError: if it requires a feature that this FedMoE does not know.
            SpecError: if it is malformed.
        """
        return _parse(text)

    @property
    def trained(self) -> frozenset[str]:
        """What the workers train: "expert", "gateway" or both."""
        return frozenset({TRAIN_EXPERT, TRAIN_GATEWAY} if self.train == TRAIN_BOTH else {self.train})

    def settings(self) -> dict[str, Any]:
        """Every rule by the name of its option: lr, decay, decay_a, …, learning_rate, … (seconds, rows, tokens)."""
        return values(self)

    def changed(self, settings: Mapping[str, Any]) -> "RuleSet":
        """The rule set with some rules changed, named as in `settings`; it gets the next number if any value differs.

        Raises:
            SettingsError: if a value breaks its bound, or a rule does not exist.
        """
        present = self.settings()
        if odd := sorted(settings.keys() - present.keys()):
            raise SettingsError(f"there is no rule {odd[0]!r}; there are: {', '.join(present)}", about=odd[0])
        after = changed(self, settings)
        return self if after == self else replace(after, number=self.number + 1)

    def for_gateway(self) -> "RuleSet":
        """The rules of a gateway that is created like an expert with these: its workers train the gateway itself.

        A rule of FOR_GATEWAY takes its value from there if it has the default here.
        """
        defaults = RuleSet().settings()
        wanted = {
            name: value for name, value in FOR_GATEWAY.items() if self.settings()[name] == defaults[name]
        }
        return replace(self.changed(wanted).as_first(), train=TRAIN_EXPERT)

    def hold(self, why: str) -> "RuleSet":
        """The next rule set, under which no updates are applied for this reason.

        Raises:
            SettingsError: if the reason is too long.
        """
        return replace(self, number=self.number + 1, held=why)

    def release(self, version: int) -> "RuleSet":
        """The next rule set, under which updates are applied again, from this version of the expert on."""
        return replace(self, number=self.number + 1, held="", released=version)

    def as_first(self) -> "RuleSet":
        """These rules for a new expert, which is not held."""
        return replace(self, number=1, held="", released=0)

    def differences(self, after: "RuleSet") -> str:
        """The differences from this rule set to `after`, for people: `lr 1 -> 0.5, sync_interval 10 -> 30`."""
        now, then = self.settings(), after.settings()
        texts = [
            f"{name} {_shown(now[name])} -> {_shown(then[name])}" for name in now if now[name] != then[name]
        ]
        if after.held != self.held:
            texts.append(f"held: {after.held}" if after.held else "released")
        elif after.released > self.released:  # it was held and released between the two
            texts.append("released")
        return ", ".join(texts)


def _shown(value: Any) -> str:
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


@lru_cache(maxsize=256)
def _parse(text: str) -> RuleSet:
    try:
        content = json.loads(text)
        check_requires(str(content.get("requires", "")), "the expert's rule set")
        unknown = take_unknown(RuleSet, content)
        aggregation, training = content.pop("aggregation"), content.pop("training")
        for name, record, section in (
            ("aggregation", AggregationRules, aggregation),
            ("training", TrainingSettings, training),
        ):
            if odd := take_unknown(record, section):
                unknown[name] = odd
        decay = aggregation.pop("decay")
        if odd := take_unknown(Decay, decay):
            unknown.setdefault("aggregation", {})["decay"] = odd
        return RuleSet(
            aggregation=AggregationRules(decay=Decay(**decay), **aggregation),
            training=TrainingSettings(**training),
            unknown=json.dumps(unknown, sort_keys=True) if unknown else "",
            number=content.pop("number"),
            sync_interval_s=content.pop("sync_interval_s"),
            **content,
        )
    except (FedMoEError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, FedMoEError) and not isinstance(error, SettingsError):
            raise
        raise SpecError(f"the expert's rule set is malformed ({error!r})", about="rules") from error
