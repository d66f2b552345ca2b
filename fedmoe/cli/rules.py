"""The options of an expert's rules, for the commands that create an expert or change one."""

from collections.abc import Callable, Mapping
from typing import Any

import click

from fedmoe.rules import RuleSet
from fedmoe.setting import Declared, declared

Command = Callable[..., Any]


class NumberOrWord(click.ParamType[Any]):
    """A number, or a word that stands for none."""

    def __init__(self, kind: type, word: str) -> None:
        self.name = f"{'N' if kind is int else 'X'}|{word}"
        self._kind, self.word = kind, word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or the word."""
        if value == self.word:
            return value
        try:
            return self._kind(value)
        except ValueError:
            return self.fail(f"{value!r} must be a number, or {self.word}", param, ctx)


def _type(rule: Declared) -> Any:
    if rule.said.choices:
        return click.Choice(rule.said.choices)
    assert rule.number is not None
    return NumberOrWord(rule.number, rule.said.none) if rule.said.none else rule.number


def rules_options(*, show_defaults: bool) -> Callable[[Command], Command]:
    """Add an option for each rule, with the default of a new expert in its help, or not."""

    def decorate(command: Command) -> Command:
        for rule in reversed(list(declared(RuleSet))):
            said = f"  [default: {rule.said.default or _shown(rule)}]" if show_defaults else ""
            command = click.option(
                f"--{rule.name.replace('_', '-')}",
                type=_type(rule),
                metavar=_type(rule).name if rule.said.none else None,
                default=None,
                help=rule.said.help + said,
            )(command)
        return command

    return decorate


def _shown(rule: Declared) -> str:
    return rule.said.none if rule.default is None else str(rule.default)


def given_rules(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the rules' options that were given."""
    names = [rule.name for rule in declared(RuleSet)]
    return {name: options[name] for name in names if options[name] is not None}
