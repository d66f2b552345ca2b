"""What a worker's steps add up to: step k adds 1 to a value of its own, so a 0 is a step lost and a 2 one doubled."""

from collections.abc import Sequence

import torch

from fedmoe.protocol.layout import Layout

FINGERPRINT = "0123456789abcdef"


UNITS = 20


OFFSETS = {"alice": 10, "bob": 10 + UNITS, "carol": 10 + 2 * UNITS}  # in B, which begins as zeros


LAYOUT = Layout.of(
    [
        ("base_model.model.layers.0.q_proj.lora_A.weight", (2, 5)),
        ("base_model.model.layers.0.q_proj.lora_B.weight", (30, 2)),
    ]
)


class HazardError(AssertionError):
    """A scenario's own assertion failed: the sentence says what went wrong."""


def expect(true: object, symptom: str) -> None:
    """Assert, with what is wrong if it does not hold."""
    if not true:
        raise HazardError(symptom)


def expect_units(where: str, name: str, flat: torch.Tensor, wanted: Sequence[float]) -> None:
    """Assert how often each step of a worker is in `flat`; all later steps must not be there."""
    found = flat[OFFSETS[name] : OFFSETS[name] + UNITS].tolist()
    for unit, value in enumerate(found):
        right = wanted[unit] if unit < len(wanted) else 0.0
        what = f"counts {value:g} times" if value else "is lost"
        expect(value == right, f"{where}: {name}'s step {unit} {what}")
