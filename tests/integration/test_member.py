"""`fedmoe.join`: a training loop of one's own as a worker, on a real Redis and a tiny model."""

import json
import logging
from array import array
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import fedmoe
from fedmoe.data.encode import Answer, Example
from fedmoe.errors import BaseModelError, RemovedExpertError, SettingsError, UnknownExpertError
from fedmoe.model.adapter import adapter_layout
from fedmoe.model.base import fingerprint, structure
from fedmoe.model.hidden import prompt_states
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.lora import LoraSettings
from fedmoe.protocol.names import GATEWAY
from fedmoe.protocol.rules import AggregationRules, RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.vectors import DomainVector
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.remove import remove_expert
from tests.errors import raises
from tests.federation import make_expert, serving
from tests.processes import eventually
from tests.tiny import tiny_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]
LORA = LoraSettings(rank=2, alpha=4.0)
RULES = RuleSet(aggregation=AggregationRules(max_norm=1e4), sync_interval_s=0.1)
NAME = "sql_expert"


def tiny_spec(wire_format: str = "fp32") -> Spec:
    config = tiny_config()
    return Spec(
        base_model="tiny", base_config=structure(config), layout=adapter_layout(config, LORA), lora=LORA,
        wire_format=wire_format,
    )  # fmt: skip


def make_tiny(connection: Connection, name: str = NAME) -> None:
    """An expert of the tiny model whose weights are small and not zero."""
    spec = tiny_spec()
    weights = torch.linspace(-0.01, 0.01, spec.layout.numel, dtype=torch.float32)
    make_expert(connection, name, spec, weights, base_fingerprint=fingerprint(tiny_model()), rules=RULES)


def adapted(connection: Connection, *, seed: int = 0, expert: str = NAME) -> PeftModel:
    config = fedmoe.connect(connection.settings).expert(expert).lora_config()
    return get_peft_model(tiny_model(seed=seed), config)


def train(member: fedmoe.Member, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for number in range(steps):
        ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(number))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        member.step(n_examples=2, n_tokens=22, loss=loss.item())


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def values(model: PeftModel, spec: Spec) -> torch.Tensor:
    """The adapter's values in the order of the layout."""
    named = {name.replace(".default.", "."): p.detach().flatten() for name, p in model.named_parameters()}
    return torch.cat([named[name] for name, _ in spec.layout.tensors])


def weights_in_redis(connection: Connection, name: str = NAME) -> torch.Tensor:
    return values_of(tiny_spec().layout, GatewayStore(connection).read(name)[1])


def test_what_a_loop_trains_becomes_the_expert(connection: Connection, connect: Connect) -> None:
    """It begins at the expert's weights; at the end expert and adapter are the same, and every row counts once."""
    make_tiny(connection)
    model = adapted(connection)
    begin = weights_in_redis(connection)
    with (
        serving(connect(), block_ms=20),
        fedmoe.join(connection.settings, {NAME: model}, name="own") as member,
    ):
        assert torch.equal(values(model, tiny_spec()), begin)
        train(member, model, adam(model), 20)
        assert member.position == 40
    meta = GatewayStore(connection).meta(NAME)
    assert meta.n_examples == 40
    assert meta.refused == 0
    assert member.status[NAME].applied == meta.version
    assert torch.allclose(values(model, tiny_spec()), weights_in_redis(connection), atol=1e-7)
    assert not torch.allclose(weights_in_redis(connection), begin, atol=1e-4)


def test_the_default_dtype_of_a_loop_changes_nothing(connection: Connection, of_bf16: None) -> None:
    """The adapter begins at the expert's weights, to the bit, and stays fp32."""
    make_tiny(connection)
    model, begin = adapted(connection), weights_in_redis(connection)
    with fedmoe.join(connection.settings, {NAME: model}, name="own"):
        found = values(model, tiny_spec())
    assert found.dtype == torch.float32
    assert torch.equal(found, begin)


def test_prompts_become_the_domain_vector(connection: Connection, connect: Connect, tmp_path: Path) -> None:
    """It is the base model's, whatever the adapter holds; the model stays in train mode; a restart draws no noise."""
    make_tiny(connection)
    prompts = [[1, 2, 3], [7, 8, 9, 10], [5]]
    rows = [Example(array("i", one), (Answer(len(one), len(one), 1.0),)) for one in prompts]
    mean = prompt_states(tiny_model(), rows, pad_id=0, device=torch.device("cpu")).mean(0)
    for name, noise in (("quiet", 0.0), ("noisy", 3.0), ("noisy", 3.0)):
        model = adapted(connection).train()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.constant_(parameter, 0.5)
        with (
            serving(connect(), block_ms=20),
            fedmoe.join(
                connection.settings, {NAME: model}, name=name, prompts=prompts, vector_noise=noise,
                state_dir=tmp_path / name,
            ) as member,
        ):  # fmt: skip
            assert all(module.training for module in model.modules())
            train(member, model, adam(model), 1)
        if name == "noisy":
            noisy = DomainVector.from_json(GatewayStore(connection).vectors(NAME)["noisy"].decode())
            kept = json.loads((tmp_path / name / "vector.json").read_text())["vector"]
            assert noisy == DomainVector.from_json(kept)
    vectors = {
        name: DomainVector.from_json(text.decode()).tensor()
        for name, text in GatewayStore(connection).vectors(NAME).items()
    }
    assert torch.allclose(vectors["quiet"], mean, atol=0.01)
    assert not torch.allclose(vectors["noisy"], mean, atol=0.1)


