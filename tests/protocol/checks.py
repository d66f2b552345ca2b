"""What must hold in every database: each update once in one history, and weights and server state are its replay."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fedmoe.errors import SpecError
from fedmoe.protocol.codec import decode
from fedmoe.protocol.exact import Exact, complete
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.records import Decided
from fedmoe.protocol.rollback import RolledBack
from fedmoe.protocol.rules import RuleSet
from fedmoe.protocol.server import has_state
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from fedmoe.store.parts import part_keys
from tests.protocol.actors import NEW_LR, Values, first_file
from tests.protocol.world import KEYS, OVERWRITTEN, ROLLBACK, TWO_CONTENTS, Db

_OF_PARTS = (f"{KEYS.weights}:", f"{KEYS.server_state}:", f"{KEYS.tail}:")
LINEAGES = ("L", "M")  # the one of the beginning, and the one that an operator begins


class At(NamedTuple):
    """What a version is: its weights, and its server state if it has one."""

    weights: Values
    state: Values | None = None


def exact_of(db: Db, spec: Spec) -> Exact:
    """The expert's weights and server state as the database holds them, by its own rules.

    Raises:
        SpecError: if they cannot be told; the text says why.
    """
    decided, tail = (
        {k.encode(): _raw(v) for k, v in db.hash(key).items()} for key in (KEYS.decided, KEYS.tail)
    )
    strings = dict(db.strings)

    def copies(token: str, count: int) -> Iterator[bytes | None]:
        return (strings.get(KEYS.tail_part(token, index)) for index in range(count))

    condition, exact = complete(
        db.string(KEYS.spec), {k.encode(): _raw(v) for k, v in db.hash(KEYS.meta).items()}, decided,
        weights=db.file(KEYS.weights), server_state=db.file(KEYS.server_state), tail=tail, copies=copies,
    )  # fmt: skip
    if exact is None:
        raise SpecError(condition.damage, about="damage")
    return exact


def weights_of(db: Db, spec: Spec) -> Values:
    """The expert's exact weights."""
    return tuple(values_of(spec.layout, exact_of(db, spec).weights).tolist())


