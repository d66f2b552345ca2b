"""What a worker is called: what --name says, else the name in its state directory, else its host's name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe.errors import SettingsError
from fedmoe.settings import WorkerSettings
from fedmoe.store.connection import Connection
from fedmoe.util.stopping import Stop
from producers.worker import Worker
from tests.chaos.actors import EXPERTS, prepare
from tests.errors import raises
from tests.federation import make_expert, serving

pytestmark = pytest.mark.one_server

Work = Callable[..., list[str]]


@pytest.fixture
def work(connection: Connection, connect: Callable[[], Connection], tmp_path: Path) -> Work:
    """Run a worker without a model for three steps, on a state directory; returns what it said."""
    make_expert(connection, "tiny", EXPERTS["tiny"])
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n' * 10)

    def run(name: str = "") -> list[str]:
        said: list[str] = []
        settings = WorkerSettings(
            stream="tiny", data=rows, name=name, state_dir=tmp_path / "state", max_steps=3, wait=False
        )
        with serving(connect(), expert="tiny"):
            Worker(connection.settings, settings, stop=Stop(), report=said.append, prepare=prepare).run()
        return said

    return run


def test_new_container_on_the_same_state_directory_goes_on(
    work: Work, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host name, no --name: the name in the state directory is taken, and that is said."""
    monkeypatch.setattr("socket.gethostname", lambda: "container-1")
    assert (
        work()[0] == "worker 'container-1' of expert 'tiny' (name from this host; --name gives another one)"
    )
    monkeypatch.setattr("socket.gethostname", lambda: "container-2")
    said = work()
    assert said[0].startswith("worker 'container-1' of expert 'tiny' (name from the checkpoint in ")
    assert said[0].endswith(
        "not this host, 'container-2'; for another worker give --name and another --state-dir)"
    )
    assert any("resuming run" in line for line in said)
    assert connection.client.hkeys(connection.keys.expert("tiny").decided) == [b"container-1"]


def test_name_that_is_typed_must_be_the_state_directorys(work: Work) -> None:
    """One sentence; the checkpoint stays what it was."""
    work("anna")
    with raises(SettingsError, about="worker"):
        work("ben")
    assert "resuming run" in "\n".join(work("anna"))
