"""What goes wrong in other people's training loops: nothing is lost or counted twice without a word."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.optim import Optimizer

import fedmoe
import producers.sync
from fedmoe.errors import ProtocolError, SettingsError
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.util.stopping import Stop
from producers.checkpoint import Checkpoint, StateDir
from producers.exchange import Exchange
from producers.ledger import Change
from producers.worker import Worker
from tests.errors import raises
from tests.federation import serving
from tests.integration.test_member import (
    NAME,
    adam,
    adapted,
    make_tiny,
    tiny_spec,
    train,
    values,
    weights_in_redis,
)
from tests.processes import environment
from tests.tiny import save_tiny_model, tiny_model

pytestmark = pytest.mark.one_server

Connect = Callable[[], Connection]


@pytest.fixture
def served(connection: Connection, connect: Connect) -> Iterator[Connection]:
    """A tiny expert that is served."""
    make_tiny(connection)
    with serving(connect(), block_ms=20):
        yield connection


@pytest.mark.parametrize(
    "replaces",
    [
        lambda model: model.to(torch.float64),
        lambda model: model.half().float(),
        lambda model: model.load_state_dict(
            {k: v.clone() for k, v in model.state_dict().items()}, assign=True
        ),
    ],
    ids=["to", "half", "load"],
)
def test_adapter_that_is_replaced_after_joining(
    served: Connection, replaces: Callable[[nn.Module], object]
) -> None:
    """What it learned would reach nobody, and nobody's work would reach it: the next step says so."""
    model = adapted(served)
    member = fedmoe.join(served.settings, {NAME: model}, name="own")
    train(member, model, adam(model), 2)
    replaces(model)
    with raises(SettingsError, about="tensors"):
        member.step(n_examples=1)
    member.leave()
    assert GatewayStore(served).meta(NAME).n_examples == 4


def test_one_adapter_is_trained_for_one_expert_by_one_member(
    served: Connection, connection: Connection
) -> None:
    make_tiny(connection, "other")
    model = adapted(served)
    with raises(SettingsError, about="model"):
        fedmoe.join(served.settings, {NAME: model, "other": model})
    first = fedmoe.join(served.settings, {NAME: model}, name="one")
    with fedmoe.join(served.settings, {NAME: model}, name="two") as second:
        second.step(n_examples=1)
        with raises(SettingsError, about="tensors"):
            first.step(n_examples=1)
    first.leave()


def test_scaling_of_each_module_counts(served: Connection) -> None:
    config = fedmoe.connect(served.settings).expert(NAME).lora_config()
    config.alpha_pattern = {"q_proj": 64}
    with raises(SettingsError, about="scaling"):
        fedmoe.join(served.settings, {NAME: get_peft_model(tiny_model(), config)})


@pytest.mark.parametrize("adapter", ["default", "q_proj", "model", "0"])
def test_adapter_of_any_name(served: Connection, adapter: str) -> None:
    config = fedmoe.connect(served.settings).expert(NAME).lora_config()
    model = get_peft_model(tiny_model(), config, adapter_name=adapter)
    with fedmoe.join(served.settings, {NAME: torch.compile(model)}, name="own") as member:
        assert member.position == 0


OTHERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adafactor": torch.optim.Adafactor,
    "reversed": lambda p: torch.optim.AdamW(p[::-1]),
}


@pytest.mark.parametrize("first", ["adam", *OTHERS])
@pytest.mark.parametrize("second", ["adam", *OTHERS])
def test_another_optimizer_begins_anew(served: Connection, tmp_path: Path, first: str, second: str) -> None:
    """The same one goes on, whatever the order of its parameters; and training goes on in any case."""
    for name in (first, second):
        model = adapted(served)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = OTHERS[name](parameters) if name in OTHERS else torch.optim.AdamW(parameters)
        with fedmoe.join(
            served.settings, {NAME: model}, name="own", state_dir=tmp_path, optimizer=optimizer
        ) as member:
            kind = {"adam": "reversed"}.get(first, first), {"adam": "reversed"}.get(second, second)
            if name == second and member.position:
                assert bool(optimizer.state) == (kind[0] == kind[1])
            train(member, model, optimizer, 2)
    assert GatewayStore(served).meta(NAME).n_examples == 8


def test_worker_command_goes_on_from_a_loops_state(served: Connection, tmp_path: Path) -> None:
    """Run, undecided updates and adapter; the optimizer's moments begin anew."""
    model = adapted(served)
    with fedmoe.join(
        served.settings, {NAME: model}, name="own", state_dir=tmp_path / "state", optimizer=adam(model)
    ) as member:
        train(member, model, adam(model), 2)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    settings = WorkerSettings(
        stream=NAME, data=rows, state_dir=tmp_path / "state", max_steps=2, wait=False,
        base_model=str(save_tiny_model(tmp_path / "base")),
    )  # fmt: skip
    said: list[str] = []
    Worker(served.settings, settings, stop=Stop(), report=said.append).run()
    assert any(line.startswith("resuming run") for line in said)
    assert said[-1].startswith("done: ")


