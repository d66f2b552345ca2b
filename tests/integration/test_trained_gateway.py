"""The trained gateway: an expert like any other, beside the merged gateway, which has keys of its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import Result

import fedmoe
from consumers.create import SpecRequest, ensure_experts
from consumers.create import base_model as creating
from consumers.expert import Expert
from consumers.gateway.builder import GatewayBuilder
from consumers.verify import replay
from fedmoe.errors import LostExpertError, RedisUnavailableError, SettingsError, UnknownExpertError
from fedmoe.protocol.federation import findings
from fedmoe.protocol.layout import Layout
from fedmoe.protocol.names import GATEWAY, check_domain, domain_of, name_on_gateway
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.settings import GatewaySettings
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.store.remove import remove_expert
from tests.errors import raises
from tests.federation import ScriptedWorker, aggregating, first_meta, make_expert, meta_of, small_spec

Command = Callable[..., Result]


def load(connection: Connection, archive: Archive | None = None) -> Expert:
    """The trained gateway, as an aggregator retains it."""
    expert = Expert(ExpertStore(connection, GATEWAY), small_spec(), aggregator="test", archive=archive)
    expert.load()
    return expert


def test_switching_the_rule_creates_it(connection: Connection, expert_command: Command) -> None:
    """Of the expert's spec and pins, listed without weight in the merge; the rule itself stays the expert's."""
    like = make_expert(connection, "sql_expert", weights=torch.zeros(small_spec().layout.numel))
    done = expert_command("set", "sql_expert", "--train", "both", "--lr", "0.5")
    assert done.output == (
        "created the gateway like sql_expert, with gain 2 and balance domain\n"
        "sql_expert: rules 2 are in force: lr 1 -> 0.5, train expert -> both\n"
    )
    store = GatewayStore(connection)
    assert store.experts() == {"gateway": 0.0, "sql_expert": 1.0}
    gateway, expert = store.meta(GATEWAY), store.meta("sql_expert")
    assert (store.spec(GATEWAY), gateway.base_fingerprint) == (like.spec, expert.base_fingerprint)
    assert (gateway.rules.train, expert.rules.train) == ("expert", "both")
    defaults = replace(gateway.rules.aggregation, gain=1.0, balance="worker")
    assert defaults == replace(expert.rules.aggregation, lr=1.0)
    assert " train " not in expert_command("show", GATEWAY).output
    assert expert_command("set", "sql_expert", "--train", "gateway").output.startswith("sql_expert: rules 3")
    assert expert_command("set", "sql_expert", "--train", "expert").exit_code == 0
    assert store.meta(GATEWAY).lineage == gateway.lineage  # it stays when nobody trains it any more


def test_values_that_its_expert_has_stay(connection: Connection, expert_command: Command) -> None:
    """An operator chose another gain; and one given for the gateway itself wins."""
    make_expert(connection, "sql_expert", rules=aggregating(gain=3.0))
    assert expert_command("set", "sql_expert", "--train", "both").output.startswith(
        "created the gateway like sql_expert, with gain 3 and balance domain\n"
    )
    expert_command("remove", GATEWAY, "--yes")
    expert_command("add", GATEWAY, "--gain", "1", "--balance", "worker")
    rules = GatewayStore(connection).meta(GATEWAY).rules
    assert (rules.aggregation.gain, rules.aggregation.balance, rules.number) == (1.0, "worker", 1)


def test_it_is_decided_logged_replayed_and_exported_like_any_expert(
    connection: Connection, expert_command: Command, tmp_path: Path
) -> None:
    """Workers of two domains with one name each train it; the merge is built beside it and touches none of its keys."""
    begun = torch.zeros(small_spec().layout.numel)
    make_expert(connection, "sql_expert", weights=begun)
    make_expert(connection, "docs_expert", weights=begun)
    expert_command("set", "sql_expert", "--train", "both")
    archive = Archive(tmp_path / "kept")
    expert = load(connection, archive)
    for domain in ("sql_expert", "docs_expert"):
        worker = ScriptedWorker(connection, expert.spec, name_on_gateway(domain, "host"), expert=GATEWAY)
        worker.push(0.5)
        expert.process(expert.store.read(block_ms=1, count=9))
    builder = GatewayBuilder(connection, GatewaySettings(method="average"), holder="one", lease_s=5.0)
    before = meta_of(connection, GATEWAY)
    assert builder.refresh()
    assert meta_of(connection, GATEWAY) == before
    store = GatewayStore(connection)
    merged = store.merged()
    assert merged is not None
    assert set(merged.experts) == {"sql_expert", "docs_expert"}
    meta, _, lines = store.history(GATEWAY)
    assert sorted(domain_of(line["worker"]) for line in lines) == ["docs_expert", "sql_expert"]
    again = replay(expert.spec, meta, lines, archive)
    assert not again.problem
    assert torch.equal(again.weights.flat, expert.buffer.flat)
    reader = fedmoe.connect(connection.settings)
    assert reader.gateway().versions == {GATEWAY: 2}
    assert reader.gateway("merged").versions == {"docs_expert": 0, "sql_expert": 0}
    assert reader.gateway().weights().keys() == reader.expert(GATEWAY).weights().keys()
    view = reader.view()
    assert [one.name for one in view.experts] == ["docs_expert", "gateway", "sql_expert"]
    assert view.merged.present.keys() == {"docs_expert", "sql_expert"}
    assert not view.merged.outdated


def test_until_it_is_trained_the_merged_gateway_is_the_gateway(
    connection: Connection, expert_command: Command
) -> None:
    """At version 0 it knows nothing; asked for by name, it is given all the same."""
    make_expert(connection, "sql_expert", weights=torch.zeros(small_spec().layout.numel))
    reader = fedmoe.connect(connection.settings)
    with raises(UnknownExpertError, about="gateway"):
        reader.gateway("trained")
    expert_command("set", "sql_expert", "--train", "both")
    GatewayBuilder(connection, GatewaySettings(), holder="one", lease_s=5.0).refresh()
    assert reader.gateway().versions == {"sql_expert": 0}
    assert reader.gateway("trained").versions == {GATEWAY: 0}


def test_an_aggregator_creates_it_if_the_rules_in_force_need_it(
    connection: Connection,
    expert_command: Command,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without a look at the base model if the experts are there; not one that an operator removed."""
    spec = small_spec()
    described = {
        "base_config": spec.base_config, "layout": spec.layout.tensors, "towers": (), "reach": 1.0, "not_reached": "",
        "fingerprint": "f" * 32, "tokenizer": "",
    }  # fmt: skip
    request = SpecRequest(
        base_model="tiny", lora=spec.lora, rules=replace(RuleSet(), train="both"), wire_format="fp32"
    )
    monkeypatch.setitem(creating.described, request, described)
    assert ensure_experts(connection, {"sql_expert": 1.0}, request) == ["sql_expert", GATEWAY]
    store = GatewayStore(connection)
    assert store.experts() == {"gateway": 0.0, "sql_expert": 1.0}
    assert (store.meta("sql_expert").rules.train, store.meta(GATEWAY).rules.train) == ("both", "expert")
    monkeypatch.delitem(creating.described, request)
    assert ensure_experts(connection, {"sql_expert": 1.0}, request) == []
    remove_expert(connection, GATEWAY)
    assert ensure_experts(connection, {"sql_expert": 1.0}, SpecRequest()) == []
    assert "expert 'gateway' was removed by an operator" in caplog.text
    expert_command("set", "sql_expert", "--train", "expert")
    assert expert_command("set", "sql_expert", "--train", "both").output.startswith("created the gateway")


