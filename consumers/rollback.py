"""Where the state of an earlier version comes from: recomputed from kept updates, or read from a backup."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from consumers.kept import kept_versions
from consumers.verify import replay
from fedmoe.errors import BackupError, SettingsError, UnknownExpertError, UpdateError
from fedmoe.protocol.lines import AnchorLine, RulesLine, read_line
from fedmoe.protocol.records import Meta
from fedmoe.protocol.spec import Spec
from fedmoe.store.archive import Archive
from fedmoe.store.connection import Connection
from fedmoe.store.gateway import GatewayStore
from fedmoe.store.rollback import VersionState, check_target
from fedmoe.tools.backup import Backup


def state_from_updates(
    connection: Connection, name: str, spec: Spec, *, to: int, directory: Path
) -> VersionState:
    """The state of version `to`, recomputed from the log and the updates kept in `directory`/NAME.

    Raises:
        SettingsError: if that version is not an earlier one, or not kept; names those that are.
        UpdateError: if a kept file is damaged.
        DamagedExpertError: if the expert is.
    """
    meta, _, lines = GatewayStore(connection).history(name)
    check_target(name, meta.version, to)
    archive = Archive(directory / name, read_only=True)
    history = [line for line in map(read_line, lines) if not isinstance(line, RulesLine)]
    kept = kept_versions(history, archive, lineage=meta.lineage, upto=meta.version)
    if not any(first <= to <= last for first, last in kept):
        raise SettingsError(
            f"version {to} of {name} is not kept in {directory}: log and kept updates give {_shown(kept)}",
            about="to",
        )
    done = replay(spec, meta, lines, archive, to=to)
    if done.problem:
        raise UpdateError(
            f"version {to} of {name} cannot be recomputed: {done.problem}", about="keep_updates"
        )
    held = done.held
    return VersionState(
        version=to, lineage=meta.lineage, weights=held.weights.file, server_state=held.state_file,
        optimizer=held.optimizer,
    )  # fmt: skip


def _shown(runs: Sequence[tuple[int, int]]) -> str:
    """For people: versions 0 to 12 and 40."""
    some = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    listed = " and ".join(filter(None, (", ".join(some[:-1]), some[-1])))
    return f"version {listed}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"versions {listed}"


def state_from_backup(
    connection: Connection, name: str, spec: Spec, *, to: int, backup: Backup
) -> VersionState:
    """The state of version `to`, as a backup holds it.

    Raises:
        SettingsError: if that is not an earlier version.
        UnknownExpertError: if the backup does not hold the expert.
        BackupError: if the backup is damaged, holds another version, or is of another expert or history.
    """
    meta, _, lines = GatewayStore(connection).history(name)
    check_target(name, meta.version, to)
    if name not in backup.experts:
        raise UnknownExpertError(
            f"there is no expert {name!r} in the backup {backup.directory}; there are: {', '.join(backup.experts)}",
            about=name,
        )
    if backup.experts[name].version != to:
        raise BackupError(
            f"the backup {backup.directory} holds version {backup.experts[name].version} of {name}, not version {to}",
            about="version",
        )
    state = backup.load(name)
    then = Meta.from_hash(state.meta)
    if then.spec != spec.digest:
        raise BackupError(
            f"{name} in the backup {backup.directory} has spec {then.spec}, and in Redis {spec.digest}: they are "
            "different experts",
            about="spec",
        )
    if then.lineage != meta.lineage:
        raise BackupError(
            f"{name} in the backup {backup.directory} is of lineage {then.lineage}, and in Redis of {meta.lineage}: "
            "the expert was created again since",
            about="lineage",
        )
    made = [_made(fields, to) for fields in ([fields for _, fields in state.log], lines)]
    if None not in made and made[0] != made[1]:
        raise BackupError(
            f"version {to} of {name} in the backup {backup.directory} is not the one that the expert in Redis passed "
            "through: a failover or a restore lies between (fedmoe restore --replace puts the backup back)",
            about="history",
        )
    server_state = state.server_state
    return VersionState(
        version=to, lineage=meta.lineage, weights=state.weights, server_state=server_state,
        optimizer="" if server_state is None else then.server_state,
    )  # fmt: skip


def _made(
    lines: Sequence[Mapping[str, str] | Mapping[bytes, bytes]], version: int
) -> Mapping[str, str] | None:
    """The line of the log that made this version; None if the log does not tell."""
    for raw in reversed(lines):
        line = read_line(raw)
        if not isinstance(line, RulesLine | AnchorLine) and line.version == version:
            return line.to_fields()
    return None
