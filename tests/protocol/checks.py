"""What must hold in every database: each update once in one history, and the weights are the replay of it."""

import torch

from fedmoe.protocol.codec import decode
from fedmoe.protocol.layout import values_of
from fedmoe.protocol.records import Decided
from fedmoe.protocol.spec import Spec
from fedmoe.protocol.update import Header
from tests.protocol.actors import NEW_LR, Values, first_file
from tests.protocol.world import KEYS, OVERWRITTEN, TWO_CONTENTS, Db

LINEAGES = ("L", "M")  # the one of the beginning, and the one that an operator begins


def weights_of(db: Db, spec: Spec) -> Values:
    """The expert's weights as the database holds them."""
    file = db.string(KEYS.weights)
    assert file is not None
    return tuple(values_of(spec.layout, file).tolist())


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
    decided = tuple(line[:3] for line in db.log) + db.refused
    twice = [name for n, name in enumerate(decided) if name in decided[:n]]
    if twice:
        return f"update {twice[0]} is twice in the history"
    if db.refused and refuses_nothing:
        return f"update {db.refused[0]} was refused without cause"
    since, file = db.base or (0, first_file(spec))
    weights, replay = weights_of(db, spec), values_of(spec.layout, file).tolist()
    written = dict(db.written)
    if TWO_CONTENTS in written.values():
        return "one name of an update has two contents"
    if db.rules_went_back:
        return "the operator's rules were taken back"
    for worker, run, seq, rules in db.log:
        lineage = Header.unpack(written[KEYS.header(worker, run, seq)]).lineage
        if lineage != meta["lineage"]:
            return f"an update of another lineage, {lineage}, is in the history"
        delta = _decoded(written[KEYS.part(worker, run, seq, 0)], len(replay))
        factor = 1.0 if rules == 1 else NEW_LR
        replay = [a + factor * b for a, b in zip(replay, delta, strict=True)]
    if list(weights) != replay:
        return f"the weights are {weights}, a replay of the log gives {tuple(replay)}"
    if any(value not in (0.0, NEW_LR, 1.0) for value in weights):
        return f"a unit of training counts twice: {weights}"
    if int(meta["version"]) != since + len(db.log):
        return "the version is not the number of updates in the log"
    return ""


def check_vectors(db: Db) -> str:
    """What is wrong with the domain vectors when nothing moves any more, or nothing."""
    decided = {worker: Decided.from_json(text.encode()) for worker, text in db.hash(KEYS.decided).items()}
    applied = {worker for worker, *_ in db.log} | {
        name for name, one in decided.items() if one.how == "applied"
    }
    silent = applied - db.hash(KEYS.vectors).keys()
    return f"{min(silent)} has updates in the history and no domain vector" if silent else ""


def _decoded(part: bytes, numel: int) -> list[float]:
    out = torch.empty(numel)
    decode([part], "fp32", out)
    return list(out.tolist())