def test_full_redis_delays_its_creation(connection: Connection) -> None:
    """The aggregator's start is retried then, as for an expert; the gateway is not forgotten."""
    make_expert(connection, "sql_expert", rules=RuleSet(train="both"))
    connection.client.config_set("maxmemory", 1)
    try:
        with raises(RedisUnavailableError, about="maxmemory"):
            ensure_experts(connection, {}, SpecRequest())
    finally:
        connection.client.config_set("maxmemory", 0)
    assert ensure_experts(connection, {}, SpecRequest()) == [GATEWAY]


def test_lost_gateway_is_created_from_zero_with_the_command_that_is_named(
    connection: Connection, expert_command: Command
) -> None:
    """Every other command refuses, because an aggregator that retains it can still write it back."""
    make_expert(connection, "sql_expert")
    expert_command("set", "sql_expert", "--train", "both")
    keys = connection.keys.expert(GATEWAY)
    connection.client.delete(keys.meta, keys.spec, keys.weights, keys.packed, keys.decided)
    for words in (("add", GATEWAY), ("set", "sql_expert", "--train", "gateway")):
        done = expert_command(*words)
        assert isinstance(done.exception, LostExpertError)
        assert "(fedmoe expert add gateway --new-lineage)" in str(done.exception)
    assert expert_command("add", GATEWAY, "--new-lineage").exit_code == 0
    assert GatewayStore(connection).meta(GATEWAY).version == 0


