"""`--keep-updates-for`: what is old goes, and what stays can be replayed from weights that were kept."""

import os
from pathlib import Path

import pytest

from consumers.expert import Expert
from consumers.retention import AT_ONCE, Retention
from consumers.verify import Replay, replay
from fedmoe.cli.options import Duration
from fedmoe.errors import SettingsError
from fedmoe.protocol.layout import AdapterBuffer
from fedmoe.protocol.lora_init import initial_weights
from fedmoe.settings import AggregatorSettings
from fedmoe.store.archive import ANCHOR_SUFFIX, SUFFIX, WEIGHTS_SUFFIX, Archive
from fedmoe.store.connection import Connection
from fedmoe.store.expert import ExpertStore
from fedmoe.store.gateway import GatewayStore
from tests.errors import raises
from tests.federation import ScriptedWorker, first_meta, serve, small_spec
from tests.processes import fedmoe_here

pytestmark = pytest.mark.one_server

DAY = 86_400.0
NOW = 1_700_000_000.0  # in the past: a file that was just written is not old


class Kept:
    """An expert at its real version 0, a worker, and an aggregator that keeps updates for a week, day by day."""

    def __init__(self, connection: Connection, directory: Path) -> None:
        spec = small_spec(wire_format="int8")
        buffer = AdapterBuffer(spec.layout)
        buffer.flat.copy_(initial_weights(spec.layout, spec.init_seed))
        store = ExpertStore(connection, "sql_expert")
        store.create(spec, first_meta(spec), buffer.file, gateway_weight=1.0)
        self.directory = directory / "sql_expert"
        self.archive = Archive(self.directory)
        self.expert = Expert(store, spec, aggregator="test", archive=self.archive)
        self.expert.load()
        self.now = NOW
        self.retention = self.started_again()
        self.worker = ScriptedWorker(connection, spec)

    def started_again(self) -> Retention:
        return Retention(self.archive, 7 * DAY, clock=lambda: self.now)

    def day(self, updates: int = 1) -> None:
        """A day on which updates are applied."""
        self.now += DAY
        before = set(self.directory.iterdir())
        for _ in range(updates):
            self.worker.push(0.01)
            assert serve(self.expert) == ["applied"]
            self.worker.pull()
            self.retention.tend(self.expert)
        for file in set(self.directory.iterdir()) - before:
            os.utime(file, (self.now, self.now))
        self.retention.tend(self.expert)

    def count(self, suffix: str) -> int:
        return len(list(self.directory.glob("*" + suffix)))

    def replay(self) -> Replay:
        store = GatewayStore(self.expert.store.connection)
        meta, weights, lines = store.history("sql_expert")
        done = replay(self.expert.spec, meta, lines, Archive(self.directory, read_only=True))
        assert done.problem or done.weights.same_values(weights)
        return done


@pytest.fixture
def kept(connection: Connection, tmp_path: Path) -> Kept:
    """Of one expert."""
    return Kept(connection, tmp_path)


def test_old_updates_go_and_the_rest_replays_from_kept_weights(kept: Kept, redis_url: str) -> None:
    """A week stays for a week; afterwards as much as before is there, and `verify` says from which version."""
    for _ in range(7):
        kept.day()
    assert kept.count(SUFFIX) == 7
    assert (kept.replay().since, kept.replay().problem) == (0, "")
    for _ in range(20):
        kept.day()
    assert 7 <= kept.count(SUFFIX) <= 10
    assert kept.count(WEIGHTS_SUFFIX) == kept.count(ANCHOR_SUFFIX) <= 9
    done = kept.replay()
    assert (done.version, done.problem) == (27, "")
    assert 17 <= done.since <= 20
    told = fedmoe_here("verify", "--redis", redis_url, "--keep-updates", str(kept.directory.parent))
    since = f"from version {done.since} (older kept updates were removed)"
    said = f"sql_expert: replayed {27 - done.since} of 27 updates {since}, equal\n"
    assert (told.returncode, told.stdout) == (0, said)


