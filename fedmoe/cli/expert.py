"""`fedmoe expert list | show | set | hold | release | add | remove | weight | rollback`, while it runs."""

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from fedmoe.cli.declared import given, options, redis_options
from fedmoe.cli.rollback import rollback
from fedmoe.cli.status import cell, table
from fedmoe.protocol.rules import RuleSet
from fedmoe.settings import RedisSettings
from fedmoe.util.text import printable, printable_lines

if TYPE_CHECKING:
    from fedmoe.store.connection import Connection

NOTICE_S = 20.0  # time for workers to notice the removal; they look at Redis every ten seconds
LOOK_EVERY_S = 0.5


@click.group()
def expert() -> None:
    """List, show, change, add, remove and roll back experts, also while they are served and trained."""


expert.add_command(rollback)


@expert.command("list")
@redis_options
def list_experts(redis: RedisSettings) -> None:
    """List the experts of the federation.

    Exit code 1 if something is wrong with an expert; `fedmoe status` says what.
    """
    from fedmoe.errors import FedMoEError
    from fedmoe.store.connection import Connection
    from fedmoe.store.inspect import Inspector

    federation = Inspector(Connection(redis)).federation()
    if federation.problems:
        raise FedMoEError("; ".join(federation.problems), about="federation")
    if not federation.experts:
        click.echo("there are no experts yet: start `fedmoe aggregator run`")
        return
    rows = [
        [
            one.name,
            cell(one.gateway_weight, "g"),
            cell(one.meta.version if one.meta else None),
            cell(one.meta.rules.number if one.meta else None),
            str(len(one.workers)),
            one.lease or "nobody",
            printable(one.meta.base_model) if one.meta else "-",
        ]
        for one in federation.experts
    ]
    titles = ("expert", "gateway weight", "version", "rules", "workers", "served by", "base model")
    for line in table(titles, rows):
        click.echo(line)
    if damaged := [one.name for one in federation.experts if one.problems]:
        raise FedMoEError(
            f"something is wrong with {', '.join(damaged)}: see `fedmoe status`", about="experts"
        )


@expert.command()
@redis_options
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: name, version, lineage, identity, rules, validation losses.",
)
@click.argument("name")
def show(redis: RedisSettings, as_json: bool, name: str) -> None:
    """Show the identity of the expert NAME, the rules in force, and the validation losses of its workers."""
    from fedmoe.protocol.federation import plain_json
    from fedmoe.protocol.names import GATEWAY, check_expert
    from fedmoe.store.change import whole_expert
    from fedmoe.store.connection import Connection
    from fedmoe.store.curves import read_points
    from fedmoe.store.expert import ExpertStore
    from fedmoe.store.inspect import Inspector

    store = ExpertStore(Connection(redis), check_expert(name))
    (meta, _), spec = whole_expert(store), store.spec()
    template = "the operator's" if spec.chat_template else "the base model's, or the first worker's"
    identity = {
        "spec": spec.digest,
        "base_model": meta.base_model or spec.base_model,
        "base_fingerprint": meta.base_fingerprint or "not pinned yet",
        "rank": spec.lora.rank,
        "alpha": spec.lora.alpha,
        "targets": ", ".join(spec.lora.targets),
        "adapter_mib": round(spec.layout.file_bytes / 2**20, 2),
        "wire_format": spec.wire_format,
        "seed": spec.init_seed,
        "chat_template": template,
    }
    rules = meta.rules.settings()
    if name == GATEWAY:
        del rules["train"]  # it belongs to the experts of domains
    view = next(one for one in Inspector(store.connection).federation().experts if one.name == name)
    if as_json:
        content = {"name": name, "version": meta.version, "lineage": meta.lineage, "identity": identity}
        content["rolled_back"] = [one._asdict() for one in meta.rolled_back.intervals]
        content |= {"held": meta.rules.held, "rules": {"number": meta.rules.number} | rules}
        losses = {"best_version": view.best_version, "workers": plain_json(view.curves)}
        losses["curve"] = plain_json(read_points(store.connection, name))
        click.echo(json.dumps(content | {"validation": losses}, indent=2))
        return
    held = f", held: {printable(meta.rules.held)}" if meta.rules.held else ""
    click.echo(f"{name}: version {meta.version}{held}")
    for one in meta.rolled_back.intervals:
        click.echo(f"  {one}")
    if view.curves:
        click.echo(f"\nvalidation loss, best at version {view.best_version}:")
        _show({curve.worker: str(curve).removeprefix(f"{curve.worker} ") for curve in view.curves})
    click.echo("\nidentity, which never changes:")
    _show(identity)
    click.echo(f"\nrules {meta.rules.number}, which `fedmoe expert set {name}` changes:")
    _show(rules)


def _show(values: dict[str, Any]) -> None:
    width = max(map(len, values))
    for name, value in values.items():
        click.echo(
            f"  {name:{width}}  {printable_lines(f'{value:g}' if isinstance(value, float) else str(value))}"
        )