def _raw(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def check_db(db: Db, spec: Spec, *, refuses_nothing: bool) -> str:
    """What is wrong with a database, or nothing."""
    if db.gone:
        left = [key for key in (KEYS.spec, KEYS.weights) if db.string(key)]
        left += [key for key, _ in db.hashes if key != KEYS.claims]
        return f"of the expert only {', '.join(left)} is there" if left else ""
    meta = db.hash(KEYS.meta)
    if meta["lineage"] not in LINEAGES:
        return f"nobody asked for the new lineage {meta['lineage']}"
    if db.base == OVERWRITTEN:
        return "an expert was written back over one that was there"
    decided = tuple(line[:3] for line in db.log if line[0] != ROLLBACK) + db.refused
    twice = [name for n, name in enumerate(decided) if name in decided[:n]]
    if twice:
        return f"update {twice[0]} is twice in the history"
    rolled_back = RolledBack.from_json(meta["rolled_back"])
    written = dict(db.written)
    for name in db.refused if refuses_nothing else ():
        if not rolled_back.holds(Header.unpack(written[KEYS.header(*name)]).base_version):
            return f"update {name} was refused without cause"
    since = db.base[0] if db.base else 0
    try:
        exact = exact_of(db, spec)
    except SpecError as error:
        return f"the expert is damaged: {error}"
    if wrong := _check_parts(db):
        return wrong
    weights = _values_of(spec, exact.weights)
    assert weights is not None
    if TWO_CONTENTS in written.values():
        return "one name of an update has two contents"
    if db.rules_went_back:
        return "the operator's rules were taken back, or passed over"
    if db.applied_while_held:
        return "an update was applied while the expert was held"
    for worker, run, seq, *_ in db.log:
        if worker == ROLLBACK:
            continue
        lineage = Header.unpack(written[KEYS.header(worker, run, seq)]).lineage
        if lineage != meta["lineage"]:
            return f"an update of another lineage, {lineage}, is in the history"
    replay = list(versions_of(db, spec).values())[-1]
    if weights != replay.weights:
        return f"the weights are {weights}, a replay of the log gives {replay.weights}"
    if meta.get("server_state"):
        now = _values_of(spec, exact.server_state)
        if now != replay.state:
            return f"the server state is {now}, a replay of the log gives {replay.state}"
    elif replay.state is None and any(value not in (0.0, NEW_LR, 1.0) for value in weights):
        return f"a unit of training counts twice: {weights}"
    if int(meta["version"]) != since + len(db.log):
        return "the version is not the number of lines in the log"
    if len(rolled_back.intervals) != sum(line[0] == ROLLBACK for line in db.log) and not db.base:
        return "meta and the log do not tell of the same rollbacks"
    return ""


def _check_parts(db: Db) -> str:
    """What is wrong with the parts of weights and tail, or nothing: those in use stay, and no others do."""
    named = {*part_keys(KEYS, db.parts), *db.copies}
    there = {key for key, _ in db.strings if key.startswith(_OF_PARTS)}
    if short := sorted(named & db.volatile):
        return f"{short[0]} is in use and expires"
    if stray := sorted(there - named - db.volatile):
        return f"{stray[0]} is of no use and stays for ever"
    return ""


def check_vectors(db: Db) -> str:
    """What is wrong with the domain vectors when nothing moves any more, or nothing."""
    decided = {worker: Decided.from_json(text.encode()) for worker, text in db.hash(KEYS.decided).items()}
    applied = {worker for worker, *_ in db.log if worker != ROLLBACK}
    applied |= {name for name, one in decided.items() if one.how == "applied"}
    silent = applied - db.hash(KEYS.vectors).keys()
    return f"{min(silent)} has updates in the history and no domain vector" if silent else ""


def versions_of(db: Db, spec: Spec) -> dict[int, At]:
    """Each version of the present history, by a replay of the log."""
    since, *files = db.base or (0, first_file(spec), None)
    weights, state = (_values_of(spec, file) for file in files)
    assert weights is not None
    rules_now = RuleSet.from_json(db.hash(KEYS.meta)["rules"]).aggregation
    is_changed = rules_now.lr == NEW_LR  # otherwise later rules only hold and release
    momentum = rules_now.server_momentum if has_state(rules_now) else None
    versions = {since: At(weights, state)}
    for version, line in enumerate(db.log, since + 1):
        if line[0] == ROLLBACK:
            weights, state = versions.get(line[3], At(weights, state))
        else:
            *_, rules, ends_round, new_state = line
            factor, delta = (NEW_LR if rules > 1 and is_changed else 1.0), delta_in(db, line, spec)
            weights = _plus(weights, factor, delta)
            if momentum is not None:
                before = (0.0,) * len(delta) if new_state or state is None else state
                state = _plus(before, factor, delta)
                if ends_round:
                    state = tuple(momentum * value for value in state)
                    weights = _plus(weights, 1.0, state)
        versions[version] = At(weights, state)
    return versions


def _plus(values: Values, factor: float, more: Iterable[float]) -> Values:
    return tuple(a + factor * b for a, b in zip(values, more, strict=True))


def _values_of(spec: Spec, file: bytes | None) -> Values | None:
    return None if file is None else tuple(values_of(spec.layout, file).tolist())


def delta_in(db: Db, line: tuple[Any, ...], spec: Spec) -> list[float]:
    """Δ of the update that a line of the log names."""
    worker, run, seq, *_ = line
    return _decoded(dict(db.written)[KEYS.part(worker, run, seq, 0)], spec)


def taken_back(db: Db, spec: Spec) -> frozenset[int]:
    """The units of training that some rollback of the present history took back."""
    since = db.base[0] if db.base else 0
    units: set[int] = set()
    for version, line in enumerate(db.log, since + 1):
        if line[0] == ROLLBACK:
            lines = enumerate(db.log[: version - since - 1], since + 1)
            gone = [one for number, one in lines if number > line[3] and one[0] != ROLLBACK]
            units |= {unit for one in gone for unit in _units(delta_in(db, one, spec))}
    return frozenset(units)


def check_bases(db: Db, spec: Spec, seen: Mapping[str, Mapping[int, frozenset[int]]]) -> str:
    """What is wrong with the updates after a rollback, or nothing: none was trained on what was rolled back.

    `seen` tells of each unit of each worker, which units were in the adapter that it was trained on.
    """
    since, versions = db.base[0] if db.base else 0, versions_of(db, spec)
    rolled: set[int] = set()
    for version, line in enumerate(db.log, since + 1):
        if line[0] == ROLLBACK:
            # What an earlier rollback took back may be there again.
            rolled |= taken_back(db._replace(log=db.log[: version - since]), spec)
            rolled -= _units(versions[version].weights)
            continue
        for unit in _units(delta_in(db, line, spec)):
            if seen[line[0]].get(unit, frozenset()) & rolled:
                return (
                    f"update {line[:3]}, version {version}, was trained on what an operator had rolled back"
                )
    return ""


def _units(values: Iterable[float]) -> set[int]:
    return {unit for unit, value in enumerate(values) if value}


def _decoded(part: bytes, spec: Spec) -> list[float]:
    out = torch.empty(spec.layout.numel)
    decode([part], spec.wire_format, out)
    return list(out.tolist())
