"""`fedmoe gateway fit` and `fedmoe gateway show`: the aggregator builds by the fit, and says what it leaves out."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consumers.gateway.builder import GatewayBuilder
from consumers.gateway.fit import fit_gateway
from consumers.gateway.inputs import as_input, read_inputs
from consumers.gateway.merge import merge
from fedmoe.errors import (
    BaseModelError,
    DataError,
    FedMoEError,
    RedisUnavailableError,
    SpecError,
    UnknownExpertError,
)
from fedmoe.protocol.fit import Fit, weights_text
from fedmoe.protocol.layout import values_of
from fedmoe.settings import FitSettings, GatewaySettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.inspect import Inspector
from fedmoe.tools.card import card
from fedmoe.tools.export import read_gateway
from tests.errors import raises
from tests.integration.test_evaluate_cli import make_federation, run, write_rows
from tests.processes import fedmoe_here
from tests.tiny import save_tiny_model

pytestmark = pytest.mark.one_server
WEIGHTS = {"red": (0.75,), "blue": (1.5,)}


def builder(connection: Connection, **settings: object) -> GatewayBuilder:
    wanted = replace(GatewaySettings(), **settings)
    return GatewayBuilder(connection, wanted, holder="agg-1", lease_s=5.0)


def fit(connection: Connection, *data: str, said: list[str] | None = None, **settings: object) -> Fit:
    wanted = replace(FitSettings(data=data, precision="fp32", max_passes=4), **settings)
    return fit_gateway(GatewayStore(connection), wanted, report=[].append if said is None else said.append)


def by_hand(store: GatewayStore, **weights: float) -> torch.Tensor:
    """The values of Σ wᵢ ΔWᵢ as `cat` lays them out."""
    experts = [
        replace(as_input(store.spec(n), store.read(n)[1]), weight=w) for n, w in sorted(weights.items())
    ]
    return merge(experts, scale=None).flat


def merged_values(store: GatewayStore) -> torch.Tensor:
    loaded = store.load_merged()
    assert loaded is not None
    config = loaded[0].config
    shape = merge([as_input(store.spec("red"), store.read("red")[1])] * (config["r"] // 4), scale=None)
    return values_of(shape.layout, loaded[1])


def written(store: GatewayStore, weights: dict[str, tuple[float, ...]] = WEIGHTS, **changes: object) -> Fit:
    """A fit of the present experts with these weights, as `fedmoe gateway fit` writes it."""
    metas = {name: store.meta(name) for name in weights}
    fitted_on = {
        n: {"version": m.version, "weights_commit": m.weights_commit, "lineage": m.lineage}
        for n, m in metas.items()
    }
    made = Fit(weights=weights_text(weights), fitted_on=json.dumps(fitted_on), loss=1.5, fitted_at=1.5)
    store.write_fit(made := replace(made, **changes))
    return made


def test_a_fit_is_written_and_built_by(connection: Connection, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The command prints losses and weights; status and show name the fit; --remove gives it up."""
    make_federation(connection, tiny_model_dir)
    rows = write_rows(tmp_path / "pooled.jsonl", "red red")
    common = ("--redis", connection.settings.url)
    wanted = ("gateway", "fit", *common, "--data", str(rows), "--max-passes", "3", "--device", "cpu")
    done = fedmoe_here(*wanted)
    assert done.returncode == 0, done.stderr
    store = GatewayStore(connection)
    found = store.fit()
    assert found is not None
    assert found.loss is not None
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"fitted: loss {found.loss:.4f} (base ")
    assert second == "weights: " + ", ".join(f"{n} {w[0]:.3g}" for n, w in found.by_expert.items())
    assert third.startswith("written")
    assert found.rows["pooled"].rows == 6
    assert {"base", "scale 1", "scale 1.8", "present weights"} <= found.losses_before.keys()
    assert found.loss <= min(v for name, v in found.losses_before.items() if name != "base")
    assert {name: one.version for name, one in found.experts.items()} == {"red": 3, "blue": 4}
    said: list[str] = []
    for file in (rows, write_rows(tmp_path / "red.test.jsonl", "red", n_rows=2)):
        run(connection, f"red={file}", said=said)
    assert [line.partition(":")[0] for line in said if "fitted on" in line] == [str(rows)]
    build = builder(connection, scale=1.8)
    assert build.refresh()
    assert not build.refresh()
    weights = {name: one[0] for name, one in found.by_expert.items()}
    assert torch.allclose(merged_values(store), by_hand(store, **weights), atol=1e-6)
    merged = Inspector(connection).federation().merged
    assert merged.fit is not None
    assert merged.fit.is_used
    assert merged.weights == found.by_expert
    in_card = (
        f"The weights were fitted on 6 rows of pooled. Loss on them: {found.loss:.4f} (before the fit: base "
    )
    assert in_card in card(read_gateway(store))
    shown = fedmoe_here("gateway", "show", *common).stdout
    assert "merged gateway: cat, rank 8, weights by the fit, built from blue v4, red v3" in shown
    assert "fitted on blue v4, red v3; the weights also hold for later versions" in shown
    assert fedmoe_here("gateway", "fit", *common, "--remove").stdout == "the fit is given up\n"
    assert fedmoe_here("gateway", "fit", *common, "--remove").stdout == "there was no fit\n"
    assert json.loads(fedmoe_here("gateway", "fit", *common, "--remove", "--json").stdout) == {
        "removed": False
    }
    assert build.refresh()
    assert torch.allclose(merged_values(store), by_hand(store, red=0.9, blue=0.9), atol=1e-6)
    assert Inspector(connection).federation().merged.fit is None
    done = fedmoe_here(*wanted, "--json")
    assert json.loads(done.stdout)["rows"] == {"pooled": 6}


