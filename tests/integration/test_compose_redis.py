"""The Redis of ops/container/compose.yaml, with its own command line, on what `fedmoe init` writes."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fedmoe.protocol.parties import Party
from fedmoe.store.users import Users
from tests.documents import ROOT
from tests.integration.test_enrolment import enrol
from tests.processes import eventually
from tests.secured import EXPERT, Secured

pytestmark = pytest.mark.one_server
COMPOSE = (ROOT / "ops" / "container" / "compose.yaml").read_text()
SERVICE = yaml.safe_load(COMPOSE)["services"]["redis"]


def mapped(words: list[str], places: dict[str, Path]) -> list[str]:
    """The words of a command with the paths of this machine in place of the container's."""
    for inside, here in places.items():
        words = [f"{here}{word.removeprefix(inside)}" if word.startswith(inside) else word for word in words]
    return words


def test_redis_of_compose_serves_a_deployment_and_saves_its_users(tmp_path: Path) -> None:
    """Its data are not among the secrets, its health check is answered, and what ACL SAVE writes is its own alone."""
    secured = Secured(tmp_path / "federation")
    assert "--redis-dir /federation " in COMPOSE  # for a `dir` that is there in the container, as here
    places = {"/federation": secured.directory, "/data": tmp_path / "data"}
    assert {volume.split(":")[1] for volume in SERVICE["volumes"]} == places.keys()
    assert not [volume for volume in SERVICE["volumes"] if volume.endswith(":ro")]
    places["/data"].mkdir()
    command = mapped(SERVICE["command"], places)
    assert command[0] == "redis-server"
    here = ["--bind", "127.0.0.1", "--tls-port", str(secured.port)]
    with subprocess.Popen(
        [secured.program, *command[1:], *here], stdout=subprocess.DEVNULL, umask=0o077
    ) as redis:
        try:
            eventually("Redis", secured.answers, timeout_s=20)
            enrol(secured, tmp_path / "w2.toml")
            assert (
                Party(role="worker", expert=EXPERT, name="w2")
                in Users(secured.connection("operator")).parties()
            )
            users = secured.directory / "users.acl"
            assert ":w2 " in users.read_text()
            assert users.stat().st_mode & 0o777 == 0o600
            assert os.listdir(places["/data"]) == ["appendonlydir"]
            if shutil.which("redis-cli"):
                check = mapped(SERVICE["healthcheck"]["test"][1:], places)
                asked = [*check[:-1], "-p", str(secured.port), check[-1]]
                done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
                assert (done.returncode, done.stdout.split()[0]) == (0, "NOAUTH"), done
        finally:
            redis.kill()
