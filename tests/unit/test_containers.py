"""The image, the compose file and the manifests of Kubernetes are valid, closed, and give a stop its time."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedmoe.protocol.parties import Party
from fedmoe.tools.deploy.parties import parties
from tests.documents import ROOT, misfit
from tests.services import LONGEST_STOP_S, read

CONTAINER, MANIFESTS = ROOT / "ops" / "container", ROOT / "ops" / "kubernetes"
DOCKERFILE = CONTAINER / "Dockerfile"
COMPOSE = CONTAINER / "compose.yaml"
FILES = [path for path in sorted(MANIFESTS.glob("*.yaml")) if path.name != "kustomization.yaml"]
USER = 10001


def program(name: str) -> str:
    """A validator that was installed with the tests, or skip."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"there is no program {name} here: pip install '.[test]'")
    return found


def run(*words: str | Path) -> str:
    """What a validator complains of."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr if done.returncode else ""


def test_hadolint_finds_nothing() -> None:
    """Nor is any of its rules switched off."""
    assert run(program("hadolint"), DOCKERFILE) == ""
    assert "hadolint ignore" not in DOCKERFILE.read_text()


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_fedmoe_is_pid_1_of_the_image_and_no_root() -> None:
    """In the exec form: a shell would be PID 1 and hand no signal on."""
    last = dict(instructions())
    assert json.loads(last["ENTRYPOINT"]) == ["fedmoe"]
    assert json.loads(last["HEALTHCHECK"].partition("CMD ")[2]) == ["fedmoe", "healthy"]
    assert last["USER"] == f"{USER}:{USER}"
    assert last["STOPSIGNAL"] == "SIGTERM"


def test_the_image_is_built_from_all_that_setup_needs_and_no_more() -> None:
    """The context is a list of what may come in, because data and secrets lie beside it."""
    lines = (CONTAINER / "Dockerfile.dockerignore").read_text().splitlines()
    first, *rest = [line for line in lines if not line.startswith("#")]
    assert first == "*"
    there = {line.removeprefix("!") for line in rest if line.startswith("!")}
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert there == packages | {"ops/constraints.txt", "pyproject.toml", "setup.cfg", "README.md", "LICENSE"}
    assert all((ROOT / name).exists() for name in there)


def test_compose_file_is_valid() -> None:
    """By the schema of the compose specification."""
    assert run(program("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE) == ""


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


@pytest.mark.parametrize("name", sorted(services()))
def test_services_of_compose_are_closed(name: str) -> None:
    """Also Redis: no root, no capability, a read-only root file system; only the dashboard has a port, on loopback."""
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service["user"].startswith(("0", "root"))
    assert service.get("ports", []) == (["127.0.0.1:5000:5000"] if name == "dashboard" else [])
    if name != "redis":
        assert service["user"] == f"{USER}:{USER}"
        assert misfit("fedmoe " + " ".join(service["command"])) == ""


@pytest.mark.parametrize("name", sorted(services().keys() - {"redis"}))
def test_services_of_compose_have_the_enrolment_of_their_role(name: str) -> None:
    """As `fedmoe init` writes it, mounted as a secret; and no password is in the environment."""
    compose = yaml.safe_load(COMPOSE.read_text())
    service, command = compose["services"][name], compose["services"][name]["command"]
    role = {"standby": "aggregator", "dashboard": "monitor", "backup": "operator"}.get(name, name)
    assert command[command.index("--enrolment") + 1] == f"/run/secrets/{role}"
    files = {Path(compose["secrets"][secret]["file"]).name for secret in service["secrets"]}
    written = parties([Party(role="worker", expert="sql_expert", name="sql-1")])
    assert [written[file].role for file in files - {"dashboard.password"}] == [role]
    assert "env_file" not in service
    assert "environment" not in service


@pytest.mark.parametrize("name", ["aggregator", "standby", "worker"])
def test_services_that_read_the_base_model_can_download_it(name: str) -> None:
    """The aggregators its config; the root file system is read-only."""
    home = str(
        Path(next(rest for word, rest in instructions() if "HF_HOME" in rest).partition("HF_HOME=")[2]).parent
    )
    service = services()[name]
    places = [one.partition(":")[0] for one in service["tmpfs"]] + [
        one.split(":")[1] for one in service.get("volumes", [])
    ]
    assert home in places


def test_the_image_s_kernels_can_be_loaded() -> None:
    """User 10001 reads what root compiled, in a directory made for one user, and loads a copy of it from /tmp."""
    (built,) = [rest for word, rest in instructions() if word == "RUN" and "fedmoe.protocol.kernels" in rest]
    place = next(rest for word, rest in instructions() if "XDG_CACHE_HOME" in rest and word == "ENV")
    assert built.endswith(f"&& chmod -R a+rX {place.partition('XDG_CACHE_HOME=')[2].split()[0]}")
    for name, service in services().items():
        if name != "redis":
            assert service["tmpfs"][0].endswith(":exec"), name  # Docker's default is noexec


def test_compose_gives_a_stop_its_time() -> None:
    """The same as the units of systemd."""
    found = services().items()
    grace = {name: int(one["stop_grace_period"].rstrip("s")) for name, one in found if name != "backup"}
    assert grace["worker"] == int(read("fedmoe-worker@.service")["TimeoutStopSec"])
    assert grace["dashboard"] == int(read("fedmoe-dashboard.service")["TimeoutStopSec"])
    assert grace["aggregator"] == grace["standby"] == int(read("fedmoe-aggregator.service")["TimeoutStopSec"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_are_valid(path: Path) -> None:
    """By the schema of Kubernetes, with no unknown field."""
    assert run(program("kubernetes-validate"), "--strict", "--quiet", path) == ""


def test_kustomization_lists_all_and_builds() -> None:
    """By kubectl, if it is there."""
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in FILES]
    kubectl = shutil.which("kubectl")
    if not kubectl:
        pytest.skip("there is no kubectl here")
    done = subprocess.run([kubectl, "kustomize", str(MANIFESTS)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    documents = [one for one in yaml.safe_load_all(done.stdout) if one["kind"] != "Namespace"]
    assert {one["metadata"]["namespace"] for one in documents} == {"fedmoe"}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The component, and what a pod of it is."""
    for path in FILES:
        for one in yaml.safe_load_all(path.read_text()):
            spec = one.get("spec", {}).get("jobTemplate", one).get("spec", {})
            if "template" in spec:
                yield one["metadata"]["labels"]["app.kubernetes.io/component"], spec["template"]["spec"]