def test_what_was_found_is_said_if_it_cannot_be_written(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """A search may take hours, and at its end Redis may be a replica, lack a right, or be away."""
    make_federation(connection, tiny_model_dir)
    rows = write_rows(tmp_path / "pooled.jsonl", "red red")
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        connection.client.config_set("min-replicas-to-write", 1)

    try:
        with pytest.raises(FedMoEError):
            fit_gateway(
                GatewayStore(connection),
                FitSettings(data=(str(rows),), precision="fp32", max_passes=1),
                report=report,
            )
    finally:
        connection.client.config_set("min-replicas-to-write", 0)
    assert said[-1].startswith("found, but not written: loss ")
    assert "weights blue " in said[-1]


@pytest.mark.parametrize("why", ["rights", "replica"])
def test_who_may_not_write_is_told_before_the_search(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path, why: str
) -> None:
    """Nothing is loaded, and the present fit stays."""
    make_federation(connection, tiny_model_dir)
    before, client, said = written(GatewayStore(connection)), connection.client, list[str]()
    rows = write_rows(tmp_path / "pooled.jsonl", "red red")
    reader = connection
    if why == "rights":
        client.acl_setuser(
            "reader", enabled=True, passwords=["+x"], keys=["*"], categories=["+@all"], commands=["-hset"]
        )
        url = connection.settings.url.replace("://", "://reader:x@", 1)
        reader = Connection(replace(connection.settings, url=url))
    else:
        client.replicaof("127.0.0.1", "1")
    try:
        with raises(RedisUnavailableError, about=why):
            fit(reader, str(rows), said=said)
    finally:
        client.replicaof("NO", "ONE")
        client.acl_deluser("reader")
        reader.close()
    assert said == []
    assert GatewayStore(connection).fit() == before


def test_every_method_has_its_error(connection: Connection, tiny_model_dir: Path) -> None:
    """Of the method in use and of all others; cat is called exact, and nothing is called truncated."""
    make_federation(connection, tiny_model_dir)
    build = builder(connection, method="average")
    assert build.refresh()
    done = fedmoe_here("gateway", "show", "--redis", connection.settings.url)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[lines.index("") + 2 :]}
    assert table.keys() == {"cat", "svd", "average", "ties", "dare"}
    assert table["cat"] == ["8", "exact"]
    errors = {name: float(cells[-1].rstrip("%")) for name, cells in table.items() if name != "cat"}
    assert 0 < errors["svd"] < errors["average"] < errors["dare"]
    assert f"average: relative error {errors['average']:.1f}%" in lines
    assert "truncated" not in done.stdout
    merged = GatewayStore(connection).merged()
    assert merged is not None
    assert merged.relative_error == pytest.approx(errors["average"] / 100, abs=6e-4)
    done = fedmoe_here("gateway", "show", "--redis", connection.settings.url, "--no-compare")
    assert done.stdout.splitlines()[-1] == f"average: relative error {errors['average']:.1f}%"
    done = fedmoe_here("gateway", "show", "--redis", connection.settings.url, "--json")
    content = json.loads(done.stdout)
    assert content["merged"]["weights"] == {"blue": [0.5], "red": [0.5]}
    assert {one["method"] for one in content["methods"]} == table.keys()


