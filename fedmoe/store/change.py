"""Changes that an operator makes while an expert is served and trained: its rules, and its gateway weight."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fedmoe.errors import DamagedExpertError, SettingsError, StaleStateError
from fedmoe.protocol.lines import RulesLine
from fedmoe.protocol.records import Meta, check_not_removed
from fedmoe.protocol.rules import RuleSet
from fedmoe.store.commit import Commit
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.lifecycle import new_id

PATIENCE_S = 20.0  # how long a change is retried while a busy aggregator commits
PAUSE_S = 0.01


def whole_expert(store: ExpertStore) -> tuple[Meta, int]:
    """The meta of an expert, and the version in the last line of its log (-1 if there is none).

    Raises:
        SettingsError: if the expert does not exist.
        DamagedExpertError: if it is damaged; RemovedExpertError if it was removed.
    """
    found = store.condition()
    if found.meta is None and not found.commit and not found.weights_commit:
        raise SettingsError(no_such_expert(store.connection, store.name), about=store.name)
    if found.meta is None or found.damage:
        raise DamagedExpertError(store.name, found.damage)
    return found.meta, found.logged_version


def change_rules(
    store: ExpertStore, settings: Mapping[str, Any], *, clock: Callable[[], float] = time.time
) -> tuple[RuleSet, RuleSet]:
    """Change some rules (named as in `RuleSet.settings`) in one commit; returns the rule sets before and after.

    The lease holder's next commit then fails: it loads the expert again and decides its batch under the new rules. If
    no value differs, nothing is written.

    Raises:
        SettingsError: if a value breaks its bound, or the expert does not exist.
        DamagedExpertError: if it is damaged; RemovedExpertError if it was removed.
        StaleStateError: if another process committed meanwhile; nothing was changed, try again.
    """
    return _change(store, lambda meta: meta.rules.changed(settings), clock)


def hold(store: ExpertStore, why: str, *, clock: Callable[[], float] = time.time) -> tuple[RuleSet, RuleSet]:
    """Hold an expert, in one commit: no update is applied until it is released; one that is held stays as it is.

    Entries stay on the stream, and workers train on: what they trained is in their next updates. Returns the rule sets
    before and after; raises the errors of `change_rules`.
    """
    return _change(store, lambda meta: meta.rules if meta.rules.held else meta.rules.hold(why), clock)


def release(store: ExpertStore, *, clock: Callable[[], float] = time.time) -> tuple[RuleSet, RuleSet]:
    """Release a held expert, in one commit: the updates that wait are decided.

    From then on, a worker's validation loss is compared only with those it measures after the release.

    Returns the rule sets before and after, which are equal if it is not held; raises the errors of `change_rules`.
    """
    return _change(
        store, lambda meta: meta.rules.release(meta.version) if meta.rules.held else meta.rules, clock
    )


def _change(
    store: ExpertStore, new: Callable[[Meta], RuleSet], clock: Callable[[], float]
) -> tuple[RuleSet, RuleSet]:
    meta, logged = whole_expert(store)
    if store.is_claimed():
        raise StaleStateError(
            f"Redis has an older state of {store.name} (version {meta.version}) than an aggregator retains; the "
            "aggregator writes it back first",
            about="rollback",
        )
    before, after = meta.rules, new(meta)
    if after != before:
        # If the log was lost, the next aggregator to serve the expert must notice it: so this line repeats the last
        # logged version.
        version = meta.version if meta.version == 0 else logged
        line = RulesLine(version=version, changed=before.differences(after), ended=before)
        store.commit(
            Commit(
                on=meta.commit,
                generation=store.connection.generation,
                meta=replace(meta, commit=new_id(), rules=after, updated_at=clock()),
                log=[line.to_fields()],
            )
        )
    return before, after


def change_rules_soon(store: ExpertStore, settings: Mapping[str, Any]) -> tuple[RuleSet, RuleSet]:
    """Retry `change_rules` for at most PATIENCE_S while an aggregator commits; raises the same errors."""
    return soon(lambda: change_rules(store, settings))


def soon(change: Callable[[], tuple[RuleSet, RuleSet]]) -> tuple[RuleSet, RuleSet]:
    """Retry a change for at most PATIENCE_S while an aggregator commits; raises the errors of the change."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return change()
        except StaleStateError as error:
            if time.monotonic() > until:
                raise StaleStateError(
                    f"nothing was changed, try again ({error})", about=error.about
                ) from error
            time.sleep(PAUSE_S)


def check_weight(weight: float) -> None:
    """Raise SettingsError unless `weight` is a valid gateway weight."""
    if not 0 <= weight < float("inf"):
        raise SettingsError(
            f"the gateway weight must be a number of at least 0, not {weight!r}", about="gateway_weight"
        )


def set_gateway_weight(connection: Connection, name: str, weight: float) -> str:
    """Set an expert's gateway weight; returns the previous weight as stored text ("" if it was not listed).

    Raises:
        SettingsError: if the weight is not a number of at least 0, or the expert does not exist.
        RemovedExpertError: if it was removed.
    """
    check_weight(weight)
    key, meta = connection.keys.experts, connection.keys.expert(name).meta
    of_expert, of_list = connection.at(meta), connection.at(key)
    with of_expert.errors():
        raw = of_expert.client.hgetall(meta)
    with of_list.errors():
        listed = of_list.client.hget(key, name)
    check_not_removed(raw)
    if listed is None and not raw:
        raise SettingsError(no_such_expert(connection, name), about=name)
    with of_list.errors():
        of_list.client.hset(key, name, f"{weight:g}")
    return (listed or b"").decode(errors="backslashreplace")


def no_such_expert(connection: Connection, name: str) -> str:
    """The message that this expert does not exist, with the names of the existing experts."""
    key = connection.keys.experts
    there = connection.at(key)
    with there.errors():
        names = sorted(one.decode(errors="replace") for one in there.client.hkeys(key))
    return f"there is no expert {name!r} at {connection.settings.shown}; there are: {', '.join(names) or 'none yet'}"
