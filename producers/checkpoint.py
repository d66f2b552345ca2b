"""A worker's state on disk: a checkpoint that is replaced atomically, and beside it the updates that it names.

It is written before an update is published, so that a worker that dies at any moment goes on where it was: the same
run, the same outbox, optimizer and data position.

An update never changes, so it is written once, into a file of its own that is named by its digest: before the first
checkpoint that names it, and removed after the first that does not. Hence, killed at any moment, the checkpoint on
disk, old or new, finds all that it names; a file that none names is removed after the next checkpoint.
"""

import fcntl
import json
import os
import secrets
import socket
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fedmoe.errors import ProtocolError, SettingsError
from fedmoe.protocol.codec import scratch_values
from fedmoe.protocol.features import check_requires
from fedmoe.protocol.fields import known_fields
from fedmoe.protocol.packed import unpack_again
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header, UpdateId
from fedmoe.store.archive import Archive
from fedmoe.util.disk import to_disk, write_whole
from producers.ledger import Ledger, Outgoing, Trained

FILE_NAME = "worker.safetensors"
ID_NAME = "id"
UPDATES_NAME = "updates"
_FORMAT = "2"
_FORMATS = (_FORMAT, "1")  # 1 held the updates in the checkpoint itself
_HALF_WRITTEN = ".tmp??????"  # what safetensors leaves of a file, if it is killed while it writes it


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that a worker needs to go on.

    Args:
        ledger: base, run, queue, kept.
        local: (numel,) fp32, the adapter at the last step boundary.
        optimizer: the trainer's state.
        trained: since the last update, so in no update yet.
        position: examples consumed; data: digest of the examples that position belongs to.
        expert, worker: whose state it is.
    """

    ledger: Ledger
    local: torch.Tensor
    optimizer: Mapping[str, torch.Tensor]
    trained: Trained
    position: int
    data: str
    expert: str
    worker: str


class StateDir:
    """The directory of `--state-dir`.

    Its `id` (32 hex digits) stays the same as long as the directory does: it tells a worker that was killed from
    another one of the same name. A copy of the directory gets an id of its own.

    Raises:
        SettingsError: if it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / FILE_NAME
        self.id = ""
        self._updates = Archive(path / UPDATES_NAME, read_only=True)  # `save` makes it
        self._digests: dict[Header, str] = {}  # of the updates on disk
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".probe-{socket.gethostname()}-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            self._hold()
        except BlockingIOError as error:
            raise SettingsError(
                f"another worker on this machine uses the state directory {path}: give each its own --state-dir"
            ) from error
        except OSError as error:
            raise SettingsError(
                f"the state directory {path} cannot be written ({error.strerror}): give --state-dir another one"
            ) from error

    def _hold(self) -> None:
        """Make the directory if it is not there, and keep others out of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise BlockingIOError(error.errno, "another worker uses it") from error
        self.lock = lock
        for left in self.path.glob(_HALF_WRITTEN):
            left.unlink(missing_ok=True)
        self.id = self._read_id() or self._write_id(self.id or secrets.token_hex(16))

    def close(self) -> None:
        """Let others have the directory, also if a child process has inherited the lock."""
        if not self.lock.closed:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.lock.close()

    def _holds(self) -> bool:
        """False if somebody removed the directory or its lock."""
        try:
            there = (self.path / "lock").stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(there, os.fstat(self.lock.fileno()))

    @property
    def _place(self) -> str:
        """What a copy of the directory has otherwise."""
        return str(os.fstat(self.lock.fileno()).st_ino)

    def _read_id(self) -> str:
        """The id that was given to this directory, "" if there is none."""
        try:
            own, _, place = (self.path / ID_NAME).read_text(errors="replace").strip().partition(" ")
        except FileNotFoundError:
            return ""
        return own if len(own) == 32 and place == self._place else ""

    def _write_id(self, own: str) -> str:
        write_whole(self.path / ID_NAME, f"{own} {self._place}\n".encode())
        return own

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint; after a crash at any moment either the old or the new one is there whole.

        Raises:
            OSError: if the disk is full or gone; the old checkpoint is still there.
        """
        ledger = checkpoint.ledger
        if not self._holds():  # somebody may have tidied up
            self._hold()
        self._updates.directory.mkdir(mode=0o700, exist_ok=True)
        names = {"queue": self._keep(ledger.queue), "kept": self._keep(ledger.kept)}
        tensors = {"local": checkpoint.local}
        if ledger.packed:  # an eighth of the base, which can be unpacked again to the same bits
            tensors |= {f"packed.{n:06d}": _as_tensor(blob) for n, blob in enumerate(ledger.packed)}
        else:
            tensors["base"] = ledger.base
        tensors |= {f"optimizer.{name}": tensor for name, tensor in checkpoint.optimizer.items()}
        info = {
            "format": _FORMAT,
            **names,
            "run": ledger.run,
            "seq": ledger.seq,
            "start": list(ledger.start) if ledger.start else None,
            "meta": asdict(ledger.meta) | {"rules": ledger.meta.rules.to_json()},
            "trained": asdict(checkpoint.trained),
            "position": checkpoint.position,
            "data": checkpoint.data,
            "expert": checkpoint.expert,
            "worker": checkpoint.worker,
        }
        fresh = self.file.with_suffix(".new")
        try:
            # Not `save`: that copies all of it, and the training stands still meanwhile.
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, fresh, metadata={"fedmoe": json.dumps(info)}
            )
        except SafetensorError as error:
            raise OSError(str(error)) from error
        to_disk(fresh)
        fresh.replace(self.file)
        to_disk(self.path)
        self._forget({*names["queue"], *names["kept"]})

    def _keep(self, updates: Sequence[Outgoing]) -> list[str]:
        """The digests of updates that are on disk now, each written once."""
        for update in updates:
            if not self._updates.holds(self._digests.get(update.header, "")):
                digest = self._updates.keep(update.header, update.parts)
                to_disk(
                    self._updates.directory
                )  # also if the file is there, from a try that failed after that
                self._digests[update.header] = digest
        return [self._digests[update.header] for update in updates]

    def _forget(self, names: Collection[str]) -> None:
        """Remove the updates that the checkpoint on disk does not name."""
        self._digests = {header: name for header, name in self._digests.items() if name in names}
        with suppress(OSError):  # what is left is removed after the next checkpoint
            self._updates.drop_all_but(names)

    def load(self, *, expert: str, worker: str, spec: Spec, now: float) -> Checkpoint | None:
        """The last checkpoint, None if there is none.

        Raises:
            ProtocolError: if it needs something that this FedMoE does not know.
            SettingsError: if it is damaged, cannot be read, or is that of another expert, worker, FedMoE or torch.
        """
        try:
            if not self.file.exists():
                return None
            with safe_open(self.file, framework="pt") as handle:
                info = json.loads((handle.metadata() or {})["fedmoe"])
                # Copied: what safetensors gives lies in the file, and a disk that fails would kill whoever reads it.
                tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118  # not a dict
            checkpoint = self._restore(info, tensors, spec, now)
        except ProtocolError:
            raise
        except OSError as error:
            raise SettingsError(
                f"the checkpoint {self.file} cannot be read ({error.strerror or error}): check the disk and the file's "
                "permissions, then start this worker again"
            ) from error
        except SettingsError as error:  # it is whole
            raise SettingsError(
                f"the checkpoint {self.file} cannot be used: {error}, or move it away to start a new run"
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"the checkpoint {self.file} is damaged ({error}): move it away to start a new run"
            ) from error
        if (checkpoint.expert, checkpoint.worker) != (expert, worker):
            raise SettingsError(
                f"the state directory {self.path} belongs to worker {checkpoint.worker!r} of "
                f"{checkpoint.expert!r}, not to {worker!r} of {expert!r}: give each worker its own --state-dir"
            )
        return checkpoint

    def _restore(
        self, info: dict[str, Any], tensors: dict[str, torch.Tensor], spec: Spec, now: float
    ) -> Checkpoint:
        if info["format"] not in _FORMATS:
            raise SettingsError(
                f"it has format {info['format']}, this FedMoE reads {' and '.join(_FORMATS)}: use the FedMoE that "
                "wrote it"
            )
        check_requires(str(info.get("requires", "")), f"the checkpoint {self.file}")
        packed = tuple(_blobs("packed", tensors))
        ledger = Ledger(
            base=unpack_again(packed, spec) if packed else tensors["base"],
            packed=packed,
            meta=_meta(info["meta"]),
            run=info["run"],
            seq=info["seq"],
            start=UpdateId(*info["start"]) if info["start"] else None,
            queue=self._load_updates("queue", info, tensors, 0.0),
            kept=self._load_updates("kept", info, tensors, now),
        )
        for update in (
            *ledger.kept,
            *ledger.queue,
        ):  # damaged, or of a FedMoE that divides updates into other parts
            update.add_to(torch.zeros_like(ledger.base), torch.empty(scratch_values(len(ledger.base))))
        return Checkpoint(
            ledger=ledger,
            local=tensors["local"],
            optimizer={
                name.removeprefix("optimizer."): t
                for name, t in tensors.items()
                if name.startswith("optimizer.")
            },
            trained=Trained(**known_fields(Trained, info["trained"])),
            position=info["position"],
            data=info["data"],
            expert=info["expert"],
            worker=info["worker"],
        )

    def _load_updates(
        self, group: str, info: dict[str, Any], tensors: dict[str, torch.Tensor], decided_at: float
    ) -> list[Outgoing]:
        if info["format"] == "1":
            return _updates_inside(group, tensors, decided_at)
        updates = []
        for digest in info[group]:
            header, parts = self._updates.load(digest)
            updates.append(Outgoing(header, tuple(parts), decided_at))
            self._digests[header] = digest
        return updates