def test_weights_hold_when_an_expert_moves(connection: Connection, tiny_model_dir: Path) -> None:
    """Show names the version that they were fitted on."""
    make_federation(connection, tiny_model_dir)
    store = GatewayStore(connection)
    written(store)
    connection.client.hset(connection.keys.expert("red").meta, "version", "9")
    assert builder(connection).refresh()
    merged = Inspector(connection).federation().merged
    assert merged.weights == WEIGHTS
    assert list(merged.findings()) == []
    shown = fedmoe_here("gateway", "show", "--redis", connection.settings.url, "--no-compare").stdout
    assert "fitted on red v3 (now v9), blue v4;" in shown


def test_what_the_fit_does_not_name_is_left_out_and_said(
    connection: Connection, tiny_model_dir: Path
) -> None:
    """A new expert, one that was created anew, and one of gateway weight 0."""
    make_federation(connection, tiny_model_dir, ("red", "blue", "green"))
    store = GatewayStore(connection)
    written(store)
    assert builder(connection).refresh()
    assert torch.equal(merged_values(store), by_hand(store, red=0.75, blue=1.5))
    merged = Inspector(connection).federation().merged
    assert merged.fit is not None
    assert (merged.fit.missing, merged.fit.strange) == (("green",), ())
    assert "leaves out green, because its fit does not name them" in next(merged.findings())
    text = card(read_gateway(store))
    assert "The weights were fitted on validation rows. Loss on them: 1.5000." in text
    assert re.search(r"\| blue \| 4 \| `\w+` \| 1.5 \|", text)
    assert "| green |" not in text
    connection.client.hset(connection.keys.expert("red").meta, "lineage", "e" * 16)
    connection.client.delete(connection.keys.merged.meta)
    assert builder(connection).refresh()
    assert torch.equal(merged_values(store), by_hand(store, blue=1.5))
    merged = Inspector(connection).federation().merged
    assert merged.fit is not None
    assert (merged.fit.missing, merged.fit.strange) == (("green", "red"), ("red",))
    assert len(list(merged.findings())) == 2
    connection.client.hset(connection.keys.experts, mapping={"green": "0", "red": "0"})
    assert builder(connection).refresh()
    assert Inspector(connection).federation().merged.weights == {"blue": (1.5,)}
    connection.client.hset(connection.keys.experts, "blue", "0")
    with raises(SpecError, about="gateway_weight"):
        builder(connection).refresh()


def test_weights_in_groups_of_layers_are_built(connection: Connection, tiny_model_dir: Path) -> None:
    """The tiny model has two layers."""
    make_federation(connection, tiny_model_dir)
    store = GatewayStore(connection)
    written(store, {"red": (1.0, 0.0), "blue": (0.0, 0.5)})
    assert builder(connection).refresh()
    loaded = store.load_merged()
    assert loaded is not None
    spec, flat = store.spec("red"), merged_values(store)
    layout = merge([as_input(spec, store.read("red")[1])] * 2, scale=None).layout
    for name, values in layout.views(flat).items():
        if name.endswith("lora_B.weight"):
            blue, red = values[:, :4], values[:, 4:]
            is_first = ".layers.0." in name
            assert (bool(red.any()), bool(blue.any())) == (is_first, not is_first), name


