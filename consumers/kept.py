"""Kept updates: keep one; which versions can be recomputed from log and kept updates, and where a replay can start."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fedmoe.errors import SettingsError
from fedmoe.protocol.lines import AnchorLine, AppliedLine, RollbackLine
from fedmoe.protocol.update import Header
from fedmoe.store.archive import Anchor, Archive

Step = AppliedLine | RollbackLine  # a line that makes a version


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A version from which a replay can start.

    Args:
        version: of the expert.
        line: names its kept weights and server state; None for the initial weights.
        why: why the replay does not start at version 0; "" if it does.
    """

    version: int
    line: AnchorLine | RollbackLine | Anchor | None = None
    why: str = ""


def starts(history: Sequence[Step | AnchorLine], archive: Archive, lineage: str) -> list[Start]:
    """All versions from which a replay of this history (oldest line first) can start, lowest first."""
    found = [Start(version=0)]
    for line in history:
        if not isinstance(line, AppliedLine) and _holds_values(archive, line):
            why = "the log before it was lost" if isinstance(line, AnchorLine) else "it was rolled back then"
            found.append(Start(version=line.version, line=line, why=why))
    steps = [line for line in history if not isinstance(line, AnchorLine)]
    found += [
        Start(version=anchor.version, line=anchor, why="its weights are kept")
        for anchor in archive.anchors().values()
        if anchor.lineage == lineage and is_of(anchor, steps) and _holds_values(archive, anchor)
    ]
    return sorted(found, key=lambda start: start.version)


def _holds_values(archive: Archive, line: AnchorLine | RollbackLine | Anchor) -> bool:
    """True if the weights that a line names are kept, and the server state if it names one."""
    has_state = not line.server_state or archive.holds_weights(line.server_state)
    return has_state and archive.holds_weights(line.weights)


def is_of(anchor: Anchor, steps: Iterable[Step]) -> bool:
    """True if an anchor belongs to the history in these lines, not to one that a failover undid."""
    for line in steps:
        if line.version == anchor.version:
            return isinstance(line, AppliedLine) and (line.run, line.seq) == (anchor.run, anchor.seq)
        if line.version > anchor.version:
            return line.version == anchor.version + 1  # the anchor's own line was trimmed from the log
    return False


def are_kept(steps: Iterable[Step], after: int, upto: int, archive: Archive) -> bool:
    """True if a replay that starts at version `after` reaches `upto`: log and archive hold what made each version."""
    kept = {line.version for line in steps if _is_kept(line, after, archive)}
    return kept.issuperset(range(after + 1, upto + 1))


def _is_kept(line: Step, since: int, archive: Archive) -> bool:
    if isinstance(line, RollbackLine):
        return line.rolled_back_to >= since or _holds_values(archive, line)
    return archive.holds(line.update)


def kept_versions(
    history: Sequence[Step | AnchorLine], archive: Archive, *, lineage: str, upto: int
) -> list[tuple[int, int]]:
    """The versions that a replay can reach, at most `upto`, as (first, last) of each unbroken run."""
    begins = {start.version for start in starts(history, archive, lineage)}
    steps = {line.version: line for line in history if not isinstance(line, AnchorLine)}
    runs: list[tuple[int, int]] = []
    for version in sorted(begins | steps.keys()):
        if version > upto:
            break
        follows = bool(runs) and runs[-1][1] == version - 1
        if follows and (version in begins or _is_kept(steps[version], runs[-1][0], archive)):
            runs[-1] = runs[-1][0], version
        elif version in begins:
            runs.append((version, version))
    return runs


def keep(archive: Archive, header: Header, parts: list[bytes]) -> str:
    """Keep an update that is about to be applied; returns its digest.

    Raises:
        SettingsError: if the disk is full or gone.
    """
    try:
        return archive.keep(header, parts)
    except OSError as error:
        raise SettingsError(
            f"updates cannot be kept in {archive.directory} ({error.strerror}), so none is applied: make room",
            about="keep_updates",
        ) from error
