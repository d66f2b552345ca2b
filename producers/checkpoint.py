"""A worker's state on disk: a checkpoint that is replaced atomically, and the files of the updates that it names.

The checkpoint is written before an update is published. So a worker that dies at any moment resumes where it was, with
the same run, outbox, optimizer state and data position.

An update never changes, so it is written once, into a file that is named by its digest. The file is written before the
first checkpoint that names it, and removed after the first checkpoint that does not. So the checkpoint on disk, old or
new, always finds the updates that it names. A file that no checkpoint names is removed after the next checkpoint.
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
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.tail import Tail
from fedmoe.protocol.update import Header, UpdateId
from fedmoe.protocol.weights_parts import WeightsParts
from fedmoe.store.archive import Archive
from fedmoe.util.disk import to_disk, write_whole
from producers.ledger import Ledger, Outgoing, Trained

FILE_NAME = "worker.safetensors"
ID_NAME = "id"
UPDATES_NAME = "updates"
_FORMAT = "2"
_FORMATS = (_FORMAT, "1")  # 1 held the updates in the checkpoint itself
_HALF_WRITTEN = ".tmp??????"  # left by safetensors if the process is killed while it writes a file


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The state that a worker needs to resume.

    Args:
        ledger: the worker's books: base, run, queue and kept updates.
        local: (numel,) fp32, the adapter at the last step boundary.
        optimizer: state of the optimizer.
        trained: counts of the training since the last update, so of what is in no update yet.
        position: examples consumed; data: digest of the examples to which the position belongs.
        expert, worker: names of the expert and the worker.
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

    Its `id` (32 hex digits) lasts as long as the directory. It distinguishes a worker that was killed from another one
    of the same name. A copy of the directory gets its own id.

    Raises:
        SettingsError: if the directory cannot be made or written, or another worker uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path / FILE_NAME
        self.id = ""
        self._updates = Archive(path / UPDATES_NAME, read_only=True)  # `save` creates the directory
        self._digests: dict[Header, str] = {}  # of the updates on disk
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".probe-{socket.gethostname()}-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
            self._hold()
        except BlockingIOError as error:
            raise SettingsError(
                f"another worker on this machine uses the state directory {path}: give each its own --state-dir",
                about="lock",
            ) from error
        except OSError as error:
            raise SettingsError(
                f"the state directory {path} cannot be written ({error.strerror}): give --state-dir another directory",
                about="state_dir",
            ) from error

    def _hold(self) -> None:
        """Create the directory if it does not exist, and lock out other workers."""
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
        """Release the directory to other workers, also if a child process inherited the lock."""
        if not self.lock.closed:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        self.lock.close()

    def _holds(self) -> bool:
        """True unless somebody removed the directory or its lock."""
        try:
            there = (self.path / "lock").stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return os.path.samestat(there, os.fstat(self.lock.fileno()))

    @property
    def _place(self) -> str:
        """The inode of the lock file, which differs in a copy of the directory."""
        return str(os.fstat(self.lock.fileno()).st_ino)

    def _read_id(self) -> str:
        """The id of this directory, "" if it has none of its own."""
        try:
            own, _, place = (self.path / ID_NAME).read_text(errors="replace").strip().partition(" ")
        except FileNotFoundError:
            return ""
        return own if len(own) == 32 and place == self._place else ""

    def _write_id(self, own: str) -> str:
        write_whole(self.path / ID_NAME, f"{own} {self._place}\n".encode())
        return own

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint; after a crash at any moment the old or the new one is complete.

        Raises:
            OSError: if the disk is full or gone; the old checkpoint stays.
        """
        ledger = checkpoint.ledger
        if not self._holds():  # somebody may have removed the directory
            removed = self.lock
            self._hold()
            removed.close()
        self._updates.directory.mkdir(mode=0o700, exist_ok=True)
        names = {"queue": self._keep(ledger.queue), "kept": self._keep(ledger.kept)}
        tensors = {"local": checkpoint.local}
        if ledger.packed:  # an eighth of the size of the base, and unpacks to the same bits
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
            "meta": asdict(ledger.meta)
            | {
                "rules": ledger.meta.rules.to_json(),
                "rolled_back": ledger.meta.rolled_back.to_json(),
                "tail": ledger.meta.tail.to_json(),
                "parts": ledger.meta.parts.to_json(),
            },
            "trained": asdict(checkpoint.trained),
            "position": checkpoint.position,
            "data": checkpoint.data,
            "expert": checkpoint.expert,
            "worker": checkpoint.worker,
        }
        fresh = self.file.with_suffix(".new")
        try:
            # Not `save`: that copies all tensors, and the training waits meanwhile.
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
        """Write those updates that are not on disk yet; return the digests of all."""
        for update in updates:
            if not self._updates.holds(self._digests.get(update.header, "")):
                digest = self._updates.keep(update.header, update.parts)
                to_disk(
                    self._updates.directory
                )  # also if the file exists: an earlier attempt may have failed between the two
                self._digests[update.header] = digest
        return [self._digests[update.header] for update in updates]

    def _forget(self, names: Collection[str]) -> None:
        """Remove the updates that the checkpoint on disk does not name."""
        self._digests = {header: name for header, name in self._digests.items() if name in names}
        with suppress(OSError):  # remaining files are removed after the next checkpoint
            self._updates.drop_all_but(names)

    def load(self, *, expert: str, worker: str, spec: Spec, now: float) -> Checkpoint | None:
        """The last checkpoint, None if there is none.

        Raises:
            ProtocolError: if it requires a feature that this FedMoE does not know.
            SettingsError: if it is damaged, cannot be read, or belongs to another expert, worker, FedMoE or torch.
        """
        try:
            if not self.file.exists():
                return None
            with safe_open(self.file, framework="pt") as handle:
                info = json.loads((handle.metadata() or {})["fedmoe"])
                # Copied: safetensors maps tensors from the file, and a failing disk would kill the process.
                tensors = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118  # not a dict
            checkpoint = self._restore(info, tensors, spec, now)
        except ProtocolError:
            raise
        except OSError as error:
            raise SettingsError(
                f"the checkpoint {self.file} cannot be read ({error.strerror or error}): check the disk and the file's "
                "permissions, then start this worker again",
                about="checkpoint",
            ) from error
        except SettingsError as error:  # the file is complete, but does not fit
            raise SettingsError(
                f"the checkpoint {self.file} cannot be used: {error}, or move it away to start a new run",
                about=error.about,
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(
                f"the checkpoint {self.file} is damaged ({error}): move it away to start a new run",
                about="checkpoint",
            ) from error
        if (checkpoint.expert, checkpoint.worker) != (expert, worker):
            raise SettingsError(
                f"the state directory {self.path} belongs to worker {checkpoint.worker!r} of "
                f"{checkpoint.expert!r}, not to {worker!r} of {expert!r}: give each worker its own --state-dir",
                about="worker",
            )
        return checkpoint

    def _restore(
        self, info: dict[str, Any], tensors: dict[str, torch.Tensor], spec: Spec, now: float
    ) -> Checkpoint:
        if info["format"] not in _FORMATS:
            raise SettingsError(
                f"it has format {info['format']}, this FedMoE reads {' and '.join(_FORMATS)}: use the FedMoE that "
                "wrote it",
                about="format",
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
        ):  # raises if a part is damaged, or if another FedMoE divided the updates otherwise
            update.add_to(
                torch.zeros_like(ledger.base),
                torch.empty_like(ledger.base[: scratch_values(len(ledger.base))]),
            )
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
    """The worker named in the checkpoint of a state directory, "" if no checkpoint can be read."""
    try:
        with safe_open(path / FILE_NAME, framework="pt") as handle:
            return str(json.loads((handle.metadata() or {})["fedmoe"])["worker"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return ""  # `load` reports what is wrong


def _meta(content: dict[str, Any]) -> Meta:
    needed = {one.name for one in fields(Meta) if not one.metadata.get("optional")}
    if missing := sorted(needed - content.keys()):
        raise ValueError(f"its meta lacks {missing[0]}")
    parsed = {
        "rules": RuleSet.from_json(content["rules"]),
        "rolled_back": RolledBack.from_json(content.get("rolled_back", "[]")),
        "tail": Tail.from_json(content.get("tail", "")),
        "parts": WeightsParts.from_json(content.get("parts", "")),
    }
    return Meta(**known_fields(Meta, content) | parsed)


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
