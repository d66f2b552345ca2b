"""fedmoe.tools.doctor and the pure part of fedmoe.store.probe: each thing that is wrong is one line with what to do."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedmoe.protocol.eviction import eviction_threat
from fedmoe.store.access import default_checks
from fedmoe.store.cluster_checks import setting_checks
from fedmoe.store.permissions import Right
from fedmoe.store.probe import permission_checks
from fedmoe.store.rights import Lack
from fedmoe.store.server_info import server_checks
from fedmoe.tools.doctor import (
    ROOMS,
    check_base_model,
    check_libraries,
    check_places,
    check_python,
    check_stranger,
)  # fmt: skip
from fedmoe.util.check import FAIL, OK, WARN, Check
from tests.tiny import save_tiny_model

INFO: dict[str, Any] = {
    "redis_version": "7.0.15", "role": "master", "cluster_enabled": 0, "used_memory": 2**29, "maxmemory": 2**30,
    "maxmemory_policy": "noeviction", "aof_enabled": 1, "aof_last_write_status": "ok", "rdb_last_bgsave_status": "ok",
}  # fmt: skip


def no_such_package(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def lay_out(root: Path, *names: str) -> Callable[[str], Path | None]:
    """FedMoE's packages below `root`, as an importer finds them."""
    for name in names:
        file = root / ROOMS[name]
        file.parent.mkdir(parents=True)
        file.touch()
    return lambda name: root / name if name in names else None


def test_the_packages_here_come_from_one_place() -> None:
    """This checkout, and nobody else's `consumers`."""
    assert check_places() == Check(
        OK, "packages", f"fedmoe, consumers, producers from {Path(__file__).parents[2]}"
    )
    assert check_stranger() is None


def test_a_foreign_or_missing_package_is_named(tmp_path: Path) -> None:
    """A stranger's `consumers` before ours on the path, one that is missing, and two copies of FedMoE."""
    ours, copy = lay_out(tmp_path / "a", *ROOMS), lay_out(tmp_path / "b", *ROOMS)
    stranger = tmp_path / "site" / "consumers"
    stranger.mkdir(parents=True)
    assert check_places(ours).level == OK
    for find, message in (
        (
            lambda name: stranger if name == "consumers" else ours(name),
            f"consumers in {stranger} is not FedMoE's",
        ),
        (lambda name: None if name == "producers" else ours(name), "producers cannot be imported"),
        (lambda name: copy(name) if name == "producers" else ours(name), f"producers from {tmp_path / 'b'}"),
    ):
        check = check_places(find)
        assert (check.level, check.what) == (FAIL, "packages")
        assert message in check.text
    clash = check_stranger(lambda name: "0.9")
    assert clash is not None
    assert "PyPI project consumers 0.9" in clash.text


def test_a_library_that_is_missing_or_too_old_is_named_with_the_command() -> None:
    """Extras are not asked for; without metadata the versions are not checked, but that they are there is."""
    versions = {"click": "8.5.1", "torch": "2.13.0+cpu", "rich": "1.0"}
    required = ["click>=8.2", "torch>=2.6", "rich>=14.0", "gone>=1", "gguf>=0.17; extra == 'demo'"]

    def installed(name: str) -> str:
        return versions[name] if name in versions else no_such_package(name)

    *wrong, last = check_libraries(lambda name: required, installed)
    assert [(check.level, check.text) for check in wrong] == [
        (FAIL, "rich 1.0 is not supported: pip install 'rich>=14.0'"),
        (FAIL, "gone is missing: pip install 'gone>=1'"),
    ]
    assert last == Check(OK, "libraries", "click 8.5.1, torch 2.13.0+cpu, rich 1.0")
    first, *missing, _ = check_libraries(no_such_package, no_such_package)
    assert first.level == WARN
    assert "torch is missing: pip install 'torch'" in [check.text for check in missing]


@pytest.mark.parametrize(
    ("version", "level"), [((3, 10, 9), FAIL), ((3, 11, 0), OK), ((3, 13, 2), OK), ((3, 14, 0), WARN)]
)
def test_the_python_must_be_one_that_is_tested(version: tuple[int, ...], level: str) -> None:
    """Older ones cannot even read the code, newer ones may do."""
    assert check_python(version).level == level


def test_a_base_model_that_is_not_here_is_a_warning(tmp_path: Path) -> None:
    """Never a failure, since not every machine trains; a hub id is told from a directory."""
    assert check_base_model(str(save_tiny_model(tmp_path / "model"))).level == OK
    directory, hub = check_base_model(str(tmp_path / "none")), check_base_model("nobody/nothing-of-the-kind")
    assert (directory.level, hub.level) == (WARN, WARN)
    assert "--base-model" in directory.text
    assert "hub cache" in hub.text


def test_a_fit_server_is_all_ok() -> None:
    """Redis, and Valkey by its own name although it calls itself Redis 7.2.4."""
    assert [check.level for check in server_checks(INFO)] == [OK, OK, OK]
    assert server_checks(INFO | {"valkey_version": "9.1.2"})[0].text == "Valkey 9.1.2"


