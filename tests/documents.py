"""What the documents hold: their pages, shell commands, mentions of `fedmoe …`, links and headings."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from fedmoe.cli.main import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")))
# A federation over TLS, from nothing; tests/e2e/test_secured_pages.py types these in this order.
SECURED = (
    "fedmoe init federation --host the-redis --worker sql_expert/sql-1",
    "redis-server federation/redis.conf",
    "fedmoe --config federation/fedmoe.toml aggregator run",
    "fedmoe worker run --enrolment sql-1.toml --data private.jsonl --state-dir ~/fedmoe-state",
    "export FEDMOE_CONFIG=federation/fedmoe.toml",
    "fedmoe worker enrol sql-2 --stream sql_expert",
    "fedmoe worker list",
    "fedmoe monitor enrol wall-screen",
    "fedmoe worker enrol sql-2 --stream sql_expert --rotate",
    "fedmoe worker revoke sql-2 --stream sql_expert",
    "fedmoe operator audit",
    "fedmoe operator refresh",
    "fedmoe init second --prefix second --beside federation/enrolments/operator.toml --worker sql_expert/sql-1",
    "fedmoe --config second/fedmoe.toml operator audit",
    "fedmoe doctor --role operator",
    "openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=w -keyout sql-3.key -out sql-3.csr",
    "fedmoe worker enrol sql-3 --stream sql_expert --csr sql-3.csr --deployment federation",
    "fedmoe init federation --renew --host 10.0.0.5",
)

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+)$", flags=re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Command:
    """A shell command of a page; `text` without its comment."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def commands(page: Path) -> Iterator[Command]:
    """Every command that a reader may type: lines of ```sh, and what follows `$ ` in ```console."""
    text = page.read_text(encoding="utf-8")
    for block in _FENCE.finditer(text):
        if block[2] not in ("sh", "console"):
            continue
        first = text.count("\n", 0, block.start()) + 2
        for number, line in enumerate(textwrap.dedent(block[3]).splitlines(), first):
            if block[2] == "console":
                if not line.startswith("$ "):
                    continue
                line = line.removeprefix("$ ")
            if typed := re.sub(r"(^|\s+)#.*$", "", line).rstrip():
                yield Command(name_of(page), number, typed)


def mentions(page: Path, beginning: str) -> Iterator[Command]:
    """Every command, or piece of code in a sentence, that begins with these words."""
    yield from (one for one in commands(page) if re.match(rf"(\w+=\S+ )*{beginning}(?!\S)", one.text))
    text = without_fences(page)
    for code in _CODE.finditer(text):
        if re.match(rf"{beginning}(?!\S)", code[1]):
            yield Command(name_of(page), text.count("\n", 0, code.start()) + 1, code[1])


def without_fences(page: Path) -> str:
    """The text of a page with empty lines in place of fenced blocks."""
    return _FENCE.sub(lambda block: "\n" * block[0].count("\n"), page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """The targets of all links and pictures."""
    return _LINK.findall(_CODE.sub("code", without_fences(page)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for title in _HEADING.findall(without_fences(page)):
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        while anchor in found:
            anchor += "-1"
        found.add(anchor)
    return found


def broken_link(page: Path, target: str) -> str:
    """What is wrong with a link, "" if nothing; addresses on the web are not looked up."""
    if re.match(r"https?://", target):
        return ""
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.is_relative_to(ROOT) or not file.exists():
        return f"{target}: there is no such file"
    if anchor and anchor not in anchors(file):
        return f"{target}: there is no such heading"
    return ""


def misfit(text: str) -> str:
    """Why `fedmoe …` cannot be typed so: an unknown command or option; "" if it can. Values are not looked at."""
    words = shlex.split(text.partition(" |")[0], comments=True)
    words = words[words.index("fedmoe") + 1 :]
    command: click.Command = cli
    known = _options(cli)
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            if word.partition("=")[0] not in known:
                return f"there is no option {word}"
        elif isinstance(command, click.Group) and not re.fullmatch(r".*[/.…].*", word):
            found = command.get_command(click.Context(command), word)
            if found is None:
                return f"there is no command {word}"
            command, known = found, _options(found)
    return ""


def _options(command: click.Command) -> set[str]:
    spelled = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return spelled | {"--help", "-h"}