@pytest.mark.parametrize("prompts", [[[]], [1, 2], [["a"]], ["ab"]])
def test_prompts_that_are_no_tokens_are_one_sentence(
    connection: Connection, prompts: list[list[int]]
) -> None:
    make_tiny(connection)
    with raises(SettingsError, about="prompts"):
        fedmoe.join(connection.settings, {NAME: adapted(connection)}, name="own", prompts=prompts)


def test_two_loops_learn_from_each_other(connection: Connection, connect: Connect) -> None:
    """What one has trained is in the other's adapter, between two of its steps."""
    make_tiny(connection)
    models = [adapted(connection) for _ in range(2)]
    with serving(connect(), block_ms=20):
        ann, ben = (
            fedmoe.join(connection.settings, {NAME: model}, name=name)
            for name, model in zip(("ann", "ben"), models, strict=True)
        )
        with ann, ben:
            train(ann, models[0], adam(models[0], 1e-2), 10)

            def is_applied() -> int:
                ann.step(n_examples=0)  # a copy is made at a boundary
                return GatewayStore(connection).meta(NAME).version

            eventually("ann's update", is_applied)
            before = values(models[1], tiny_spec())

            def has_moved() -> bool:
                ben.step(n_examples=0)  # nothing was trained: what moves came from elsewhere
                return bool((values(models[1], tiny_spec()) - before).norm() > 0.01)

            eventually("ben to learn", has_moved)
    assert GatewayStore(connection).meta(NAME).n_examples == 20


def test_restart_goes_on_with_optimizer_and_position(
    connection: Connection, connect: Connect, tmp_path: Path
) -> None:
    """A loop that fails: the next process begins where it was; with other data, not at its position."""
    make_tiny(connection)
    model = adapted(connection)
    optimizer = adam(model)
    with serving(connect(), block_ms=20):
        with (
            suppress(ZeroDivisionError),
            fedmoe.join(
                connection.settings,
                {NAME: model},
                name="own",
                state_dir=tmp_path,
                optimizer=optimizer,
                data="d",
            ) as member,
        ):
            train(member, model, optimizer, 7)
            raise ZeroDivisionError
        (left,) = fedmoe.connect(connection.settings).view().experts[0].left
        assert (left.name, left.how) == ("own", "failed")
        again = adapted(connection)
        restored = adam(again)
        with fedmoe.join(
            connection.settings, {NAME: again}, state_dir=tmp_path, optimizer=restored, data="d"
        ) as member:
            assert member.position == 14
            moments = [state["exp_avg"] for state in optimizer.state.values()]
            assert moments
            for mine, theirs in zip(restored.state.values(), moments, strict=True):
                assert torch.equal(mine["exp_avg"], theirs)
            assert torch.allclose(values(again, tiny_spec()), values(model, tiny_spec()), atol=1e-7)
            train(member, again, restored, 1)
        with fedmoe.join(connection.settings, {NAME: again}, state_dir=tmp_path, data="other") as member:
            assert member.position == 0
    assert GatewayStore(connection).meta(NAME).n_examples == 16


def test_two_experts_in_one_loop(connection: Connection, connect: Connect, tmp_path: Path) -> None:
    """One call a step; each expert gets what its own adapter learned, and has a checkpoint of its own."""
    for name in ("one", "two"):
        make_tiny(connection, name)
    models = {name: adapted(connection, expert=name) for name in ("one", "two")}
    with (
        serving(connect(), expert="one", block_ms=20),
        serving(connect(), expert="two", block_ms=20),
        fedmoe.join(connection.settings, models, name="own", state_dir=tmp_path) as member,
    ):
        train(member, models["one"], adam(models["one"], 1e-2), 5)
    for name, model in models.items():
        assert GatewayStore(connection).meta(name).n_examples == 10
        assert torch.allclose(values(model, tiny_spec()), weights_in_redis(connection, name), atol=1e-7)
        assert (tmp_path / name / "worker.safetensors").exists()
    assert not torch.allclose(
        weights_in_redis(connection, "one"), weights_in_redis(connection, "two"), atol=1e-3
    )


def full(connection: Connection) -> nn.Module:
    return tiny_model()


def other_rank(connection: Connection) -> nn.Module:
    return get_peft_model(tiny_model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))


