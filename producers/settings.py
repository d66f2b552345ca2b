"""What a worker's own command line says; all else comes from the expert's spec and rules."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedmoe.data.encode import Learn
from fedmoe.errors import SettingsError
from fedmoe.names import check_name, clean_name


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """What is a worker's own; all else comes from the expert's spec and rules.

    Args:
        stream: the expert. data: the JSONL file.
        name: of this worker, "" for the one in the state directory, else the host's name.
        base_model: where the base model lies here, "" for what the spec says.
        chat_template: file with the template of an expert whose base model has none.
        state_dir: makes the worker resumable.
        batch_size, accumulate: instead of the rules' (0: the rules'), for a smaller GPU.
        max_steps, max_epochs: end by itself after so many (0: never).
        checkpoint_interval_s: write a checkpoint after so long without a new update.
        drain_s: how long to wait for the last decision when stopped.
        wait: wait for a Redis or an expert that is not there yet, instead of failing.
        learn: all answers of a conversation, or its last one.
        on_bad_row: leave it out, or end. bad_rows: a file that lists those left out.
        log_interval_s: of the progress line.
    """

    stream: str
    data: Path
    name: str = ""
    base_model: str = ""
    chat_template: Path | None = None
    state_dir: Path | None = None
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 0
    accumulate: int = 0
    max_steps: int = 0
    max_epochs: float = 0.0
    checkpoint_interval_s: float = 60.0
    drain_s: float = 30.0
    wait: bool = True
    learn: Learn = "all"
    on_bad_row: Literal["skip", "fail"] = "skip"
    bad_rows: Path | None = None
    log_interval_s: float = 5.0

    def __post_init__(self) -> None:
        check_name("stream", self.stream)
        if self.name:
            check_name("worker name", self.name)
        for what in ("batch_size", "accumulate", "max_steps", "max_epochs", "drain_s", "log_interval_s"):
            if not 0 <= getattr(self, what) < float("inf"):
                raise SettingsError(f"{what} must be a number of at least 0, not {getattr(self, what)!r}")
        if not 1 <= self.checkpoint_interval_s < float("inf"):
            raise SettingsError(
                f"--checkpoint-interval must be a number of at least 1 (seconds), not {self.checkpoint_interval_s!r}"
            )

    @property
    def worker(self) -> str:
        """The worker's name."""
        return self.name or clean_name(socket.gethostname())
