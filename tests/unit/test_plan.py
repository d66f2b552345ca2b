"""The formula of `fedmoe plan`, and its command; tests/e2e/test_plan.py compares it with a real federation."""

import json
import socket
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedmoe.errors import SettingsError
from fedmoe.protocol.codec import part_lengths
from fedmoe.protocol.plan import (
    FILE_HEADER_BYTES,
    HEADER_BYTES,
    KEPT_BYTES,
    KEPT_S,
    LOG_LINES,
    PARTS,
    Shape,
    allocated,
    terms,
    total,
)
from fedmoe.settings import GatewaySettings, IdentitySettings
from fedmoe.store.expert import LOG_LENGTH
from fedmoe.tools.plan import PlanSettings, shape_of
from fedmoe.util.setting import declared
from producers.ledger import Ledger
from tests.errors import raises
from tests.processes import fedmoe, fedmoe_here

MILLION = Shape(
    values=1_000_000, experts=3, trained_gateway=False, memberships=6, wire_format="fp32", sync_interval_s=2.0,
    has_server_state=False, is_cat=True, gateway_interval_s=5.0, keep=7,
)  # fmt: skip
W = 4_000_000 + FILE_HEADER_BYTES
U = sum(part_lengths(1_000_000, "fp32")) + HEADER_BYTES


def amounts(shape: Shape) -> dict[str, float]:
    return {f"{term.part} {term.name}": term.amount for term in terms(shape)}


def test_terms_are_what_their_formulas_say() -> None:
    """By hand, for one federation: 6 updates in 2 s, of 4 MB each."""
    found = amounts(MILLION)
    assert found["in updates, from workers"] == 3.0 * U
    assert found["in commits, from the aggregator"] == 3.0 * W
    assert found["in merged gateway, from the aggregator"] == 0.2 * 3 * W
    assert found["out pulls, to workers"] == 3.0 * W
    assert found["disk backups"] == 8 * 3 * W
    assert found["disk workers: checkpoints, old and new"] == 2 * 6 * (3 * W + W)
    assert total(terms(MILLION), "in") == 3.0 * (U + W) + 0.6 * W


def test_a_commit_with_a_tail_writes_packed_weights_and_seldom_the_exact_ones() -> None:
    """By hand: the tail is full after twice the weights in updates. Redis itself copies the update into it."""
    packed = sum(part_lengths(1_000_000, "int8"))
    found = amounts(replace(MILLION, wire_format="int8"))
    assert found["in commits, from the aggregator"] == pytest.approx(
        3.0 * (packed + (packed + HEADER_BYTES) / 2)
    )


def test_what_a_choice_adds() -> None:
    """A server optimizer, a trained gateway, another merge, another format: more or less in the right places."""
    plain = amounts(MILLION)
    with_state = amounts(replace(MILLION, has_server_state=True))
    assert with_state["in commits, from the aggregator"] == 2 * plain["in commits, from the aggregator"]
    assert with_state["disk backups"] == 2 * plain["disk backups"]
    with_gateway = amounts(replace(MILLION, trained_gateway=True))
    assert with_gateway["memory weights"] * 3 == 4 * plain["memory weights"]
    assert with_gateway["memory merged gateway"] == plain["memory merged gateway"]
    small = amounts(replace(MILLION, is_cat=False))
    assert (
        small["in merged gateway, from the aggregator"] * 3 == plain["in merged gateway, from the aggregator"]
    )
    int4 = amounts(replace(MILLION, wire_format="int4"))
    assert int4["out pulls, to workers"] < 0.14 * plain["out pulls, to workers"]
    assert (plain["memory packed weights"], int4["memory packed weights"] > 0) == (0, True)


