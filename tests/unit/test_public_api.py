"""The public API: every name of it stands in CHANGELOG.md with its parameters; it imports nothing before it is used."""

import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fedmoe
from fedmoe.integrations.transformers import FedMoECallback
from fedmoe.tools.reader import Adapter, ExpertReader, FederationReader

ROOT = Path(__file__).parent.parent.parent
# What a user gets from `connect`, by the way that leads there.
REACHED = {
    "fedmoe.Member": fedmoe.Member,
    "fedmoe.connect(…)": FederationReader,
    "fedmoe.connect(…).expert(…)": ExpertReader,
    "fedmoe.connect(…).gateway()": Adapter,
}


def names() -> Iterator[str]:
    """Each public name, functions with their parameters."""
    for name in fedmoe.__all__:
        value = getattr(fedmoe, name)
        is_called = name in ("RedisSettings", "connect", "join")
        yield f"fedmoe.{name}{_parameters(value) if is_called else ''}"
        if value is fedmoe.FedMoEError:
            yield from (f"fedmoe.{name}.{field}" for field in vars(value("text", about="word")))
    yield f"fedmoe.integrations.transformers.FedMoECallback{_parameters(FedMoECallback)}"
    for way, kind in REACHED.items():
        for name, value in vars(kind).items():
            if not name.startswith("_"):
                yield f"{way}.{name}{_parameters(value) if inspect.isfunction(value) else ''}"


def _parameters(value: object) -> str:
    shown, keyword = [], False
    for name, one in inspect.signature(value).parameters.items():
        if name == "self":
            continue
        if one.kind is inspect.Parameter.KEYWORD_ONLY and not keyword:
            shown.append("*")
            keyword = True
        shown.append(name if one.default is inspect.Parameter.empty else f"{name}=…")
    return f"({', '.join(shown)})"


def test_changelog_names_the_public_api() -> None:
    """A name that comes, goes or changes its parameters must be told there, in the list that is in force."""
    text = (ROOT / "CHANGELOG.md").read_text()
    section = text.partition("### Public API\n")[2].partition("\n###")[0]
    listed = [" ".join(one.split()) for one in re.findall(r"^- `([^`]+)`$", section, flags=re.MULTILINE)]
    assert listed == list(names())


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, fedmoe; dir(fedmoe); fedmoe.FedMoEError, fedmoe.RedisSettings; "
    code += "print([n for n in ('torch', 'redis', 'transformers', 'peft') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_types_are_shipped() -> None:
    """Type checkers of those who use it read its annotations."""
    for package in ("fedmoe", "producers", "consumers"):
        assert (ROOT / package / "py.typed").exists()