@pytest.mark.parametrize(
    ("odd", "level", "message"),
    [
        ({"redis_version": "6.0.16"}, FAIL, "Redis 6.0.16 is too old: 7.0 or later"),
        ({"role": "slave"}, FAIL, "read-only replica: use the URL of the master"),
        ({"cluster_enabled": 1}, FAIL, "Redis Cluster"),
        ({"maxmemory_policy": "allkeys-lru"}, FAIL, "may evict experts"),
        (
            {"maxmemory_policy": "allkeys-lru", "maxmemory": 0},
            WARN,
            "set maxmemory-policy to noeviction with",
        ),
        ({"maxmemory": 0}, WARN, "no maxmemory"),
        ({"used_memory": 0.9 * 2**30}, WARN, "90% of maxmemory is used"),
        ({"aof_enabled": 0}, WARN, "appendonly is off"),
        ({"aof_last_write_status": "err"}, FAIL, "cannot write to its disk: aof_last_write_status (err)"),
        ({"rdb_last_bgsave_status": "err"}, FAIL, "rdb_last_bgsave_status (err)"),
    ],
)
def test_what_is_wrong_with_a_server_is_one_line(odd: dict[str, Any], level: str, message: str) -> None:
    """Each alone, and nothing else then changes its level."""
    (wrong,) = (check for check in server_checks(INFO | odd) if check.level != OK)
    assert wrong.level == level
    assert message in wrong.text


def test_a_user_must_be_good_for_something() -> None:
    """What it may not do is a warning, a failure if a role is asked for or nothing is left."""
    four, none = [Lack(right=Right(command="SET", keys=(key,))) for key in "abcd"], ()
    roles = {"aggregator": ("serve", four), "worker": ("train", four[:1]), "monitor": ("look", none)}
    assert [check.level for check in permission_checks(roles, required="")] == [WARN, WARN, OK]
    assert [check.level for check in permission_checks(roles, required="monitor")] == [OK]
    first, _ = permission_checks(roles, required="aggregator")
    assert first.level == FAIL
    assert first.text.startswith(
        "this user may not serve: it lacks SET a, SET b, SET c, SET d; `fedmoe doctor --acl aggregator` "
    )
    useless = permission_checks(roles | {"monitor": ("look", four)}, required="")
    assert [check.level for check in useless] == [FAIL] * 3
    assert useless[0].text.endswith("it lacks SET a, SET b, SET c and 1 more (see --role aggregator)")


def test_what_a_role_can_do_without_is_told() -> None:
    """A warning that says what is then missing; a command that the server lacks is named once."""
    info = Lack(right=Right(command="INFO", without="memory is not shown"), no_command=True)
    (check,) = permission_checks({"monitor": ("look", [info, info])}, required="monitor")
    assert check == Check(
        WARN,
        "permissions",
        "this user may look (without INFO (this server does not know it), memory is not shown)",
    )


@pytest.mark.parametrize(
    ("policy", "url", "sentence"),
    [
        ("noeviction", "redis://here", ""),
        ("", "redis://here", ""),
        ("allkeys-lru", "redis://here", "may evict experts, waiting updates and leases when it is full"),
        ("volatile-lru", "unix:///r", "may evict waiting updates, heartbeats and leases when it is full"),
        ("volatile-ttl", "redis://here", "`redis-cli CONFIG SET maxmemory-policy noeviction` and in redis.conf"),
        ("allkeys-lfu", "rediss://a.b.use1.cache.amazonaws.com:6379", "in the parameter group of its Elasti"),
        ("allkeys-lfu", "rediss://x.memorydb.us-east-1.amazonaws.com", "noeviction in its parameter group"),
        ("allkeys-lfu", "rediss://x.redis.cache.windows.net:6380/0", "under Advanced settings of its Azure cache"),
        ("allkeys-lfu", "sentinel://one:26379,two/master", "redis-cli CONFIG SET"),
    ],
)  # fmt: skip
def test_eviction_is_told_with_the_place_where_it_is_changed(policy: str, url: str, sentence: str) -> None:
    """By the kind of the server, which its host tells."""
    threat = eviction_threat(policy, url)
    assert sentence in threat
    assert bool(threat) == bool(sentence)


def test_a_broken_torch_is_one_line(tmp_path: Path) -> None:
    """Whatever its import raises, the other checks go on."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file')"
    )
    code = "from fedmoe.tools.doctor import check_torch; print(check_torch())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "level='fail'" in done.stdout
    assert "libcudart.so.13" in done.stdout


def test_an_eviction_policy_that_is_not_told_is_not_called_noeviction() -> None:
    """INFO of some managed servers leaves it out, and they refuse CONFIG."""
    silent = {name: value for name, value in INFO.items() if name != "maxmemory_policy"}
    (wrong,) = (check for check in server_checks(silent) if check.level != OK)
    assert (wrong.level, wrong.what) == (WARN, "memory")
    assert "neither INFO nor CONFIG GET" in wrong.text


def test_settings_of_a_cluster_that_were_not_read_are_named() -> None:
    """A user who may not run CONFIG GET would otherwise take silence for approval."""
    coverage, replicas = "cluster-require-full-coverage", "min-replicas-to-write"
    assert setting_checks({"a:1": {coverage: "no", replicas: "1"}}) == []
    (full, none, unread) = setting_checks({"a:1": {coverage: "yes", replicas: "0"}, "b:1": {}, "c:1": {}})
    assert {full.level, none.level, unread.level} == {WARN}
    assert f"a:1: {coverage} is yes" in full.text
    assert f"a:1: {replicas} is 0" in none.text
    assert "not read on b:1, c:1" in unread.text


def test_the_default_user_is_judged_on_every_node() -> None:
    """It must have all rights, or a restart loses experts; and nobody may be it, once parties are enrolled."""
    closed, opened, weak = {"off", "~*", "&*", "+@all"}, {"on", "nopass", "~*", "+@all"}, {"off", "-@all"}
    assert default_checks({"the master": closed, "b:1": closed}, is_secured=True) == []
    assert default_checks({"the master": opened}, is_secured=False) == []
    (check,) = default_checks({"the master": closed, "b:1": opened}, is_secured=True)
    assert check.level == WARN
    assert "on b:1 anybody" in check.text
    (check,) = default_checks({"the master": closed, "b:1": weak}, is_secured=True)
    assert check.level == FAIL
    assert "on b:1 the user default lacks rights" in check.text
