"""A party's user on one server, as a line of ACL LIST or of an ACL file tells. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fedmoe.protocol.parties import Party

_HASH = re.compile(r"#[0-9a-f]{64}")
_SELECTOR = re.compile(r"\(([^()]*)\)")
# What servers write, or do not write, beside the rights.
_WITHOUT_MEANING = {"reset", "resetkeys", "resetchannels", "sanitize-payload", "alldbs"}
# Redis before 7.2 names a category in place of most of its commands.
_CATEGORIES = {"@transaction": ("multi", "exec", "discard", "watch", "unwatch")}


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A party's user on one server; two are equal if their rights and passwords are.

    Args:
        party: whose it is.
        hashes: of its passwords, as ACL rules.
        is_on: it may log in.
        rights: `+command`, `%R~key` and `%W~key`; each selector is one text. Servers list them in different ways.
    """

    party: Party
    hashes: tuple[str, ...]
    is_on: bool
    rights: frozenset[str]

    @classmethod
    def parse(cls, party: Party, line: str) -> "User":
        """From the line `user NAME …`."""
        words = _SELECTOR.sub("", line).split()[2:]
        hashes = tuple(sorted(word for word in words if _HASH.fullmatch(word)))
        rights = _rights(word for word in words if word not in {*hashes, "on", "off"})
        selectors = [" ".join(sorted(_rights(found.split()))) for found in _SELECTOR.findall(line)]
        return cls(
            party=party, hashes=hashes, is_on="on" in words, rights=frozenset(rights | set(selectors) - {""})
        )


def _rights(words: Iterable[str]) -> set[str]:
    found: set[str] = set()
    for word in words:
        mode, tilde, key = word.partition("~")
        if tilde:
            found |= {f"%{letter}~{key}" for letter in mode[1:] or "RW"}
        elif word == "-@all":
            found = {one for one in found if not one.startswith("+")}
        elif word[0] in "+-":
            commands = {f"+{name}" for name in _CATEGORIES.get(word[1:], (word[1:],))}
            found = found | commands if word[0] == "+" else found - commands
        elif word not in _WITHOUT_MEANING:
            found.add(word)
    return found