@expert.command("set")
@redis_options
@options(RuleSet, show_defaults=False)
@click.argument("name")
@click.pass_context
def set_rules(ctx: click.Context, /, redis: RedisSettings, name: str, **rules: Any) -> None:
    """Change rules of the expert NAME, also while it is served and trained; other rules stay as they are.

    An update is decided under the rules in force when it is applied. A worker takes over the rules of training at its
    next pull, and logs the change.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.effect import without_effect
    from fedmoe.protocol.names import check_expert
    from fedmoe.store.change import change_rules_soon
    from fedmoe.store.connection import Connection
    from fedmoe.store.expert import ExpertStore

    wanted = given(RuleSet, rules)
    for rule in wanted:
        if ctx.get_parameter_source(rule) is not click.core.ParameterSource.COMMANDLINE:
            raise SettingsError(
                f"{rule} comes from the environment or the configuration file: name the rules to change on the command "
                f"line; otherwise each change would also change {rule}",
                about=rule,
            )
    if not wanted:
        raise SettingsError(
            f"nothing to change: name a rule, for example --lr 0.5; `fedmoe expert show {name}` shows those in force",
            about="rules",
        )
    store = ExpertStore(Connection(redis), check_expert(name))
    if "train" in wanted:
        _prepare_gateway(store.connection, name, wanted["train"])
    before, after = change_rules_soon(store, wanted)
    if after == before:
        click.echo(f"{name}: nothing to change, rules {before.number} have these values already")
    else:
        click.echo(f"{name}: rules {after.number} are in force: {before.differences(after)}")
    for sentence in without_effect(name, after, wanted):
        click.echo(sentence)


def _prepare_gateway(connection: "Connection", name: str, train: str) -> None:
    """Create the trained gateway if the rule `train` of the expert NAME needs it and it does not exist."""
    from consumers.create.add import ensure_gateway
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.names import GATEWAY, check_trains_gateway
    from fedmoe.protocol.rules import TRAIN_EXPERT
    from fedmoe.store.change import whole_expert
    from fedmoe.store.expert import ExpertStore

    if name == GATEWAY:
        raise SettingsError(
            f"the rule train belongs to the experts of domains, not to {GATEWAY!r}: leave it out",
            about="train",
        )
    if train == TRAIN_EXPERT:
        return
    check_trains_gateway(name)
    if ensure_gateway(connection, like=name):
        rules = whole_expert(ExpertStore(connection, GATEWAY))[0].rules.aggregation
        click.echo(f"created the gateway like {name}, with gain {rules.gain:g} and balance {rules.balance}")


@expert.command("hold")
@redis_options
@click.option(
    "--reason", default="by an operator", show_default=True, metavar="TEXT", help="Reason, for people."
)
@click.argument("name")
def hold_expert(redis: RedisSettings, reason: str, name: str) -> None:
    """Hold the expert NAME: its updates wait until it is released. Nothing is lost, and workers train on."""
    from fedmoe.protocol.names import check_expert
    from fedmoe.store.change import hold, soon
    from fedmoe.store.connection import Connection
    from fedmoe.store.expert import ExpertStore

    store = ExpertStore(Connection(redis), check_expert(name))
    before, after = soon(lambda: hold(store, printable(reason.strip()) or "by an operator"))
    if after == before:
        click.echo(f"{name}: nothing to do, it is held already: {printable(before.held)}")
        return
    click.echo(f"{name}: held; its updates wait until `fedmoe expert release {name}`")


@expert.command("release")
@redis_options
@click.argument("name")
def release_expert(redis: RedisSettings, name: str) -> None:
    """Release the expert NAME: the updates that wait are decided.

    From then on, a worker's validation loss is compared only with those it measures after the release.
    """
    from fedmoe.protocol.names import check_expert
    from fedmoe.store.change import release, soon
    from fedmoe.store.connection import Connection
    from fedmoe.store.expert import ExpertStore

    store = ExpertStore(Connection(redis), check_expert(name))
    before, after = soon(lambda: release(store))
    if after == before:
        click.echo(f"{name}: nothing to do, it is not held")
        return
    click.echo(f"{name}: released (it was held: {printable(before.held)})")


@expert.command()
@redis_options
@click.option("--like", default="", metavar="NAME",
              help="Expert whose base model, adapter and rules the new one takes over.  "
                   "[default: the first of a domain, by name]")  # fmt: skip
@click.option(
    "--weight", type=float, default=1.0, show_default=True, help="Weight of the expert in the gateway."
)
@click.option("--new-lineage", is_flag=True,
              help="Create it from zero although Redis lost it; what its workers trained before is lost.")  # fmt: skip
@options(RuleSet, show_defaults=False)
@click.argument("name")
@click.pass_context
def add(
    ctx: click.Context,
    /,
    redis: RedisSettings,
    like: str,
    weight: float,
    new_lineage: bool,
    name: str,
    **rules: Any,
) -> None:
    """Add the expert NAME to a running federation. The aggregators serve it within seconds."""
    from consumers.create.add import add_expert
    from fedmoe.protocol.effect import without_effect
    from fedmoe.protocol.names import GATEWAY
    from fedmoe.protocol.rules import TRAIN_EXPERT
    from fedmoe.store.change import whole_expert
    from fedmoe.store.connection import Connection
    from fedmoe.store.expert import ExpertStore

    source = ctx.get_parameter_source("weight")
    if source is click.core.ParameterSource.COMMANDLINE:
        _check_has_weight(name)
    connection, wanted = Connection(redis), given(RuleSet, rules)
    if name == GATEWAY and "train" in wanted:
        _prepare_gateway(connection, name, wanted["train"])
    taken = add_expert(
        connection, name, like=like, gateway_weight=weight, settings=wanted, new_lineage=new_lineage
    )
    same = "base model and adapter" if name == GATEWAY else "base model, adapter and rules"
    click.echo(f"added {name}, with {same} of {taken}")
    if wanted:
        for sentence in without_effect(name, whole_expert(ExpertStore(connection, name))[0].rules, wanted):
            click.echo(sentence)
    if name == GATEWAY:
        if source is not click.core.ParameterSource.DEFAULT:
            click.echo(f"--weight {weight:g} of the environment or the configuration file is for other experts; {name} "
                       "has no weight")  # fmt: skip
        click.echo("let workers train it: fedmoe expert set EXPERT --train both")
        return
    _prepare_gateway(connection, name, wanted.get("train", TRAIN_EXPERT))
    click.echo(f"train it: fedmoe worker run --stream {name} --data FILE")
    if weight:
        _echo_fit(
            connection, f"and the merged gateway leaves {name} out until you fit again (fedmoe gateway fit)"
        )


@expert.command("weight")
@redis_options
@click.argument("name")
@click.argument("weight", type=float)
def set_weight(redis: RedisSettings, name: str, weight: float) -> None:
    """Set the WEIGHT of the expert NAME in the gateway; with 0 the gateway leaves it out."""
    from fedmoe.protocol.names import check_expert
    from fedmoe.store.change import set_gateway_weight
    from fedmoe.store.connection import Connection

    _check_has_weight(name)
    connection = Connection(redis)
    before = set_gateway_weight(connection, check_expert(name), weight)
    click.echo(f"{name}: gateway weight {printable(before) or 'none'} -> {weight:g}")
    if weight:  # a fit leaves out an expert of weight 0, too
        _echo_fit(connection, "and replaces this weight until `fedmoe gateway fit --remove`")


def _echo_fit(connection: "Connection", then: str) -> None:
    """After a weight was set: say what a fit of the merged gateway makes of it, if there is one."""
    from fedmoe.errors import SpecError
    from fedmoe.store.gateway import GatewayStore

    try:
        fit = GatewayStore(connection).fit_in_force()
    except SpecError as error:
        click.echo(f"the weight is set, but a fit is in force, which this FedMoE cannot read: {error}")
        return
    if fit:
        click.echo(f"a fit of {fit.day} is in force {then}")


def _check_has_weight(name: str) -> None:
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.names import GATEWAY

    if name == GATEWAY:
        raise SettingsError(
            f"{GATEWAY!r} has no weight, because the merged gateway is made of the other experts: name one of them",
            about="expert",
        )


@expert.command()
@redis_options
@click.option("--yes", is_flag=True, help="Remove the expert without asking.")
@click.argument("name")
def remove(redis: RedisSettings, yes: bool, name: str) -> None:
    """Remove the expert NAME for good, also while it is served and trained.

    Its aggregators stop serving it, its workers end, and the gateway is built without it. A backup can be restored
    later.
    """
    from fedmoe.errors import SettingsError
    from fedmoe.protocol.federation import no_gateway
    from fedmoe.protocol.names import GATEWAY, check_expert
    from fedmoe.store.connection import Connection
    from fedmoe.store.gateway import GatewayStore
    from fedmoe.store.remove import look_at_expert, remove_expert, sweep

    connection = Connection(redis)
    there = look_at_expert(connection, check_expert(name))
    served = f", served by {printable(there.lease)}" if there.lease else ""
    what = f"{name} (version {printable(there.version)}, workers running: {len(there.workers)}{served})"
    if not yes:
        if not sys.stdin.isatty():
            raise SettingsError(
                f"cannot ask whether to remove {what}, because stdin is not a terminal: give --yes",
                about="yes",
            )
        click.confirm(f"Remove {what} for good? (to keep a copy, run `fedmoe backup` first)", abort=True)
    remove_expert(connection, name)
    click.echo(f"removed {what}")
    if name == GATEWAY and (lacking := no_gateway(GatewayStore(connection).metas())):
        click.echo(lacking)
    until = time.monotonic() + NOTICE_S
    if there.workers:
        click.echo("waiting for its workers to end")
    left = there.workers
    while left and time.monotonic() < until:
        time.sleep(LOOK_EVERY_S)
        left = sweep(connection, name)
    if left:
        names = ", ".join(map(printable, left[:10]))
        click.echo(
            f"workers still running: {names}; each ends by itself at its next sync, you need not do anything"
        )