def test_new_expert_takes_after_an_expert_of_a_domain(
    connection: Connection, expert_command: Command
) -> None:
    """Not after the gateway, though its name comes first."""
    make_expert(connection, "sql_expert")
    expert_command("set", "sql_expert", "--train", "both")
    assert "rules of sql_expert" in expert_command("add", "url_expert").output
    assert GatewayStore(connection).meta("url_expert").rules.train == "both"


@pytest.mark.parametrize("words", [("set", "a.b", "--train", "both"), ("add", "c.d", "--train", "both")])
def test_an_expert_whose_name_has_a_dot_cannot_train_it(
    connection: Connection, expert_command: Command, words: tuple[str, ...]
) -> None:
    """There its workers' names would not tell their expert."""
    make_expert(connection, "a.b")
    done = expert_command(*words)
    assert isinstance(done.exception, SettingsError)
    assert done.exception.about == "expert"
    assert set(GatewayStore(connection).experts()) == {"a.b"}


OTHER_BASE = {
    "config": (replace(small_spec(), base_config={"hidden_size": 16}), {}, "hidden_size (8, not 16)"),
    "weights": (small_spec(), {"base_fingerprint": "e" * 32}, "its weights (fingerprint "),
    "tokenizer": (small_spec(), {"tokenizer": "template:aa vocabulary:bb"}, "its vocabulary"),
}


@pytest.mark.parametrize(("spec", "pinned", "odd"), OTHER_BASE.values(), ids=OTHER_BASE.keys())
@pytest.mark.parametrize("command", ["set", "add"])
def test_experts_of_another_base_model_cannot_train_it(
    connection: Connection,
    expert_command: Command,
    spec: Spec,
    pinned: dict[str, str],
    odd: str,
    command: str,
) -> None:
    """One sentence, and nothing changes: its workers could only say so, one by one, and train their expert alone."""
    make_expert(connection, "sql_expert", tokenizer="vocabulary:aa special:cc")
    expert_command("set", "sql_expert", "--train", "both")
    make_expert(connection, "beta", spec, **pinned)
    store = GatewayStore(connection)
    before = {one: meta.commit for one, meta in store.metas().items()}
    words = ("set", "beta") if command == "set" else ("add", "gamma", "--like", "beta")
    done = expert_command(*words, "--train", "both")
    assert isinstance(done.exception, SettingsError)
    assert done.exception.about == "train"
    assert f"the gateway's base model differs in {odd}" in str(done.exception)
    assert {one: meta.commit for one, meta in store.metas().items()} == before
    assert expert_command(*words, "--train", "expert").exit_code == 0


def test_experts_with_other_targets_train_it(connection: Connection, expert_command: Command) -> None:
    """Their workers have an adapter for each of the two; what is not known of a base model yet does not differ."""
    make_expert(connection, "sql_expert", tokenizer="template:aa vocabulary:bb")
    expert_command("set", "sql_expert", "--train", "both")
    other = Layout.of([("base_model.model.layers.0.k_proj.lora_B.weight", (4, 2))])
    make_expert(connection, "beta", small_spec(layout=other), tokenizer="template:aa", base_fingerprint="")
    assert expert_command("set", "beta", "--train", "both").exit_code == 0


