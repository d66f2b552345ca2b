"""How many rows a worker holds back from training: a share of them, or a number."""

import re
from dataclasses import dataclass

from fedmoe.errors import SettingsError

_SHARE = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%")


@dataclass(frozen=True, slots=True)
class HoldBack:
    """How many rows to hold back: a share of them, or a number (if `rows` is not 0)."""

    share: float = 0.0
    rows: int = 0

    @classmethod
    def parse(cls, text: str) -> "HoldBack":
        """Parse a share with its %, or a number of rows.

        Raises:
            SettingsError: if it is neither, or leaves no row to train on.
        """
        words = text.strip()
        if found := _SHARE.fullmatch(words):
            share = float(found[1]) / 100
            if share >= 1:
                raise SettingsError(
                    f"validate {text!r} leaves no row to train on: give a share below 100%", about="validate"
                )
            return cls(share=share)
        if not (words.isascii() and words.isdigit() and len(words) < 10):
            raise SettingsError(
                f"validate must be a share of the rows, like 2%, or a number of rows, like 64, not {text!r}",
                about="validate",
            )
        return cls(rows=int(words))
