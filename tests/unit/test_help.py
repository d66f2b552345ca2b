"""The help of every option is a sentence that begins with a noun or a verb and names its unit."""

import re

import click

from fedmoe.cli.config import commands
from fedmoe.cli.main import cli
from fedmoe.protocol.rules import RuleSet
from fedmoe.settings import (
    AggregatorSettings,
    AnswerSettings,
    FitSettings,
    GatewaySettings,
    HeldOutSettings,
    IdentitySettings,
    RedisSettings,
    WorkerSettings,
)
from fedmoe.tools.metrics.settings import MetricsSettings
from fedmoe.tools.plan import PlanSettings
from fedmoe.util.alive import AliveSettings
from fedmoe.util.setting import UNITS, declared

OWNERS = (
    RedisSettings, IdentitySettings, RuleSet, GatewaySettings, AggregatorSettings, WorkerSettings, HeldOutSettings,
    AnswerSettings, FitSettings, MetricsSettings, AliveSettings, PlanSettings,
)  # fmt: skip
DEFAULT = re.compile(r"\s*\[default: .*\]$")
# What a help may not begin with: it would not say what the value is, or what the option does.
NO_NOUN = re.compile(
    r"(?i)(a|an|the|whether|if|which|what|where|how|when|why|also|so|as|for|another|auto|repeatable|\w+'s)\b"
)
UNIT = re.compile(
    r"(?i)\b(seconds|milliseconds|updates|rows|tokens|steps|epochs|micro-batches|rank|groups|versions|nats|backups|experts|workers|values)\b"
)
# Factors, exponents and norms have no unit.
BARE = {
    "alpha", "seed", "lr", "gain", "decay-a", "max-norm", "learning-rate", "weight-decay", "clip-norm", "gateway-scale",
    "weight", "server-momentum", "server-beta2", "server-epsilon", "port", "metrics-port", "temperature",
}  # fmt: skip


def helps() -> dict[str, tuple[click.Option, str]]:
    """Every option of every command: `worker run --drain` to the option and its help, without the default."""
    root = click.Context(cli, info_name="fedmoe")
    found = {f"--{one.name}": (one, one.help or "") for one in cli.params if isinstance(one, click.Option)}
    for words, context in commands(root):
        for one in context.command.params:
            if isinstance(one, click.Option):
                name = f"{' '.join(words)} {max(one.opts, key=len)}"
                found[name] = (one, DEFAULT.sub("", one.help or ""))
    return {
        name: (one, text) for name, (one, text) in found.items() if not name.endswith(("--help", "--version"))
    }


def test_help_is_a_sentence() -> None:
    """With a capital letter and a full stop; a list of the values alone is none."""
    assert len(helps()) > 100
    assert [name for name, (_, text) in helps().items() if not re.fullmatch(r"[A-Z].{10,}\.", text)] == []


def test_help_begins_with_a_noun_or_a_verb() -> None:
    """A reader sees it without the option's neighbours, in an editor or in a list of search results."""
    assert [f"{name}: {text}" for name, (_, text) in helps().items() if NO_NOUN.match(text)] == []


def test_help_of_a_number_names_its_unit() -> None:
    """Also of the options that are not declared as settings."""
    unnamed = {
        name
        for name, (one, text) in helps().items()
        if isinstance(one.type, click.types.IntParamType | click.types.FloatParamType)
        and not UNIT.search(text)
    }
    assert {name for name in unnamed if name.rpartition("--")[2] not in BARE} == set()


def test_declared_unit_is_in_the_help() -> None:
    """The check of a value and its help speak of the same unit; a duration is typed with its own."""
    wrong = [
        one.name
        for owner in OWNERS
        for one in declared(owner)
        if one.said.unit and not one.said.is_duration
        and UNITS.get(one.said.unit, one.said.unit) not in one.said.help.lower()
    ]  # fmt: skip
    assert wrong == []
