"""Domain vectors: what a worker tells of its domain, so that prompts can be routed to the expert that knows them. Pure.

A worker's domain vector is the mean over some of its rows of the base model's hidden state at the end of the prompt,
scaled to length 1 (see `fedmoe.model.hidden`). An expert's is the mean of its workers', weighted by their rows. A
prompt belongs to the expert whose vector is nearest. Nothing is trained for it, and to leave an expert out is to leave
its row out.

A worker sends its vector once, in the header of an update. The commit that applies the update writes it to the hash
`fedmoe:{E}:vectors`. A vector that cannot be used is left out with a warning: it never costs the update.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from fedmoe.errors import UpdateError
from fedmoe.protocol.names import domain_of
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header

MAX_VECTOR_BYTES = 16 * 1024  # 8192 values
MAX_VECTOR_ROWS = 10_000
_FP16 = np.dtype("<f2")


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainVector:
    """The vector of one worker.

    Args:
        rows: number of rows that it is the mean of; 0 if the worker withholds its vector.
        values: fp16, little-endian; b"" if the worker withholds its vector.
    """

    rows: int
    values: bytes

    @classmethod
    def of(cls, mean: torch.Tensor, rows: int) -> "DomainVector":
        """Encode a mean (d,) of the states of this many rows.

        Raises:
            UpdateError: if it cannot be published.
        """
        made = cls(rows=rows, values=mean.to(torch.float16).cpu().numpy().astype(_FP16).tobytes())
        made.check(len(mean))
        return made

    def check(self, width: int | None) -> None:
        """Raise UpdateError unless this is a vector of `width` finite values (None: of any number)."""
        n_bytes = len(self.values)
        if n_bytes % _FP16.itemsize or not 0 < n_bytes <= MAX_VECTOR_BYTES:
            raise UpdateError(
                f"it has {n_bytes} bytes; 2 bytes a value are allowed, at most {MAX_VECTOR_BYTES} in all",
                about="vector",
            )
        values = self._array()
        if width is not None and len(values) != width:
            raise UpdateError(
                f"it has {len(values)} values, the hidden state of the base model has {width}", about="vector"
            )
        if not np.isfinite(values).all():
            raise UpdateError("it holds NaN or infinity", about="vector")
        if not 0 < self.rows <= MAX_VECTOR_ROWS:
            raise UpdateError(f"it claims {self.rows} rows, at most {MAX_VECTOR_ROWS} count", about="rows")

    def tensor(self) -> torch.Tensor:
        """The values, (d,) fp32."""
        return torch.from_numpy(self._array().astype(np.float32))

    def _array(self) -> "np.ndarray[tuple[int], np.dtype[np.float16]]":
        return np.frombuffer(self.values, _FP16)

    def to_json(self) -> str:
        """The vector as `fedmoe:{E}:vectors` holds it: rows, and fp16 values in base64."""
        return json.dumps({"rows": self.rows, "fp16": base64.b64encode(self.values).decode()})

    @classmethod
    def from_json(cls, text: bytes | str) -> "DomainVector":
        """Parse a stored vector.

        Raises:
            UpdateError: if it is malformed.
        """
        try:
            content = json.loads(text)
            return cls(rows=int(content["rows"]), values=base64.b64decode(content["fp16"], validate=True))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UpdateError(f"it is malformed ({error!r})", about="vector") from error


WITHHELD = DomainVector(rows=0, values=b"")


def width_of(spec: Spec) -> int | None:
    """The number of values of a hidden state of the spec's base model, None if the spec does not say."""
    width = spec.base_config.get("hidden_size")
    return width if isinstance(width, int) else None


def stored_text(header: Header, spec: Spec) -> str | None:
    """What the hash holds for the worker of this update from then on: "" (nothing) if it withholds its vector.

    None if the update says nothing of it.

    Raises:
        UpdateError: if the vector cannot be used.
    """
    if not header.vector:
        return None if header.vector is None else ""
    vector = DomainVector(rows=header.vector_rows, values=header.vector)
    vector.check(width_of(spec))
    return vector.to_json()


def text_in(header: Header, spec: Spec) -> str | None:
    """Like `stored_text`, but None if the vector cannot be used."""
    try:
        return stored_text(header, spec)
    except UpdateError:
        return None


def mean_of(vectors: Iterable[DomainVector]) -> torch.Tensor:
    """The mean (d,) fp32 of vectors of one length, weighted by their rows."""
    given = list(vectors)
    rows = torch.tensor([float(one.rows) for one in given])
    return (torch.stack([one.tensor() for one in given]) * rows[:, None]).sum(0) / rows.sum()


def nearest(states: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Which of `vectors` (e, d) is nearest to each of `states` (n, d): indices (n,) int64; the first one wins a tie.

    The distance is Euclidean. States and vectors of one worker have length 1 or less, and a shift that is common to all
    of them, which is large in hidden states, does not change which one is nearest.
    """
    return torch.cdist(states.float(), vectors.float()).argmin(1)


def of_domain(expert: str, own: Mapping[str, bytes], gateway: Mapping[str, bytes]) -> dict[str, bytes]:
    """The records of an expert's workers: on its own chain, and of those that train only the gateway."""
    prefix = f"{expert}."
    there = {name.removeprefix(prefix): text for name, text in gateway.items() if domain_of(name) == expert}
    return there | dict(own)
