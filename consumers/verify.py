"""Replays an expert from its log and kept updates, one update at a time."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from consumers.held import Held
from consumers.kept import Step, are_kept, is_of, starts
from fedmoe.errors import UpdateError
from fedmoe.protocol.codec import decode
from fedmoe.protocol.fold import fold
from fedmoe.protocol.layout import AdapterBuffer, digest_of
from fedmoe.protocol.lines import AnchorLine, AppliedLine, RollbackLine, RulesLine, read_line
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.protocol.records import Meta
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.server import ServerStep, has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.staleness import staleness_of
from fedmoe.protocol.update import Header
from fedmoe.protocol.vectors import text_in
from fedmoe.store.archive import Anchor, Archive


@dataclass(frozen=True, slots=True)
class Replay:
    """The result: `held` recomputed at `version`, and `problem` if the replay could not reach meta's version.

    `vectors`: the domain vectors of the workers whose updates brought one, as stored; "" if the last one withheld it.

    `since` is the version where the replay started, and `begin` the reason if that is not 0: the log before was lost,
    or older kept updates were removed. `rollbacks` of the versions were rollbacks.
    """

    version: int
    held: Held
    problem: str = ""
    since: int = 0
    begin: str = ""
    vectors: Mapping[str, str] = field(default_factory=dict)
    rollbacks: int = 0

    def odd_vectors(self, stored: Mapping[str, bytes]) -> list[str]:
        """The workers whose domain vector in Redis is another one than their updates brought."""
        unknown = set() if self.since else stored.keys() - self.vectors.keys()
        return sorted(
            {name for name, text in self.vectors.items() if stored.get(name, b"") != text.encode()} | unknown
        )

    @property
    def weights(self) -> AdapterBuffer:
        """The recomputed weights."""
        return self.held.weights

    def same_values(self, weights: bytes, state: bytes | None) -> bool:
        """True if Redis holds the same weights and the same server state (None: it holds none that fits)."""
        is_same = self.weights.same_values(weights)
        return is_same and (state is None or not self.held.optimizer or self.held.state.same_values(state))


def replay(
    spec: Spec, meta: Meta, lines: Iterable[Mapping[str, str]], archive: Archive, *, to: int | None = None
) -> Replay:
    """Recompute the weights at meta's version from the log's lines (oldest first) and the kept updates.

    Each line is checked against its update: version, staleness, and the factor under the rules in force then. The first
    mismatch ends the replay with the problem. The replay starts at version 0; or at the last anchor line, which an
    aggregator wrote because Redis had lost the log; or, if later updates are not kept any more, at the first anchor of
    this lineage in the archive.

    With `to` the weights of that version are recomputed instead, from the last version that the replay can start from.
    """
    upto = meta.version if to is None else to
    held = Held(spec.layout)
    version = 0
    try:
        history = [read_line(line) for line in lines]
        changes = [line for line in history if isinstance(line, RulesLine)]
        rule_sets = {one.number: one for one in (*(line.ended for line in changes), meta.rules)}
        begin_at = _begin if to is None else _begin_late
        version, begin, steps = begin_at(
            [line for line in history if not isinstance(line, RulesLine)],
            archive, upto=upto, lineage=meta.lineage, held=held, spec=spec,
        )  # fmt: skip
    except (UpdateError, KeyError, ValueError) as error:
        return Replay(version, held, str(error))
    since, rollbacks = version, 0
    delta = torch.empty(spec.layout.numel)
    vectors: dict[str, str] = {}
    targets = {line.rolled_back_to for line in steps if isinstance(line, RollbackLine)}
    earlier: dict[int, Held] = {}
    for line in steps:
        if version in targets:
            earlier[version] = held.copy()
        if version == upto:
            break
        try:
            if isinstance(line, RollbackLine):
                _roll_back(line, version, earlier, archive, held)
                rollbacks += 1
            else:
                header = _fold_line(line, version, spec, rule_sets, archive, delta, held)
                if (text := text_in(header, spec)) is not None:
                    vectors[line.worker] = text
        except (UpdateError, KeyError, ValueError) as error:
            return Replay(version, held, f"version {version + 1}: {error}", since, begin)
        version += 1
    problem = "" if version == upto else f"the log ends at version {version}, the expert is at {upto}"
    return Replay(version, held, problem, since, begin, vectors, rollbacks)


def _begin(
    history: Iterable[Step | AnchorLine],
    archive: Archive,
    *,
    upto: int,
    lineage: str,
    held: Held,
    spec: Spec,
) -> tuple[int, str, list[Step]]:
    """Fill `held` with the values to start from; returns their version, the reason, and the lines to replay."""
    written_back: AnchorLine | None = None
    rest: list[Step] = []
    for line in history:
        if isinstance(line, AnchorLine):
            written_back, rest = line, []
        else:
            rest.append(line)
    since = written_back.version if written_back else 0
    for anchor in archive.anchors().values():
        if not (anchor.lineage == lineage and since < anchor.version <= upto and is_of(anchor, rest)):
            continue
        if not are_kept(rest, since, anchor.version, archive):
            _load(held, anchor, archive)
            later = [line for line in rest if line.version > anchor.version]
            return anchor.version, "older kept updates were removed", later
        break
    if written_back is None:
        held.weights.flat.copy_(initial_weights(spec.layout, spec.init_seed))
        return 0, "", rest
    _check(
        bool(written_back.weights),
        "weights",
        f"the log was lost before version {since}, and the weights of that version were not kept, so a replay cannot "
        "start there: give every aggregator --keep-updates",
    )
    _load(held, written_back, archive)
    return since, "the log before it was lost", rest


def _load(held: Held, anchor: Anchor | AnchorLine | RollbackLine, archive: Archive) -> None:
    state = archive.load_weights(anchor.server_state) if anchor.server_state else None
    held.load(archive.load_weights(anchor.weights), state, anchor.optimizer)


def _begin_late(
    history: Sequence[Step | AnchorLine],
    archive: Archive,
    *,
    upto: int,
    lineage: str,
    held: Held,
    spec: Spec,
) -> tuple[int, str, list[Step]]:
    """As `_begin`, but from the last version before `upto` from which all that made the later ones is kept."""
    steps = [line for line in history if not isinstance(line, AnchorLine) and line.version <= upto]
    for start in reversed(starts(history, archive, lineage)):
        if start.version <= upto and are_kept(steps, start.version, upto, archive):
            if start.line:
                _load(held, start.line, archive)
            else:
                held.weights.flat.copy_(initial_weights(spec.layout, spec.init_seed))
            return start.version, start.why, [line for line in steps if line.version > start.version]
    raise UpdateError(f"version {upto} is not kept", about="version")


def _roll_back(
    line: RollbackLine, version: int, earlier: Mapping[int, Held], archive: Archive, held: Held
) -> None:
    """Put the values of an earlier version, recomputed or else kept, in place of those of `version`."""
    _check_follows(line, version)
    to = line.rolled_back_to
    if to in earlier:
        held.take(earlier[to])
    else:
        are_there = archive.holds_weights(line.weights)
        are_there &= not line.server_state or archive.holds_weights(line.server_state)
        _check(are_there, "weights", f"it was rolled back to version {to}, whose weights are not kept")
        _load(held, line, archive)
    state = held.state_file
    found = digest_of(held.weights.file), "" if state is None else digest_of(state)
    _check(
        found == (line.weights, line.server_state),
        "weights",
        f"it was rolled back to other weights or another server state than those of version {to}",
    )


def _fold_line(
    line: AppliedLine,
    version: int,
    spec: Spec,
    rule_sets: Mapping[int, RuleSet],
    archive: Archive,
    delta: torch.Tensor,
    held: Held,
) -> Header:
    """Check a log line against its kept update, and fold the update into the weights of `version`; its header."""
    _check_follows(line, version)
    header, parts = archive.load(line.update)
    _check((header.run, header.seq) == (line.run, line.seq), "update", "the kept update is another one")
    _check(
        line.rules in rule_sets, "rules", f"it was decided under rules {line.rules}, which are not in the log"
    )
    rules, staleness = rule_sets[line.rules].aggregation, staleness_of(version, header.base_version)
    factor = rules.factor(staleness, line.weight)
    _check(line.staleness == staleness, "staleness", f"staleness {line.staleness}, should be {staleness}")
    _check(line.factor == factor, "factor", f"factor {line.factor!r}, should be {factor!r}")
    if line.new_state:
        held.optimizer = ""
    _check(
        held.lacks_state(rules) == bool(line.new_state),
        "server_state",
        "the server state before it was not kept: a replay cannot go on from here",
    )
    decode(parts, spec.wire_format, delta)
    fold(
        held.next_values(held, rules),
        delta,
        ServerStep(rules, factor, bool(line.ends_round)),
        out=held.values,
    )
    held.optimizer = rules.server_optimizer if has_state(rules) else ""
    return header


def _check_follows(line: Step, version: int) -> None:
    _check(
        line.version == version + 1,
        "version",
        f"the log goes from version {version} to {line.version}: the lines between are gone from Redis",
    )


def _check(true: bool, about: str, problem: str) -> None:
    if not true:
        raise UpdateError(problem, about=about)