def test_a_fit_that_redis_lost_is_put_back(connection: Connection, tiny_model_dir: Path) -> None:
    """Not one that an operator gave up."""
    make_federation(connection, tiny_model_dir)
    store = GatewayStore(connection)
    made = written(store)
    build = builder(connection)
    build.refresh()
    connection.client.delete(connection.keys.merged.fit)
    assert not build.refresh()
    assert store.fit() == made
    assert not store.put_back_fit(replace(made, loss=9.0))
    assert store.fit() == made
    store.write_fit(Fit(fitted_at=2.5))
    assert build.refresh()
    connection.client.delete(connection.keys.merged.fit)
    build.refresh()
    found = store.fit()
    assert found is not None
    assert found.by_expert == {}


@pytest.mark.parametrize("weights", ['{"red": [0], "blue": [0]}', '{"red": [-1]}', '{"red": 1}', "x"])
def test_weights_that_do_not_sum_are_one_sentence(
    connection: Connection, tiny_model_dir: Path, weights: str
) -> None:
    """Whoever wrote them; the gateway that was built stays."""
    make_federation(connection, tiny_model_dir)
    store = GatewayStore(connection)
    before = store.load_merged()
    connection.client.hset(connection.keys.merged.fit, "weights", weights)
    with raises(SpecError, about="fit" if weights in ('{"red": 1}', "x") else "weights") as caught:
        builder(connection).refresh()
    reason = str(caught.value)
    assert store.load_merged() == before
    for is_said in (False, True):  # by the aggregator, too
        if is_said:
            store.complain(reason)
        for command in (("gateway", "show"), ("status",)):
            done = fedmoe_here(*command, "--redis", connection.settings.url)
            assert done.returncode == 0
            assert sum("fedmoe gateway fit" in line for line in done.stdout.splitlines()) == 1


def test_nothing_is_written_if_it_cannot_be_fitted(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """No expert yet, another base model, experts that were not trained, no data, and both of two options."""
    rows = str(write_rows(tmp_path / "rows.jsonl", "red red"))
    with raises(UnknownExpertError, about="experts"):
        fit(connection, rows)
    make_federation(connection, tiny_model_dir)
    with raises(BaseModelError, about="fingerprint"):
        fit(connection, rows, base_model=str(save_tiny_model(tmp_path / "other", seed=1)))
    with raises(DataError, about="data"):
        fit(connection, str(tmp_path))
    for more in ((), ("--remove", "--data", rows), ("--remove", "--rows", "3", "--layer-groups", "2")):
        done = fedmoe_here("gateway", "fit", "--redis", connection.settings.url, *more)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    for name in ("red", "blue"):
        connection.client.hset(connection.keys.expert(name).meta, "version", "0")
    with raises(UnknownExpertError, about="experts"):
        fit(connection, rows)
    assert GatewayStore(connection).fit() is None


def test_an_expert_without_validation_rows_is_said(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_federation(connection, tiny_model_dir)
    rows = write_rows(tmp_path / "rows.jsonl", "red", n_rows=2)
    for data, silent in ((f"red={rows}", {"blue"}), (str(rows), set()), (f"blue={rows}", {"red"})):
        said: list[str] = []
        fit(connection, data, said=said, max_passes=1)
        assert {line.split()[4] for line in said if line.startswith("no validation rows of")} == silent


def test_experts_without_weight_or_training_are_left_out(
    connection: Connection, tiny_model_dir: Path, tmp_path: Path
) -> None:
    make_federation(connection, tiny_model_dir, ("gateway", "red", "blue", "green"))
    connection.client.hset(connection.keys.experts, "blue", "0")
    connection.client.hset(connection.keys.expert("green").meta, "version", "0")
    assert fit(connection, str(write_rows(tmp_path / "x.jsonl", "red"))).by_expert.keys() == {"red"}
    builder(connection).refresh()
    export = read_gateway(GatewayStore(connection), "merged")
    assert export.weights.keys() == {"red"}  # the card has them, of a fit too
    assert export.config["r"] == 4
    store = GatewayStore(connection)
    with pytest.raises(SpecError, match="every expert's gateway weight is 0"):
        read_inputs(store, dict.fromkeys(("red", "blue", "green"), 0.0), GatewaySettings(), store.fit())
