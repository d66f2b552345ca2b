"""The installed releases, for heartbeats, experts and `fedmoe status`. The packages are not imported."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

from fedmoe import __version__

PACKAGES = ("torch", "transformers", "peft")


@cache
def software() -> str:
    """For example `fedmoe 0.1.0, torch 2.13.0, transformers 5.1.0, peft 0.18.0`; missing packages are left out."""
    found = [f"fedmoe {__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
