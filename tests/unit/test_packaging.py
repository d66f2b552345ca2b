"""setup.cfg and ops/constraints.txt agree with each other and with what is installed."""

import configparser
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# torch's CUDA build brings these, its CPU build does not; setup.sh leaves them to the build that is there.
BROUGHT_BY_TORCH = re.compile(r"(triton|cuda-|nvidia-)")


def read_setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters=("=",))
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def read_requirements() -> list[Requirement]:
    """All that setup.cfg asks for, of every extra."""
    setup = read_setup()
    blocks = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for block in blocks for line in block.splitlines() if line.strip()]
    return [r for r in map(Requirement, lines) if r.name != "fedmoe"]


def read_pins() -> dict[str, Requirement]:
    lines = (ROOT / "ops/constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    return specifier.version


def installed_requirements(name: str, extras: frozenset[str], seen: set[str]) -> Iterator[str]:
    """Names of all the installed distributions that `name` with `extras` needs, directly or not."""
    for text in importlib.metadata.requires(name) or []:
        needed = Requirement(text)
        if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        key = canonicalize_name(needed.name)
        if f"{key}{sorted(needed.extras)}" in seen:
            continue
        seen.add(f"{key}{sorted(needed.extras)}")
        yield key
        yield from installed_requirements(key, frozenset(needed.extras), seen)


def test_every_requirement_is_pinned_within_its_bound() -> None:
    """A lower bound above the pin, or a dependency without one, would make setup.sh fail or drift."""
    pins = read_pins()
    for requirement in read_requirements():
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version_of(pin)), f"{requirement} but {pin}"


def test_every_requirement_has_a_lower_bound() -> None:
    """Without one pip may settle for a version that nobody ever tried."""
    for requirement in read_requirements():
        assert [s.operator for s in requirement.specifier] == [">="], requirement


def test_pins_name_no_build_and_no_index() -> None:
    """torch==2.13.0+cpu, a URL or an option would choose the user's build or index for him."""
    for pin in read_pins().values():
        assert "+" not in version_of(pin), pin
        assert pin.url is None, pin


def test_all_that_is_installed_for_us_is_pinned() -> None:
    """What the dependencies bring is pinned as well, so that an install next year is the same as today's."""
    pins = read_pins()
    ours = installed_requirements("fedmoe", frozenset({"demo", "test"}), set())
    missing = {
        name for name in ours if name not in pins and name != "fedmoe" and not BROUGHT_BY_TORCH.match(name)
    }
    assert not missing


def test_the_packages_are_ours_alone() -> None:
    """find: takes every folder that looks like a package, tests/ and build/ too, if it is not told which."""
    include = read_setup()["options.packages.find"]["include"].split()
    assert include == ["fedmoe*", "producers*", "consumers*"]
    for name in ("fedmoe", "producers", "consumers"):
        for directory in (path.parent for path in (ROOT / name).rglob("*.py")):
            assert (directory / "__init__.py").exists(), f"{directory} would be left out of the package"


def test_the_console_script_exists() -> None:
    """`fedmoe` on the command line is a function that is there."""
    (script,) = (e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "fedmoe")
    assert callable(script.load())


def test_scripts_can_be_run() -> None:
    """Unix line ends everywhere; what is run is executable, bash, and stops at the first error."""
    for path in [*ROOT.glob("ops/*.sh"), ROOT / ".ci/run"]:
        text = path.read_bytes()
        assert b"\r" not in text, path
        if path.name == "lib.sh":
            continue
        assert path.stat().st_mode & 0o111, path
        assert text.startswith(b"#!/usr/bin/env bash\n"), path
        assert b"\nset -euo pipefail\n" in text or b'/lib.sh"\n' in text, path
