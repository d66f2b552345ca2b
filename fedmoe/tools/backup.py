"""A backup on disk: a directory that holds each expert as Redis had it at one moment, and loads in PEFT.

    manifest.json                     list of experts, the SHA-256 of every file, the merged gateway's fit; written last
    EXPERT/adapter_model.safetensors  the weights, byte for byte as in Redis
    EXPERT/adapter_config.json        for peft
    EXPERT/server_state.safetensors   what the server optimizer remembers, if it remembers something
    EXPERT/expert.json                spec, meta, decided, vectors, log and dead as in Redis

Each expert is consistent in itself, because each has its own chain of commits. The merged gateway is a view of the
experts and is rebuilt; a backup of all experts holds its fit. Bytes in expert.json that are not UTF-8 are written with
Python's `surrogateescape`, which restores the same bytes and keeps text readable.
"""

import errno
import hashlib
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedmoe import __version__
from fedmoe.errors import BackupError, FedMoEError, UnknownExpertError
from fedmoe.protocol.fit import Fit
from fedmoe.protocol.integrity import server_state_problem
from fedmoe.protocol.names import check_expert
from fedmoe.store.backup import BackupStore, ExpertState, Line
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.export_files import CONFIG_FILE, WEIGHTS_FILE
from fedmoe.util.disk import put_in_place, to_disk, write_file