def test_a_restarted_aggregator_goes_on_with_the_anchors_there_are(kept: Kept) -> None:
    """One anchor a day, not one at each start; half-written files of a killed one go, too."""
    half = kept.directory / ".half.update.1234"
    half.write_bytes(b"")
    os.utime(half, (NOW - DAY, NOW - DAY))
    for _ in range(12):
        kept.day()
        kept.retention = kept.started_again()
        kept.retention.tend(kept.expert)
        kept.retention.tend(kept.expert)
    assert kept.count(ANCHOR_SUFFIX) <= 9
    assert not half.exists()
    assert kept.replay().problem == ""


def test_whatever_was_removed_when_it_was_killed_the_rest_replays(kept: Kept) -> None:
    """The anchors go before their updates, so that none is left to begin at whose updates are gone."""
    for _ in range(8):
        kept.day(updates=3)
    kept.now += 7 * DAY
    kept.retention.mark_expired(kept.now - 7 * DAY)
    doomed = kept.retention.expired
    assert len(doomed) > 20
    for file in doomed:
        file.unlink()
        done = kept.replay()
        assert done.problem == ""
        assert done.since in (0, *range(1, 25))
    assert kept.replay().since == max(a.version for a in kept.archive.anchors().values())


def test_a_missing_update_after_the_anchor_is_still_named(kept: Kept) -> None:
    """Only what is before it was removed on purpose."""
    for _ in range(20):
        kept.day()
    since = kept.replay().since
    _, _, lines = GatewayStore(kept.expert.store.connection).history("sql_expert")
    lost = next(line for line in lines if int(line["version"]) == since + 2)
    (kept.directory / (lost["update"] + SUFFIX)).unlink()
    assert kept.replay().problem.startswith(f"version {since + 2}: the file of update ")


def test_an_anchor_of_a_history_that_was_undone_is_not_used(kept: Kept) -> None:
    """It is of the same version, but of another update."""
    for _ in range(20):
        kept.day()
    (first, anchor), *_ = kept.archive.anchors().items()
    first.write_text(first.read_text().replace(anchor.run, "9-00000000"))
    done = kept.replay()
    assert (done.problem, done.since) == ("", anchor.version + 1)


def test_little_is_removed_at_a_time_and_a_full_disk_stops_nobody(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A commit must not wait for thousands of files."""
    for _ in range(8):
        kept.day()
    for number in range(3 * AT_ONCE):
        old = kept.directory / f"{number:064}{SUFFIX}"
        old.write_bytes(b"")
        os.utime(old, (NOW - DAY, NOW - DAY))
    kept.now += 7 * DAY
    kept.retention = kept.started_again()
    monkeypatch.setattr(
        Archive, "keep_weights", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    kept.retention.tend(kept.expert)
    assert "cannot remove old updates or write weights in" in caplog.text
    before = kept.count("")
    kept.now += 61
    kept.retention.tend(kept.expert)
    assert kept.count("") == before - AT_ONCE


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7d", 7 * DAY),
        ("12h", 43_200.0),
        ("1.5m", 90.0),
        ("90s", 90.0),
        ("7", None),
        ("0d", None),
        ("d", None),
    ],
)
def test_a_time_has_a_unit(text: str, seconds: float | None) -> None:
    """A bare number could be seconds or days."""
    if seconds is not None:
        assert Duration().convert(text, None, None) == seconds
        return
    done = fedmoe_here("aggregator", "run", "--keep-updates-for", text)
    assert done.returncode == 2
    assert "must be a number above 0 with its unit, like 7d" in done.stderr


def test_retention_without_a_directory_is_refused() -> None:
    """It would keep nothing, and one would believe it does."""
    with raises(SettingsError, about="keep_updates_for"):
        AggregatorSettings(keep_updates_for_s=DAY)
