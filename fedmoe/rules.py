"""The rule set of an expert: how it is aggregated and trained. Pure.

The spec says what an expert is, and never changes. Rules may change while the expert is served and trained
(`fedmoe expert set`). Each change is a commit on the expert's chain and gives the rule set the next number. An update
is decided under the rules in force when it is applied, and its line of the log names them.

`meta` holds the rule set in force. At a change, the log keeps the one that ended. So whoever replays the log finds
every rule set that a line names: further down in the log, or in `meta`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

from fedmoe.errors import FedMoEError, SettingsError, SpecError
from fedmoe.features import check_requires
from fedmoe.fields import put_back, take_unknown
from fedmoe.require import require, require_positive, require_whole
from fedmoe.staleness import Decay

LEAST_STALENESS_BOUND = 256
STALENESS_PER_WORKER = 4
AUTO = "auto"  # of max_staleness: the bound grows with the workers


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
        require_positive(self, "lr", "max_norm")
        if self.max_staleness is not None:
            require_whole(self, "max_staleness", minimum=0)

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
        require_positive(self, "learning_rate", "clip_norm")
        require(
            0 <= self.weight_decay < float("inf"),
            f"weight_decay must be a number of at least 0, not {self.weight_decay!r}",
        )
        require_whole(self, "batch_size", "accumulate")
        require_whole(self, "warmup_steps", minimum=0)
        require_whole(self, "max_length", minimum=8)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """The rules of an expert under one number.

    Args:
        number: 1 for the rules that the expert was created with, one more after each change.
        aggregation: how updates become part of the expert.
        training: how its workers train.
        sync_interval_s: a worker publishes this often (seconds).
        requires: the features that whoever goes by these rules must know (see `fedmoe.features`).
        unknown: JSON of the fields that a later FedMoE wrote; kept, so that a change drops none of them.
    """

    number: int = 1
    aggregation: AggregationRules = field(default_factory=AggregationRules)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    sync_interval_s: float = 10.0
    requires: str = ""
    unknown: str = ""

    def __post_init__(self) -> None:
        require_whole(self, "number")
        require_positive(self, "sync_interval_s")

    def to_json(self) -> str:
        """Canonical JSON: the same rules give the same text on every machine."""
        content = asdict(self)
        unknown = json.loads(content.pop("unknown") or "{}")
        if not self.requires:
            del content["requires"]
        put_back(content, unknown)
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "RuleSet":
        """Parse a stored rule set.

        Raises:
            ProtocolError: if it needs something that this FedMoE does not know.
            SpecError: if it is malformed.
        """
        return _parse(text)

    def settings(self) -> dict[str, Any]:
        """Every rule by the name of its option: lr, decay, decay_a, …, learning_rate, …; seconds, rows, tokens."""
        aggregation = self.aggregation
        return {
            "lr": aggregation.lr,
            "decay": aggregation.decay.kind,
            "decay_a": aggregation.decay.a,
            "decay_b": aggregation.decay.b,
            "max_staleness": AUTO if aggregation.max_staleness is None else aggregation.max_staleness,
            "max_norm": aggregation.max_norm,
            "sync_interval": self.sync_interval_s,
        } | asdict(self.training)

    def changed(self, settings: Mapping[str, Any]) -> "RuleSet":
        """The rules after a change of some, named as in `settings`; with the next number, if any of them differs.

        Raises:
            SettingsError: if a value breaks its bound, or there is no such rule.
        """
        present = self.settings()
        if odd := sorted(settings.keys() - present.keys()):
            raise SettingsError(f"there is no rule {odd[0]!r}; there are: {', '.join(present)}")
        if all(present[name] == value for name, value in settings.items()):
            return self
        wanted = present | dict(settings)
        bound = wanted["max_staleness"]
        aggregation = replace(
            self.aggregation,
            lr=wanted["lr"],
            decay=Decay(kind=wanted["decay"], a=wanted["decay_a"], b=wanted["decay_b"]),
            max_staleness=None if bound == AUTO else bound,
            max_norm=wanted["max_norm"],
        )
        names = [one.name for one in fields(TrainingSettings)]
        return replace(
            self,
            number=self.number + 1,
            aggregation=aggregation,
            training=TrainingSettings(**{name: wanted[name] for name in names}),
            sync_interval_s=wanted["sync_interval"],
        )

    def differences(self, after: "RuleSet") -> str:
        """What another rule set changes, for people: `lr 1 -> 0.5, sync_interval 10 -> 30`."""
        now, then = self.settings(), after.settings()
        return ", ".join(
            f"{name} {_shown(now[name])} -> {_shown(then[name])}" for name in now if now[name] != then[name]
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


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
        raise SpecError(f"the expert's rule set is malformed ({error!r})") from error