def other_scaling(connection: Connection) -> nn.Module:
    config = fedmoe.connect(connection.settings).expert(NAME).lora_config()
    config.lora_alpha = 16
    return get_peft_model(tiny_model(), config)


def with_bias(connection: Connection) -> nn.Module:
    model = adapted(connection)
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


def in_bf16(connection: Connection) -> nn.Module:
    return adapted(connection).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "about"),
    [
        (full, "adapter"),
        (other_rank, "tensors"),
        (other_scaling, "scaling"),
        (with_bias, "trainable"),
        (in_bf16, "dtype"),
    ],
)
def test_a_model_that_is_not_the_experts_is_refused(
    connection: Connection, make: Callable[[Connection], nn.Module], about: str
) -> None:
    """Before it has a name: no heartbeat, nothing published."""
    make_tiny(connection)
    with raises(SettingsError, about=about):
        fedmoe.join(connection.settings, {NAME: make(connection)}, name="own")
    (expert,) = fedmoe.connect(connection.settings).view().experts
    assert (expert.workers, expert.left) == ((), ())


def test_another_base_model_is_refused(connection: Connection, connect: Connect) -> None:
    """Same config, other weights, or another tokenizer: somebody else has pinned theirs."""
    make_tiny(connection)
    with serving(connect(), block_ms=20):
        with fedmoe.join(
            connection.settings, {NAME: adapted(connection)}, name="a", tokenizer=tiny_tokenizer()
        ):
            pass
        with raises(BaseModelError, about="fingerprint"):
            fedmoe.join(connection.settings, {NAME: adapted(connection, seed=1)}, name="b")
        other = tiny_tokenizer()
        other.add_tokens(["<tool>"])
        with raises(BaseModelError, about="vocabulary"):
            fedmoe.join(connection.settings, {NAME: adapted(connection)}, name="c", tokenizer=other)


def test_unknown_expert_is_named_with_those_there_are(connection: Connection) -> None:
    make_tiny(connection)
    with raises(UnknownExpertError, about="docs_expert"):
        fedmoe.join(connection.settings, {"docs_expert": adapted(connection)}, wait=False)
    with raises(SettingsError, about="adapters"):
        fedmoe.join(connection.settings, {})


def test_a_loop_may_train_the_gateway_under_a_name_that_tells_its_expert(
    connection: Connection, connect: Connect
) -> None:
    """As a worker of that expert would; without the expert's name it is told which one to give."""
    make_tiny(connection, GATEWAY)
    model = adapted(connection, expert=GATEWAY)
    with raises(SettingsError, about="name"):
        fedmoe.join(connection.settings, {GATEWAY: model}, name="alice")
    with raises(SettingsError, about="name"):
        fedmoe.join(connection.settings, {GATEWAY: model}, name=f"{NAME}.alice.")
    with (
        serving(connect(), expert=GATEWAY, block_ms=20),
        fedmoe.join(connection.settings, {GATEWAY: model}, name=f"{NAME}.alice") as member,
    ):
        train(member, model, adam(model), 3)
    assert {one.worker for one in fedmoe.connect(connection.settings).expert(GATEWAY).updates()} == {
        f"{NAME}.alice"
    }


@pytest.mark.parametrize(
    ("counts", "about"),
    [
        ({"n_examples": -1}, "n_examples"),
        ({"n_examples": 1.5}, "n_examples"),
        ({"n_examples": 1, "n_tokens": True}, "n_tokens"),
    ],
)
def test_counts_must_be_counts(connection: Connection, counts: Mapping[str, object], about: str) -> None:
    """Nothing is noted of such a step; the member trains on."""
    make_tiny(connection)
    member = fedmoe.join(connection.settings, {NAME: adapted(connection)}, name="own", drain_s=0.0)
    with raises(SettingsError, about=about):
        member.step(**counts)
    assert member.steps == 0
    member.leave()
    with raises(SettingsError, about="leave"):
        member.step(n_examples=1)


def test_a_loop_hears_of_its_experts_end(connection: Connection, connect: Connect) -> None:
    """An operator removes the expert: the next steps raise, and the worker has left."""
    make_tiny(connection)
    model = adapted(connection)
    with serving(connect(), block_ms=20):
        member = fedmoe.join(connection.settings, {NAME: model}, name="own", drain_s=1.0)
        train(member, model, adam(model), 3)
        remove_expert(connection, NAME)

        def go_on() -> None:
            with member:
                train(member, model, adam(model), 100_000)

        with pytest.raises(RemovedExpertError):
            go_on()


def test_what_nobody_decides_is_said(
    connection: Connection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without an aggregator: it is kept in the state directory, and the last sentence says so."""
    make_tiny(connection)
    model = adapted(connection)
    member = fedmoe.join(connection.settings, {NAME: model}, name="own", state_dir=tmp_path, drain_s=0.5)
    with caplog.at_level(logging.INFO), member:
        train(member, model, adam(model), 3)
    assert f"is kept in {tmp_path}" in caplog.text