FORMAT = 2  # 2: `decided` has that name
MANIFEST, STATE_FILE = "manifest.json", "expert.json"
FILES = (WEIGHTS_FILE, CONFIG_FILE, STATE_FILE)
OPTIMIZER_FILE = "server_state.safetensors"  # not in every backup


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One expert as the manifest lists it.

    Args:
        version, lineage, commit: of its meta.
        gateway_weight: a number as text, as in the hash of experts.
        files: name -> SHA-256, 64 hex digits.
    """

    version: int
    lineage: str
    commit: str
    gateway_weight: str
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.files.keys() - {OPTIMIZER_FILE} != set(FILES) or not math.isfinite(
            float(self.gateway_weight)
        ):
            raise ValueError("not a manifest's record of an expert")


def back_up(
    store: BackupStore,
    directory: str | Path,
    names: Sequence[str] = (),
    *,
    report: Callable[[str, Saved], None] = lambda name, saved: None,
    kept_as: str = "",
) -> None:
    """Atomically write experts to a new directory, while the federation keeps running.

    Args:
        store: of the federation.
        directory: created by this call; an empty one may exist.
        names: of the experts; all by default.
        report: called for each expert that was read and written.
        kept_as: name under which `tools.kept` may remove it later, "" for a backup that is never removed.

    Raises:
        BackupError: if the directory is not empty or cannot be written, there are no experts, or an expert's parts in
            Redis do not belong together.
        UnknownExpertError: if an expert does not exist.
    """
    target = Path(directory).resolve()
    try:
        _check_target(target)
        weights = _choose(store.experts(), names, where=f"in Redis under the prefix {store.keys.prefix!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            staging.mkdir()
            _write_backup(staging, store, weights, report, kept_as=kept_as, with_fit=not names)
            put_in_place(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except FedMoEError:
        raise  # RedisUnavailableError is an OSError too
    except OSError as error:
        raise BackupError(_explain(error, target), about="disk") from error


def _check_target(target: Path) -> None:
    if target.is_dir() and any(target.iterdir()):
        dated = target.with_name(f"{target.name}-{time.strftime('%Y-%m-%d-%H%M%S')}")
        raise BackupError(
            f"{target} is not empty: give each backup a name of its own, like {dated}", about="directory"
        )
    if target.exists() and not target.is_dir():
        raise BackupError(f"{target} is a file: give the backup another name", about="file")


def _choose(weights: Mapping[str, str], names: Sequence[str], *, where: str) -> dict[str, str]:
    """The named experts of `weights`; all of them if `names` is empty."""
    if not weights:
        raise BackupError(f"there are no experts {where}", about="experts")
    for name in names:
        if name not in weights:
            raise UnknownExpertError(
                f"there is no expert {name!r} {where}; there are: {', '.join(weights)}", about=name
            )
    return {name: weights[name] for name in (names or weights)}


def _write_backup(
    staging: Path,
    store: BackupStore,
    weights: Mapping[str, str],
    report: Callable[[str, Saved], None],
    *,
    kept_as: str,
    with_fit: bool,
) -> None:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "made_by": f"fedmoe {__version__}",
        "prefix": store.keys.prefix,
        "experts": {},
        **({"kept_as": kept_as} if kept_as else {}),
    }
    for name, weight in weights.items():
        saved = _write_expert(staging / name, name, store.read(name), weight)
        manifest["experts"][name] = asdict(saved)
        report(name, saved)
    fit = GatewayStore(store.connection).fit() if with_fit else None
    if fit is not None and fit.weights:
        manifest["fit"] = fit.to_fields()
    _write(staging / MANIFEST, [_json(manifest)])
    to_disk(staging)


def _write_expert(directory: Path, name: str, state: ExpertState, gateway_weight: str) -> Saved:
    spec, meta = state.check(name)
    directory.mkdir()
    files = {
        WEIGHTS_FILE: _write(directory / WEIGHTS_FILE, [state.weights]),
        CONFIG_FILE: _write(directory / CONFIG_FILE, [_json(spec.adapter_config())]),
        STATE_FILE: _write(directory / STATE_FILE, _state_lines(state)),
    }
    # One that does not fit is left out: after a restore the optimizer begins anew.
    if meta.server_state and not server_state_problem(meta, state.server_state, len(state.weights)):
        assert state.server_state is not None
        files[OPTIMIZER_FILE] = _write(directory / OPTIMIZER_FILE, [state.server_state])
    to_disk(directory)
    try:
        return Saved(
            version=meta.version,
            lineage=meta.lineage,
            commit=meta.commit,
            gateway_weight=gateway_weight,
            files=files,
        )
    except ValueError as error:
        raise BackupError(
            f"the gateway weight of {name} is {gateway_weight!r}, not a number", about="gateway_weight"
        ) from error


def _state_lines(state: ExpertState) -> Iterator[bytes]:
    """Content of expert.json; each entry of log and dead is one line of the file."""
    for name, value in (
        ("spec", _text(state.spec)),
        ("meta", _texts(state.meta)),
        ("decided", _texts(state.decided)),
        ("vectors", _texts(state.vectors)),
    ):
        yield f"{'{' if name == 'spec' else ''}{json.dumps(name)}: {json.dumps(value)},\n".encode()
    for name, lines in (("log", state.log), ("dead", state.dead)):
        yield f"{json.dumps(name)}: [".encode()
        for number, (entry_id, fields) in enumerate(lines):
            yield f"{',' if number else ''}\n{json.dumps([_text(entry_id), _texts(fields)])}".encode()
        yield b"],\n" if name == "log" else b"]}\n"


class Backup:
    """A backup on disk.

    Raises:
        BackupError: if the directory is not a backup, or has another format.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise BackupError(f"there is no directory {directory}", about="directory")
        content = self._read_json(self.directory / MANIFEST)
        try:
            made_by_format = int(content["format"])
            if made_by_format != FORMAT:
                remedy = (
                    "upgrade it" if made_by_format > FORMAT else "restore it with the FedMoE that made it"
                )
                raise BackupError(
                    f"the backup {directory} has format {made_by_format}, this FedMoE reads {FORMAT}: {remedy}",
                    about="format",
                )
            self.prefix = str(content["prefix"])
            self.fit = Fit.read(content["fit"]) if "fit" in content else None
            self.experts = {check_expert(name): Saved(**saved) for name, saved in content["experts"].items()}
        except BackupError:
            raise
        except (FedMoEError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise BackupError(
                f"{self.directory / MANIFEST} is damaged or not of a FedMoE backup", about=MANIFEST
            ) from error

    def _read_json(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError as error:
            raise BackupError(
                f"{self.directory} is not a backup: it has no {path.name}", about="backup"
            ) from error
        except OSError as error:
            raise BackupError(f"cannot read {path} ({error.strerror})", about=path.name) from error
        except (ValueError, RecursionError) as error:
            raise BackupError(f"{path} is damaged or not of a FedMoE backup", about=path.name) from error

    def load(self, name: str) -> ExpertState:
        """Load one expert, and check every file against its digest.

        Raises:
            BackupError: if anything is missing or damaged, or the parts do not belong together.
        """
        files = {file: self._read(name, file) for file in self.experts[name].files}
        try:
            content = json.loads(files[STATE_FILE])
            state = ExpertState(
                spec=_raw(content["spec"]),
                weights=files[WEIGHTS_FILE],
                meta=_raws(content["meta"]),
                decided=_raws(content["decided"]),
                log=_lines(content["log"]),
                dead=_lines(content["dead"]),
                vectors=_raws(content.get("vectors", {})),  # earlier backups have none
                server_state=files.get(OPTIMIZER_FILE),
            )
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise BackupError(
                f"{self.directory / name / STATE_FILE} is not of a FedMoE backup", about=STATE_FILE
            ) from error
        _, meta = state.check(name)
        saved = self.experts[name]
        if (meta.version, meta.lineage, meta.commit) != (saved.version, saved.lineage, saved.commit):
            raise BackupError(
                f"{self.directory / MANIFEST} is damaged: it describes another state of {name} than the backup holds",
                about="experts",
            )
        return state

    def _read(self, name: str, file: str) -> bytes:
        path = self.directory / name / file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BackupError(
                f"the backup is damaged: cannot read {path} ({error.strerror})", about=file
            ) from error
        if hashlib.sha256(content).hexdigest() != self.experts[name].files[file]:
            raise BackupError(
                f"the backup is damaged: {path} does not match its digest in {MANIFEST}; nothing was restored",
                about=file,
            )
        return content


def restore(
    store: BackupStore,
    backup: Backup,
    names: Sequence[str] = (),
    *,
    replace: bool = False,
    report: Callable[[str, Saved, str | None], None] = lambda name, saved, replaced: None,
) -> str:
    """Restore experts of a backup, each one atomically; all are checked before the first one is written.

    With all experts the fit of the merged gateway is restored too, unless there is another and `replace` is false.

    Args:
        store: of the federation, which may differ from the backup's.
        backup: to restore from.
        names: of the experts; all by default.
        replace: overwrite experts that exist in Redis.
        report: called for each restored expert, with the version that was replaced (None if there was none).

    Returns:
        What became of the fit, a sentence; "" if the backup holds none, or only some experts are restored.

    Raises:
        BackupError: if the backup is damaged, or an expert exists in Redis and `replace` is false.
        UnknownExpertError: if the backup does not hold an expert.
    """
    known = {name: saved.gateway_weight for name, saved in backup.experts.items()}
    weights = _choose(known, names, where=f"in the backup {backup.directory}")
    for name in weights:
        store.check(name, backup.load(name), replace=replace)
    for name, weight in weights.items():
        replaced = store.write(name, backup.load(name), gateway_weight=weight, replace=replace)
        report(name, backup.experts[name], replaced)
    return "" if names or backup.fit is None else _restore_fit(store, backup.fit, replace=replace)


def _restore_fit(store: BackupStore, fit: Fit, *, replace: bool) -> str:
    gateway = GatewayStore(store.connection)
    present = gateway.fit()
    if present is not None and present != fit and not replace:
        return "the fit of the merged gateway in Redis is kept; --replace takes that of the backup"
    gateway.write_fit(fit)
    return "the fit of the merged gateway is restored"


def _write(path: Path, chunks: Iterable[bytes]) -> str:
    """Write a file to disk; returns its SHA-256 (64 hex digits)."""
    digest = hashlib.sha256()

    def digested() -> Iterator[bytes]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    write_file(path, digested())
    return digest.hexdigest()


def _explain(error: OSError, target: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left for the backup {target}: free some or choose another disk; no part of it was left there"
    return f"cannot write the backup {target} ({error.strerror}): choose a new directory where you may write"


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2, sort_keys=True).encode() + b"\n"


def _text(raw: bytes) -> str:
    return raw.decode(errors="surrogateescape")


def _raw(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


def _texts(raw: Mapping[bytes, bytes]) -> dict[str, str]:
    return {_text(key): _text(value) for key, value in raw.items()}


def _raws(texts: Mapping[str, str]) -> dict[bytes, bytes]:
    return {_raw(key): _raw(value) for key, value in texts.items()}


def _lines(content: Iterable[tuple[str, Mapping[str, str]]]) -> list[Line]:
    return [(_raw(entry_id), _raws(fields)) for entry_id, fields in content]