def test_rules_to_train_a_gateway_that_was_removed_are_told(
    connection: Connection, expert_command: Command
) -> None:
    """By the command that removes it, and by `fedmoe status` from then on, until a command that it names was given."""
    for name in ("red", "blue"):
        make_expert(connection, name)
        expert_command("set", name, "--train", "both")

    def told() -> list[str]:
        return [one for one in findings(Inspector(connection).federation()) if "by the rule train" in one]

    assert told() == []
    said = expert_command("remove", GATEWAY, "--yes").output.splitlines()[1]
    assert said == (
        "blue, red: by the rule train the workers train the gateway, but there is none: change the rule (fedmoe expert "
        "set NAME --train expert), or create a gateway (fedmoe expert add gateway)"
    )
    assert told() == [said]
    expert_command("set", "red", "--train", "expert")
    (one,) = told()
    assert one.startswith("blue: ")
    assert "(fedmoe expert set blue --train expert)" in one
    expert_command("add", GATEWAY)
    assert told() == []
    expert_command("set", "blue", "--train", "expert")
    assert len(expert_command("remove", GATEWAY, "--yes").output.splitlines()) == 1
    assert told() == []


def test_names_on_the_gateway() -> None:
    """Workers of two experts may share a name; the domain is what comes before the first dot."""
    assert name_on_gateway("sql_expert", "host.local") == "sql_expert.host.local"
    assert domain_of("sql_expert.host.local") == "sql_expert"
    with raises(SettingsError, about="name"):
        name_on_gateway("e" * 40, "w" * 40)
    with raises(SettingsError, about="expert"):
        check_domain(GATEWAY)


def test_worker_and_aggregator_name_experts_of_domains_only(
    connection: Connection, expert_command: Command
) -> None:
    """The gateway has no weight in the merge, and no worker of its own."""
    make_expert(connection, "sql_expert")
    ExpertStore(connection, GATEWAY).create(
        small_spec(), first_meta(small_spec()), bytes(8), gateway_weight=0.0
    )
    done = expert_command("weight", GATEWAY, "1")
    assert isinstance(done.exception, SettingsError)
    assert done.exception.about == "expert"


def test_domains_count_the_same_whatever_the_number_of_their_workers(
    connection: Connection, expert_command: Command, tmp_path: Path
) -> None:
    """Three workers of one, one of another: in the log with their weights, and it replays over the change of rules."""
    make_expert(connection, "sql_expert", weights=torch.zeros(small_spec().layout.numel))
    expert_command("set", "sql_expert", "--train", "both")
    archive = Archive(tmp_path / "kept")
    expert = load(connection, archive)
    names = ("sql_expert.a", "sql_expert.b", "sql_expert.c", "docs_expert.a")
    workers = [ScriptedWorker(connection, expert.spec, name, expert=GATEWAY) for name in names]

    def push_all() -> None:
        for worker in workers:
            worker.push(0.5)
        expert.process(expert.store.read(block_ms=1, count=9))
        for worker in workers:
            worker.pull()

    push_all()
    assert expert_command("set", GATEWAY, "--balance", "domain", "--gain", "2").exit_code == 0
    expert = load(connection, archive)
    push_all()
    meta, _, lines = GatewayStore(connection).history(GATEWAY)
    of = [
        (line["worker"], line.get("weight", "1"), float(line["factor"]))
        for line in lines
        if "ended" not in line
    ][4:]
    # 4 workers of 2 domains: 4/(2·3) each of the three, 4/(2·1) the one; staleness 0 to 3, gain 2, at most 1
    assert [round(float(weight), 3) for _, weight, _ in of] == [0.667, 0.667, 0.667, 2.0]
    assert [factor for _, _, factor in of] == pytest.approx([1.0, 2 / 3, 4 / 9, 1.0])
    again = replay(expert.spec, meta, lines, archive)
    assert not again.problem
    assert torch.equal(again.weights.flat, expert.buffer.flat)