def name_in(path: Path) -> str:
    """The worker whose checkpoint lies in a state directory, "" if there is none that can be read."""
    try:
        with safe_open(path / FILE_NAME, framework="pt") as handle:
            return str(json.loads((handle.metadata() or {})["fedmoe"])["worker"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return ""  # `load` will say what is wrong with it


def _meta(content: dict[str, Any]) -> Meta:
    needed = {one.name for one in fields(Meta) if not one.metadata.get("optional")}
    if missing := sorted(needed - content.keys()):
        raise ValueError(f"its meta lacks {missing[0]}")
    return Meta(**known_fields(Meta, content) | {"rules": RuleSet.from_json(content["rules"])})


def _as_tensor(blob: bytes) -> torch.Tensor:
    return torch.frombuffer(blob, dtype=torch.uint8)


def _blobs(group: str, tensors: dict[str, torch.Tensor]) -> list[bytes]:
    """The byte strings of a group, in order."""
    return [tensors[name].numpy().tobytes() for name in sorted(tensors) if name.startswith(f"{group}.")]


def _updates_inside(group: str, tensors: dict[str, torch.Tensor], decided_at: float) -> list[Outgoing]:
    """The updates of a checkpoint of format 1."""
    numbers = sorted({name.split(".")[1] for name in tensors if name.startswith(f"{group}.")})
    updates = [_blobs(f"{group}.{number}", tensors) for number in numbers]
    return [Outgoing(Header.unpack(header), tuple(parts), decided_at) for header, *parts in updates]
