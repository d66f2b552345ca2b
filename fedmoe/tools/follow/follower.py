"""Follows the gateway: exports every new version that is no worse, and lets a server serve it.

A version passes these steps, and each is repeated until it is done, whatever fails meanwhile:

    found      it is in Redis, and it is not the served one
    judged     its validation loss is no worse than that of the served version, where both are known; a served version
               that an operator rolled back is replaced in any case; a gateway of the other kind, or one that was
               created again, is served only if both losses are known
    written    it has a directory of its own
    served     the server has loaded it, or the operator's command has ended with 0; then `current` is moved
    the rest   the server unloads the versions before that were loaded from here; all directories but the last ones are
               removed

A server that was restarted is told to load the served version again.
"""

import json
import logging
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from fedmoe.errors import (
    AdapterRefusedError,
    FedMoEError,
    UnknownExpertError,
)
from fedmoe.protocol.names import GATEWAY
from fedmoe.store.gateway import GatewayStore
from fedmoe.tools.card import max_lora_rank
from fedmoe.tools.export import Export, read_gateway, trained_gateway, version_name
from fedmoe.tools.export_files import CONFIG_FILE, WEIGHTS_FILE
from fedmoe.tools.follow.directory import VersionDirectory
from fedmoe.tools.follow.loaded import LoadedVersions
from fedmoe.tools.follow.servers import AdapterServer
from fedmoe.tools.losses import Validation
from fedmoe.util.backoff import Backoff

logger = logging.getLogger(__name__)

RETRY_REFUSED_S = 60.0  # a server may be restarted with other options