def test_weights_in_parts_lie_in_redis_twice_while_they_are_written() -> None:
    """Above 512 MiB, and the merged gateway with them; each part is one size of the allocator."""
    large = replace(MILLION, values=217_000_000, has_server_state=True)
    found, weights = amounts(large), 13 * 64 * 2**20
    assert 0.97 * weights < found["memory weights"] / 3 <= weights
    once = found["memory weights"] + found["memory server state"] + found["memory merged gateway"]
    assert found["memory parts, while written again"] == once
    assert "memory parts, while written again" not in amounts(replace(MILLION, has_server_state=True))


def test_a_worker_keeps_no_more_than_its_bound() -> None:
    """Of the updates of a minute, 256 MiB; but always the last one."""
    name = "disk workers: updates of the last minute"
    assert amounts(MILLION)[name] == pytest.approx(6 * 31 * U)
    often = replace(MILLION, sync_interval_s=0.1)
    assert amounts(often)[name] == 6 * (U + KEPT_BYTES)
    assert amounts(replace(MILLION, sync_interval_s=600.0))[name] == 6 * 2 * U
    defaults = {one.name: one.default for one in fields(Ledger)}
    assert (defaults["keep_decided_s"], defaults["keep_decided_bytes"]) == (KEPT_S, KEPT_BYTES)
    assert LOG_LINES == LOG_LENGTH


@pytest.mark.parametrize(
    ("n_bytes", "memory"),
    [
        (100, 100),
        (2**20, 2**20),
        (2**20 + 1, 5 * 2**18),
        (5 * 2**18, 5 * 2**18),
        (7 * 2**18 + 1, 2**21),
        (0, 0),
    ],
)
def test_the_allocator_has_four_sizes_in_each_doubling(n_bytes: int, memory: int) -> None:
    """As jemalloc has them."""
    assert allocated(n_bytes) == memory


def test_defaults_are_those_of_a_federation() -> None:
    """What is not typed is as the aggregator would create it."""
    planned = {one.name: one.default for one in declared(PlanSettings)}
    for owner in (IdentitySettings, GatewaySettings):
        for one in declared(owner):
            if one.name in planned:
                assert planned[one.name] == one.default, one.name
    assert {"rank", "wire_format", "base_model", "gateway_method", "gateway_interval"} <= planned.keys()


def test_the_config_of_the_base_model_is_enough(tiny_model_dir: Path, tmp_path: Path) -> None:
    """No weights: rank 4 on all linear layers of the tiny model."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    both = PlanSettings(base_model=str(place), rank=4, train="both", workers=5)
    shape = shape_of(both)
    assert (shape.values, shape.memberships, shape.trained_gateway) == (4 * 2048, 10, True)
    with raises(SettingsError, about="targets"):
        shape_of(replace(both, targets=("no_proj",)))


def test_the_command_prints_a_table_or_json(tmp_path: Path) -> None:
    """The sums of both agree; nonsense is one sentence."""
    table = fedmoe_here("plan", "--values", "8798208", "--experts", "5", "--workers", "40")
    assert table.returncode == 0
    assert max(map(len, table.stdout.splitlines())) <= 120
    content = json.loads(fedmoe_here("plan", "--values", "1000000", "--json").stdout)
    assert set(PARTS) <= content.keys()
    assert content["together"]["memory"] == pytest.approx(sum(content["memory"].values()), abs=9)
    assert content["maxmemory"] == 2 * content["together"]["memory"]
    for words in (
        ["--base-model", str(tmp_path)],
        ["--values", "-1"],
        ["--values", "5", "--sync-interval", "0"],
    ):
        wrong = fedmoe_here("plan", *words)
        assert (wrong.returncode > 0, wrong.stderr.count("\n")) == (True, 1), wrong.stderr


def test_a_hub_that_cannot_be_reached_is_named_at_once(tmp_path: Path) -> None:
    """Its library retries for half a minute; nobody waits that long for an estimate."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        hub = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = fedmoe("plan", HF_ENDPOINT=hub, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0")
    assert done.returncode != 0
    assert "--values" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr  # none of the library's own, which names each retry