@pytest.mark.parametrize(("component", "pod"), list(pods()), ids=[name for name, _ in pods()])
def test_pods_are_closed_and_have_time(component: str, pod: dict[str, Any]) -> None:
    """As the restricted profile wants it; with probes that do not depend on Redis."""
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == USER
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert misfit("fedmoe " + " ".join(container["args"])) == ""
    mounts = {one["name"] for one in container["volumeMounts"]}
    claims = {"home"} if component == "worker" else set()
    assert mounts - claims == {one["name"] for one in pod["volumes"]}
    (secret,) = [one["secret"] for one in pod["volumes"] if one["name"] == "enrolment"]
    assert (
        secret["defaultMode"] == 0o440
    )  # root's, and of the pod's group: `fedmoe` takes no file that others can read
    (mounted,) = [one["mountPath"] for one in container["volumeMounts"] if one["name"] == "enrolment"]
    assert container["args"][container["args"].index("--enrolment") + 1].startswith(mounted)
    if component != "backup":
        assert container["livenessProbe"]["exec"]["command"] == ["fedmoe", "healthy"]
        assert container["startupProbe"]["exec"]["command"] == ["fedmoe", "healthy"]
    unit = "fedmoe-worker@.service" if component == "worker" else "fedmoe-aggregator.service"
    assert pod["terminationGracePeriodSeconds"] == int(read(unit)["TimeoutStopSec"])


def test_workers_keep_their_identity() -> None:
    """Enrolment, and with it name and expert, rows and state directory follow the pod's name; the longest stop fits."""
    (pod,) = [pod for name, pod in pods() if name == "worker"]
    (container,) = pod["containers"]
    values = dict(zip(container["args"], container["args"][1:], strict=False))
    assert values["--data"] == "/data/$(POD).jsonl"
    paths = {one["mountPath"]: one.get("subPathExpr") for one in container["volumeMounts"]}
    assert paths[values["--enrolment"]] == "$(POD).toml"
    assert values["--state-dir"].startswith("/var/lib/fedmoe/")
    assert pod["terminationGracePeriodSeconds"] > LONGEST_STOP_S