class Judge(Protocol):
    """Measures the loss of an adapter's file and configuration."""

    def __call__(self, file: bytes, config: dict[str, object]) -> float:
        """Nats per token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowSettings:
    """What is followed, and how it is served.

    Args:
        kind: "trained" or "merged"; "" for the trained gateway as soon as there is one, until then the merged one.
        name: first part of the versions' names.
        options: text of all options that change the exported files, so that they change the name.
        min_gain: by how much (nats per token) the validation loss must fall; None: it must not rise.
        keep: number of directories that stay.
        interval_s: between two looks at Redis and the server.
        command: run by a shell for each version, "" for none.
    """

    kind: str = ""
    name: str = GATEWAY
    options: str = ""
    min_gain: float | None = None
    keep: int = 3
    interval_s: float = 5.0
    command: str = ""


class Found(NamedTuple):
    """A version in Redis."""

    kind: str
    name: str


class Follower:
    """Brings directory and server up to date with Redis, again and again.

    Args:
        store: of the federation.
        directory: of the versions.
        settings: see there.
        server: to load the versions into, None for none.
        shape: gives an export its rank, dtype and base model's name.
        judge: measures a version's loss; None takes the one that the workers measured, where they do.
    """

    def __init__(
        self,
        store: GatewayStore,
        directory: VersionDirectory,
        settings: FollowSettings,
        *,
        server: AdapterServer | None = None,
        shape: Callable[[Export], Export] = lambda export: export,
        judge: Judge | None = None,
    ) -> None:
        self._store, self._directory, self._settings = store, directory, settings
        self._kind = settings.kind  # to look for
        self._loaded = LoadedVersions(server, directory) if server else None
        self._shape, self._judge = shape, judge
        self._candidate = ""  # written and not yet served
        self._left_out = ""  # judged worse, or not comparable
        self._said_why = ""  # it is left out
        self._refused: dict[str, float] = {}  # name -> when, by time.monotonic()
        self._rows = f"data {secrets.token_hex(4)}"  # another process may measure on other rows
        self._of_served: tuple[str, Validation] | None = None  # measured by `judge` in this process
        self._without_loss = False
        self._stop = threading.Event()
        self._finding, self._serving = Backoff("gateway", logger), Backoff("server", logger)

    def run(self, stop: threading.Event, *, once: bool = False) -> bool:
        """Follow until `stop` is set, or look once; False if the last look left something undone."""
        self._stop = stop
        if self._settings.command and (current := self._directory.current):
            logger.info("%s is current already: the command runs for each version after it", current)
        while True:
            done = self._attempt(self._find, self._finding) & self._attempt(self._serve, self._serving)
            if once or stop.wait(self._settings.interval_s):
                return done and not self._candidate

    def _attempt(self, step: Callable[[], None], backoff: Backoff) -> bool:
        """Do one step; a problem is reported once, and again every half minute."""
        if self._stop.is_set():
            return False
        try:
            step()
        except (FedMoEError, OSError) as error:
            if not self._stop.is_set():
                backoff.failed(error)
            return False
        backoff.ok()
        return True

    def _find(self) -> None:
        """Look for a new version; judge and write it.

        Raises:
            RedisUnavailableError, UnknownExpertError, SpecError: if there is none that can be read.
            SettingsError: if it cannot be written.
        """
        known = (self._directory.current, self._candidate, self._left_out)
        if (found := self._look()).name in known:
            return
        export = read_gateway(self._store, found.kind)
        name = export.version_name(self._settings.name, options=self._settings.options)
        if name in known:  # an older one was read again
            return
        export = self._shape(export)
        measured = self._measured(export)
        if why := "" if self._was_rolled_back(export) else self._why_not(export, measured):
            self._left_out = name
            if why != self._said_why:  # the next version may be left out for the same reason
                self._said_why = why
                logger.info("%s is not served: %s", name, why)
            if not (self._kind or self._judge) and export.kind != self._served_kind == "merged":
                self._kind = "merged"  # its newer versions are served
                self._find()
            return
        self._said_why = ""
        if measured is not None:
            facts = {"validation_loss": measured.mean, "validation": measured.to_json()}
            export = replace(export, validation=measured, info=dict(export.info) | facts)
        if not self._directory.has(name):
            self._directory.add(name, export)
        self._candidate = name
        logger.info("%s: written, built from %s", name, export.versions)
        self._prune()  # also while the server is away, or the disk would fill up

    def _look(self) -> Found:
        """The present version, by a few small reads."""
        kind = self._kind
        meta = None if kind else trained_gateway(self._store)
        if kind == "trained":
            try:
                meta = self._store.meta(GATEWAY)
            except UnknownExpertError:
                read_gateway(self._store, kind)  # says what to do
                raise
        if meta is not None:
            return Found("trained", self._name(meta.version, {GATEWAY: meta.weights_commit}))
        merged = self._store.merged()
        if merged is None:
            read_gateway(self._store, "merged")  # says why there is none
            raise UnknownExpertError("there is no merged gateway yet", about="gateway")
        commits = {name: one.weights_commit for name, one in merged.experts.items()}
        total = sum(one.version for one in merged.experts.values())
        return Found("merged", self._name(total, commits, merged.settings))

    def _name(self, version: int, commits: dict[str, str], settings: str = "") -> str:
        chosen = self._settings
        return version_name(chosen.name, version, commits, settings=settings, options=chosen.options)

    def _measured(self, export: Export) -> Validation | None:
        """What is known of its validation loss; that of a merged gateway only `judge` can measure."""
        if self._judge:
            loss = self._judge(export.file, dict(export.config))
            return Validation(version=export.version, losses={self._rows: loss})
        return export.validation if export.kind == "trained" else None

    def _measured_served(self) -> Validation | None:
        """The same of the version that is served."""
        current = self._directory.current
        path = self._directory.path(current)
        known = Validation.from_json(self._directory.info(current).get("validation"))
        if self._judge and (
            known is None or self._rows not in known.losses
        ):  # measured on other rows, or never
            if self._of_served is None or self._of_served[0] != current:
                config = json.loads((path / CONFIG_FILE).read_bytes())
                loss = self._judge((path / WEIGHTS_FILE).read_bytes(), config)
                self._of_served = (current, Validation(version=0, losses={self._rows: loss}))
            return self._of_served[1]
        return known

    def _was_rolled_back(self, export: Export) -> bool:
        """True if an operator rolled the served version back: it is replaced, whatever the losses."""
        meta = export.metas.get(GATEWAY)
        match self._directory.info(self._directory.current):
            case {"lineage": str(lineage), "built_from": {"gateway": {"version": int(version)}}} if meta:
                return meta.lineage == lineage and meta.rolled_back.holds(version)
        return False

    def _is_of_same_build(self, export: Export) -> bool:
        """True if the served version was made from the same weights, perhaps with other options."""
        served = self._directory.info(self._directory.current)
        made_from = dict(export.info) | {"built_from": export.built_from}
        return all(served.get(key) == made_from.get(key) for key in ("built_from", "lineage", "settings"))

    def _why_not(self, export: Export, measured: Validation | None) -> str:
        """Why this version must not be served; "" if it may be served. `measured` is its validation loss, if known."""
        if not (current := self._directory.current):
            return ""
        same = self._is_of_same_build(export)  # only --rank, --dtype or --base-name changed
        if same and not self._judge:
            return ""
        served = self._measured_served()
        gain = measured.gain_over(served) if measured and served else None
        if measured is None or served is None or gain is None:
            if other := self._is_another(export):
                return (
                    f"it is {other[0]}, and no validation loss of both is known: give rows to measure both on "
                    f"(--data), or take it without a measurement ({other[1]})"
                )
            if self._settings.min_gain is not None and not self._without_loss:
                self._without_loss = True
                logger.warning(
                    "no validation loss is known of both versions, so --min-gain is not applied: give rows to measure "
                    "it on (--data)"
                )
            return ""
        made_again = self._directory.info(current).get("lineage") != export.info.get("lineage")
        if not self._judge and not made_again and measured.version <= served.version:
            return f"its workers have measured no validation loss since {current}, which is served"
        if gain >= (0.0 if same else self._settings.min_gain or 0.0):
            return ""
        change = f"{-gain:.4f} above" if gain < 0 else f"only {gain:.4f} below"
        return f"its validation loss, {measured.mean:.4f}, is {change} that of {current}, which is served"

    @property
    def _served_kind(self) -> str:
        """The kind of the served version, "" if it is unknown."""
        return str(self._directory.info(self._directory.current).get("kind", ""))

    def _is_another(self, export: Export) -> tuple[str, str] | None:
        """What this gateway is, if it does not continue the served one, and how to take it; None if it does."""
        current = self._directory.current
        served = self._directory.info(current)
        kind = self._served_kind or export.kind
        if kind != export.kind:
            if self._settings.kind:  # the operator asks for this kind
                return None
            return f"the {export.kind} gateway, {current} is the {kind} one", f"--kind {export.kind}"
        before, now = _lineages(served), _lineages(export.info)
        if again := sorted(name for name in before.keys() & now.keys() if before[name] != now[name]):
            what = f"a merge with {', '.join(again)}" if export.kind == "merged" else "a gateway"
            return f"{what} created again since {current}, which is served", "in a new --dir"
        if before and now and not before.keys() & now.keys():
            return f"a merge of other experts than {current}, which is served", "in a new --dir"
        return None

    def _serve(self) -> None:
        """Have the newest version served, or the one before if that is refused.

        Raises:
            ServerAwayError: if the server cannot be reached.
            SettingsError: if `current` cannot be moved.
        """
        current = self._directory.current
        self._refused = {n: when for n, when in self._refused.items() if n in (self._candidate, current)}
        for name in filter(None, dict.fromkeys((self._candidate, current))):
            since = self._refused.get(name)
            if since is not None and time.monotonic() - since < RETRY_REFUSED_S:
                continue
            try:
                self._put(name)
            except AdapterRefusedError as error:
                self._refused[name] = time.monotonic()
                self._report_refusal(name, error)
            else:
                self._refused.pop(name, None)
                return

    def _report_refusal(self, name: str, error: AdapterRefusedError) -> None:
        rank = _rank(self._directory, name)
        hint = (
            f" (it has rank {rank}: --max-lora-rank {max_lora_rank(rank)})"
            if rank and error.about == "refused"
            else ""
        )
        logger.warning(
            "%s is not served: %s%s; trying again in a minute, and with the next version", name, error, hint
        )

    def _put(self, name: str) -> None:
        there = self._loaded.load(name) if self._loaded else set()
        if name != self._directory.current:
            if self._settings.command:
                self._run_command(name)
            self._directory.switch(name)
            logger.info("%s: is the current version now", name)
        if name == self._candidate:
            self._candidate = ""
        if self._loaded:
            self._loaded.unload(there, but=name)
        self._prune()

    def _prune(self) -> None:
        """Remove all directories but the newest, the served one and the one that is to be served."""
        self._directory.prune(self._settings.keep, {self._directory.current, self._candidate})

    def _run_command(self, name: str) -> None:
        """Run the operator's command for a version.

        Raises:
            AdapterRefusedError: if it fails, or a stop cut it off.
        """
        names = {"FEDMOE_NAME": name, "FEDMOE_DIR": str(self._directory.path(name))}
        names["FEDMOE_BEFORE"] = self._directory.current
        process = subprocess.Popen(
            ["sh", "-c", self._settings.command], env=os.environ | names, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            while (code := process.poll()) is None and not self._stop.wait(0.05):
                pass
        finally:
            with suppress(ProcessLookupError):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
        if code != 0:
            how = "was stopped" if code is None else f"ended with exit code {code}"
            raise AdapterRefusedError(f"the command {self._settings.command!r} {how}", about="run")


def _lineages(info: Mapping[str, object]) -> dict[str, object]:
    """Expert -> its lineage, as far as fedmoe.json knows it."""
    match info:
        case {"lineage": str(lineage)} if lineage:
            return {GATEWAY: lineage}
        case {"lineages": dict(lineages)}:
            return lineages
    return {}


def _rank(directory: VersionDirectory, name: str) -> int:
    with suppress(OSError, ValueError, LookupError, TypeError):
        return int(json.loads((directory.path(name) / CONFIG_FILE).read_bytes())["r"])
    return 0