def test_failure_waits_for_the_step_and_keeps_all(
    served: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record of a later release, a slow step, a slow disk: the last checkpoint holds all steps, and whole ones."""
    model = adapted(served)
    member = fedmoe.join(served.settings, {NAME: model}, name="own", state_dir=tmp_path, drain_s=5.0)
    steps = 0

    save = StateDir.save

    def slow_save(self: StateDir, checkpoint: Checkpoint) -> None:
        time.sleep(0.5)
        save(self, checkpoint)

    def refuse(*_: object, **__: object) -> None:
        monkeypatch.setattr(StateDir, "save", slow_save)
        raise ProtocolError("an update needs protocol 99", about="protocol")

    def go_on() -> None:
        nonlocal steps
        optimizer = adam(model)
        while True:
            if steps == 5:
                monkeypatch.setattr(producers.sync, "pull", refuse)
            if member.status[NAME].published and steps > 5:
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter += 1e-4
                time.sleep(1.0)  # the step has changed the adapter, and is not reported yet
                member.step(n_examples=2)
            else:
                train(member, model, optimizer, 1)
            steps += 1

    with raises(ProtocolError, about="protocol"):
        go_on()
    with suppress(ProtocolError):
        member.leave()
    state = StateDir(tmp_path)
    saved = state.load(expert=NAME, worker="own", spec=tiny_spec(), now=0.0)
    state.close()
    assert saved is not None
    assert saved.position == 2 * member.steps
    assert torch.equal(saved.local, values(model, tiny_spec()))


def test_interrupt_waits_for_the_end_of_a_boundary(
    served: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a correction is added: it is added once, and becomes no progress of the worker that it reached."""
    model, other = adapted(served), adapted(served)
    apply = Exchange.apply_change

    def interrupted(self: Exchange, change: Change) -> None:
        apply(self, change)
        monkeypatch.setattr(Exchange, "apply_change", apply)
        os.kill(os.getpid(), signal.SIGINT)

    ben = fedmoe.join(served.settings, {NAME: other}, name="ben")
    with fedmoe.join(served.settings, {NAME: model}, name="ann") as ann:
        train(ann, model, adam(model, 1e-2), 10)
    taught = weights_in_redis(served)
    monkeypatch.setattr(Exchange, "apply_change", interrupted)

    def step_until_interrupted() -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            ben.step(n_examples=1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            step_until_interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    ben.leave()
    assert torch.allclose(weights_in_redis(served), taught, atol=1e-6)
    assert torch.allclose(values(other, tiny_spec()), taught, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "about"),
    [
        ({"drain_s": float("inf")}, "drain"),
        ({"drain_s": "x"}, "drain"),
        ({"checkpoint_interval_s": -1.0}, "checkpoint_interval"),
    ],
)
def test_numbers_are_checked_before_anything_is_trained(
    served: Connection, wrong: Mapping[str, object], about: str
) -> None:
    with raises(SettingsError, about=about):
        fedmoe.join(served.settings, {NAME: adapted(served)}, **wrong)


def test_what_is_no_url_or_mapping_is_a_sentence(served: Connection) -> None:
    with raises(SettingsError, about="redis"):
        fedmoe.join(None, {NAME: adapted(served)})
    with raises(SettingsError, about="adapters"):
        fedmoe.join(served.settings, adapted(served))


def test_forked_children_do_not_hold_the_state_directory(tmp_path: Path) -> None:
    """Workers of a DataLoader that live on inherit the lock."""
    state = StateDir(tmp_path)
    with subprocess.Popen(["sleep", "30"], close_fds=False) as child:
        os.set_inheritable(state.lock.fileno(), True)
        with subprocess.Popen(["sleep", "30"], close_fds=False) as heir:
            state.close()
            StateDir(tmp_path).close()
            heir.kill()
        child.kill()


SCRIPT = """
import sys, torch, fedmoe
from tests.integration.test_member import adapted, adam, train, NAME
from fedmoe.store.connection import Connection
redis = fedmoe.RedisSettings(url=sys.argv[1], prefix=sys.argv[2])
model = adapted(Connection(redis))
member = fedmoe.join(redis, {NAME: model}, name="own")
if sys.argv[3] == "never left":
    train(member, model, adam(model), 3)
else:
    with member:
        train(member, model, adam(model), 3)
        raise SystemExit(0) if sys.argv[3] == "exit" else KeyboardInterrupt
"""


@pytest.mark.parametrize("how", ["never left", "exit", "interrupt"])
def test_programs_that_end_otherwise_publish_what_they_trained(served: Connection, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, served.settings.url, served.settings.prefix, how],
        env=environment(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert GatewayStore(served).meta(NAME).n_examples == 6, done.stderr
    (left,) = fedmoe.connect(served.settings).view().experts[0].left
    assert (left.name, left.how) == ("own", "stopped")
    assert ("without leaving the federation" in done.stderr) == (how == "never left")


def test_loss_may_be_unknown(served: Connection, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.ERROR),
        fedmoe.join(served.settings, {NAME: adapted(served)}, name="own") as member,
    ):
        member.step(n_examples=1, loss=None)
        with raises(SettingsError, about="n_tokens"):
            member.step(n_examples=1, n_tokens=2**65)
        member.step(n_examples=torch.tensor(2), loss=float("inf"))
    assert not caplog.records
    assert GatewayStore(served).meta(NAME).n_examples == 3
    assert weights_in_redis(served).isfinite().all()
