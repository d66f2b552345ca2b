"""The machines of `tests.machines`: they reach each other, and only each other; a link goes down and comes back."""

import sys
from pathlib import Path

import pytest

from tests.machines import machines, why_not
from tests.processes import eventually

pytestmark = pytest.mark.one_server
PING = "import socket,sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=1.0); print('there')"


def test_links(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    with machines(tmp_path, 2) as (one, two):
        server = one.start("server.log", sys.executable, "-m", "http.server", "8000", "--bind", one.address)

        def there(address: str = one.address) -> bool:
            return two.run(sys.executable, "-c", PING, address, "8000").returncode == 0

        eventually("the server", there)
        assert not there("10.77.0.2")
        assert "unreachable" in two.run(sys.executable, "-c", PING, "192.0.2.1", "80").stderr
        two.unplug()
        assert not there()
        two.plug_in()
        eventually("the link", there)
        one.crash()
        assert server.poll() is not None
        assert not one.pids()
        assert not there()
        assert (one.home / "server.log").exists()
