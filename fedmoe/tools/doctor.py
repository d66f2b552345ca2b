"""Checks of an installation, each one a line that says what to do. store/probe.py checks Redis."""

import importlib.metadata
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fedmoe.util.check import FAIL, OK, WARN, Check

ROOMS = {
    "fedmoe": "fedmoe/cli/main.py",
    "consumers": "consumers/aggregator.py",
    "producers": "producers/worker.py",
}
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
LIBRARIES = ("click", "jinja2", "msgpack", "peft", "redis", "rich", "safetensors", "torch", "transformers")


def find_package(name: str) -> Path | None:
    """The directory of an importable package, without importing it."""
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Check that FedMoE is tested on this version of Python."""
    shown = ".".join(map(str, version))
    if version[:2] < OLDEST_PYTHON:
        return Check(FAIL, "python", f"{shown} is too old: use 3.11 to 3.13")
    if version[:2] > NEWEST_PYTHON:
        return Check(
            WARN, "python", f"{shown} is newer than the versions that FedMoE is tested on, 3.11 to 3.13"
        )
    return Check(OK, "python", shown)


def check_places(find: Callable[[str], Path | None] = find_package) -> Check:
    """Check that fedmoe, producers and consumers come from one place: others published packages of these names."""
    roots = {}
    for name, module in ROOMS.items():
        place = find(name)
        if place is None:
            return Check(
                FAIL,
                "packages",
                f"{name} cannot be imported: install FedMoE again, all three belong together",
            )
        if not (place.parent / module).is_file():
            return Check(
                FAIL,
                "packages",
                f"{name} in {place} is not FedMoE's: uninstall the distribution that brought it",
            )
        roots[name] = place.parent.resolve()
    if len(set(roots.values())) > 1:
        text = ", ".join(f"{name} from {root}" for name, root in roots.items())
        return Check(FAIL, "packages", f"{text}: uninstall all but one, they belong together")
    return Check(OK, "packages", f"{', '.join(ROOMS)} from {roots['fedmoe']}")


def check_stranger(installed: Callable[[str], str] = importlib.metadata.version) -> Check | None:
    """Check that PyPI's abandoned project `consumers` is absent: it and FedMoE overwrite each other's files."""
    try:
        version = installed("consumers")
    except importlib.metadata.PackageNotFoundError:
        return None
    return Check(
        FAIL,
        "packages",
        f"the PyPI project consumers {version} has our package's name: uninstall it, reinstall FedMoE",
    )


def check_libraries(
    requires: Callable[[str], list[str] | None] = importlib.metadata.requires,
    installed: Callable[[str], str] = importlib.metadata.version,
) -> Iterator[Check]:
    """Check that every required library is installed in a supported version."""
    from packaging.requirements import Requirement

    try:
        texts = requires("fedmoe") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            WARN, "libraries", "fedmoe runs from a checkout and is not installed: versions are not checked"
        )
        texts = list(LIBRARIES)
    found = []
    for needed in map(Requirement, texts):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            version = installed(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(FAIL, "libraries", f"{needed.name} is missing: pip install '{needed}'")
            continue
        if not needed.specifier.contains(version, prereleases=True):
            yield Check(
                FAIL, "libraries", f"{needed.name} {version} is not supported: pip install '{needed}'"
            )
        found.append(f"{needed.name} {version}")
    yield Check(OK, "libraries", ", ".join(found))


def check_torch() -> Check:
    """Check torch: its version, the device it trains on, and the precision."""
    try:
        import torch

        from fedmoe.model.base import choose_device, choose_precision
    except Exception as error:  # a broken build may raise any type
        return Check(FAIL, "torch", f"torch or transformers cannot be imported ({error}): install them again")
    device = choose_device()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    precision = str(choose_precision("auto", device)).removeprefix("torch.")
    text = f"{torch.__version__}, trains on {device} ({name}) in {precision}"
    if device.type == "cpu" and shutil.which("nvidia-smi"):
        return Check(
            WARN,
            "torch",
            f"{text}, though there is an NVIDIA driver: install torch's CUDA build to use the GPU",
        )
    return Check(OK, "torch", text)


def check_server() -> Check:
    """Check for a server program, for `fedmoe demo` and the tests."""
    from fedmoe.errors import FedMoEError
    from fedmoe.store.embedded import find_server

    try:
        return Check(OK, "server", f"{find_server()} (for fedmoe demo; not needed with --redis)")
    except FedMoEError as error:
        return Check(WARN, "server", str(error))


def check_users_file(enrolment: Path) -> Check | None:
    """Check that nobody else can read the ACL file of the deployment in which this enrolment file lies.

    Redis writes it again with each change of users, for everybody to read unless its umask forbids that.
    """
    from fedmoe.tools.deploy.deployment import USERS
    from fedmoe.tools.deploy.parties import ENROLMENTS

    place = enrolment.resolve().parent
    try:
        if place.name != ENROLMENTS or not all(
            path.stat().st_mode & 0o077 for path in (place.parent / USERS, place.parent)
        ):
            return None
    except OSError:
        return None
    return Check(
        WARN,
        "users",
        f"others on this machine can read {place.parent / USERS}, which holds hashes of passwords: run "
        f"`chmod 700 {shlex.quote(str(place.parent))}`, or start Redis with umask 077 and run chmod 600 on the file",
    )


def check_base_model(base_model: str) -> Check:
    """Check for the base model's weights on this machine."""
    from fedmoe.model.base import has_weights

    if has_weights(base_model):
        return Check(OK, "base model", f"{base_model} is on this machine")
    if base_model.startswith((".", "/", "~")):
        return Check(
            WARN,
            "base model",
            f"{base_model} is not on this machine: a worker needs it (--base-model if it is elsewhere)",
        )
    return Check(
        WARN, "base model", f"{base_model} is not in the hub cache: a worker will download it when it starts"
    )
