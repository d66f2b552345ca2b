"""The dashboard's pure parts: figures from lines of the log, login, settings, and what differs between two looks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.errors import SettingsError
from fedmoe.protocol.chronicle import KEPT_STEPS, Chronicle, RawLine
from fedmoe.tools.dashboard.events import Events, differences
from fedmoe.tools.dashboard.figures import MOST_POINTS, RATE_S, figures_of, rates, thinned, throughput
from fedmoe.tools.dashboard.login import (
    ATTEMPTS,
    ATTEMPTS_OF_ALL,
    ATTEMPTS_S,
    MOST_SESSIONS,
    SESSION_S,
    Login,
)
from fedmoe.tools.dashboard.openapi import document
from fedmoe.tools.dashboard.picture import SUMMARY, Picture
from fedmoe.tools.dashboard.schemas import SCHEMAS
from fedmoe.tools.dashboard.settings import DashboardSettings, password_of
from fedmoe.tools.dashboard.show import bars, moment, spark
from tests.errors import raises

NOW = 1_700_000_000.0


def line(at: float, **fields: Any) -> RawLine:
    return f"{int(at * 1000)}-0".encode(), {k.encode(): str(v).encode() for k, v in fields.items()}


def step(i: int, *, at: float = NOW, worker: str = "alice", **more: Any) -> RawLine:
    fields = {"version": i, "loss": 2.0, "staleness": 0, "factor": 1, "norm": 1, "n_examples": 8}
    return line(at, worker=worker, **(fields | more))


def chronicle(*lines: RawLine) -> Chronicle:
    found = Chronicle()
    found.add_log(lines)
    return found


def test_contributions_are_shares_of_what_was_applied() -> None:
    """A share is of the way that the expert moved: factor × norm, not of the number of updates."""
    found = figures_of(
        chronicle(step(1, norm=3), step(2, worker="bob", factor=0.5, norm=2), step(3, worker="bob", norm=4))
    ).contributions
    assert (found["alice"].updates, found["alice"].examples, found["bob"].updates) == (1, 8, 2)
    assert (found["alice"].share, found["bob"].share) == (3 / 8, 5 / 8)


def test_rates_are_those_of_the_last_minutes() -> None:
    """Older updates do not count; an expert of a minute is not divided by five."""
    old = [step(i, at=NOW - RATE_S - 100 + i) for i in range(50)]
    new = [step(50 + i, at=NOW - 60 + i) for i in range(30)]
    assert rates(chronicle(*old, *new), NOW) == pytest.approx((30 * 60 / RATE_S, 30 * 8 / RATE_S))
    assert rates(chronicle(*new), NOW) == pytest.approx((30.0, 4.0))
    assert rates(Chronicle(), NOW) == (0.0, 0.0)
    counted = throughput(chronicle(*old, *new), NOW)["updates_per_min"]
    span = RATE_S + 100
    assert sum(counted) * span / 30 / 60 == pytest.approx(80, rel=0.01)


def test_staleness_is_counted_in_its_bucket() -> None:
    """The edges of the buckets, and what no bucket bounds."""
    found = figures_of(
        chronicle(*(step(i, staleness=s) for i, s in enumerate((0, 1, 2, 3, 4, 5, 32, 33, 900))))
    )
    assert [one["updates"] for one in found.staleness] == [1, 1, 1, 2, 1, 0, 1, 2]
    assert [one["label"] for one in bars(found.staleness)][3::4] == ["3 to 4", "33 or more"]


def test_validation_curves_are_each_workers_own() -> None:
    """By version, the newest measurement of one version."""
    found = figures_of(
        chronicle(
            step(1, val_loss=2.0, val_version=0, val_rows=48),
            step(2, worker="bob", val_loss=9.0, val_version=1, val_rows=8),
            step(3, val_loss=1.5, val_version=2, val_rows=48),
            step(4, val_loss="nan", val_version=3),
        )
    ).validation
    assert found["alice"] == {"version": [0, 2], "loss": [2.0, 1.5], "rows": 48}
    assert found["bob"]["loss"] == [9.0]


@given(st.lists(st.floats(-5, 5), max_size=2000), st.integers(1, MOST_POINTS))
def test_thinned_keeps_the_mean_and_the_last_version(losses: list[float], most: int) -> None:
    """Never more points than asked for, and the curve ends where the expert is."""
    found = list(thinned(list(enumerate(losses)), most))
    assert len(found) <= most
    if losses:
        assert found[-1][0] == len(losses) - 1
        assert min(losses) - 1e-9 <= found[0][1] <= max(losses) + 1e-9


def test_the_mean_of_huge_losses_is_finite() -> None:
    """A worker chooses the loss that it reports; JSON has no infinity."""
    huge = 1.7e308
    assert all(math.isfinite(loss) for _, loss in thinned([(1, huge), (2, huge), (3, huge)], 1))


def test_a_chronicle_keeps_the_newest_lines_only() -> None:
    """So that a dashboard that runs for months does not grow."""
    found = chronicle(*(step(i) for i in range(KEPT_STEPS + 10)))
    assert (len(found.steps), found.steps[0].version, found.edition) == (KEPT_STEPS, 10, KEPT_STEPS + 10)


def test_lines_that_make_no_sense_break_nothing() -> None:
    """Numbers that are none, a line of a later release, a time at the end of the calendar."""
    found = chronicle(
        line(2**63 / 1000, worker="w\x1b[2J<script>", version="x", loss="inf", staleness=-3, norm="nan"),
        line(NOW, something="new"),
        line(NOW, changed="lr 1 -> 2\x07", version=3),
        line(NOW, rolled_back_to=3, version=4),
        line(NOW, restored="a backup", version=5),
    )
    known = figures_of(found)
    assert "\x1b" not in next(iter(known.contributions))
    assert known.training == {"version": [], "loss": []}
    assert [one.text for one in found.changes] == [
        "rules changed: lr 1 -> 2\\x07", "rolled back to version 3 by an operator", "the log begins again: a backup",
    ]  # fmt: skip
    assert moment(found.steps[0].at) == "9999-12-31T23:59:59Z"
    json.dumps(throughput(found, NOW), allow_nan=False)


def test_a_picture_of_losses_has_its_values_in_words() -> None:
    """For those who cannot see it; a name in it is escaped."""
    assert 'aria-label="loss of &lt;b&gt;: from 2.000 to 1.000"' in spark([2.0, 1.5, 1.0], "loss of <b>")
    assert "svg" not in spark([1.0, math.nan], "x")


def worker(state: str, *, is_alive: bool = True, is_well: bool = True, problem: str = "") -> dict[str, Any]:
    return {"name": "w", "expert": "e", "state": state, "is_alive": is_alive, "is_well": is_well,
            "last_seen_s": 12.0, "problem": problem}  # fmt: skip


GONE = worker("vanished", is_alive=False, is_well=False)
FAILED = worker("failed", is_alive=False, is_well=False, problem="disk full")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (None, worker("running"), ("joined", False)),
        (None, GONE, None),
        (worker("running"), worker("running"), None),
        (worker("joining"), worker("running"), None),
        (worker("running"), worker("quiet", is_well=False), ("quiet", True)),
        (worker("quiet", is_well=False), worker("running"), ("back", False)),
        (worker("quiet", is_well=False), GONE, ("left", True)),
        (worker("running"), worker("finished", is_alive=False), ("left", False)),
        (worker("running"), FAILED, ("left", True)),
        (GONE, worker("running"), ("joined", False)),
    ],
)
def test_what_became_of_a_worker_is_one_event(
    before: dict[str, Any] | None, after: dict[str, Any], expected: tuple[str, bool] | None
) -> None:
    """Between two looks."""
    old = Picture(workers={("e", "w"): before} if before else {})
    found = list(differences(old, Picture(workers={("e", "w"): after}), NOW))
    assert [(one.kind, one.is_bad) for one in found] == ([expected] if expected else [])
    assert after is not FAILED or found[0].text.endswith("failed: disk full")


def test_each_refusal_is_told_once() -> None:
    """Although every look sees the same chronicle."""
    events, known = Events(), Chronicle()
    known.add_refusals([line(NOW, worker="w", seq=3, reason="norm")])
    events.tell({"e": known})
    events.tell({"e": known})
    known.add_refusals([line(NOW + 1, reason="no header")])
    events.tell({"e": known})
    assert [one["text"] for one in events.newest()] == [
        "e: an entry was garbage: no header", "e: update 3 of w was refused: norm",
    ]  # fmt: skip


def test_refusals_of_one_millisecond_are_all_told() -> None:
    """Redis numbers them; the second one comes after the look that saw the first."""
    events, known = Events(), Chronicle()
    at = int(NOW * 1000)
    for number in range(12):  # 10 comes after 9, as numbers do and texts do not
        known.add_refusals([(f"{at}-{number}".encode(), {b"worker": b"w", b"seq": str(number).encode()})])
        known.add_log([(f"{at}-{number}".encode(), {b"changed": str(number).encode()})])
        events.tell({"e": known})
        events.tell({"e": known})
    for kind in ("refused", "changed"):
        assert sum(one["kind"] == kind for one in events.newest()) == 12


# ---- login ----------------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("address", ["*", "10.0.0.0/8", "proxy.example.org", ""])
def test_only_addresses_are_proxies(address: str) -> None:
    """A network, a name or everybody may hold clients, who would choose their own address."""
    with raises(SettingsError, about="forwarded_allow_ips"):
        DashboardSettings(forwarded_allow_ips=("127.0.0.1", address))


def test_sessions_end_and_are_bounded() -> None:
    """By the clock, by a logout, and by newer sessions."""
    clock = Clock()
    login = Login("correct horse", clock=clock)
    first, second = login.begin(), login.begin()
    assert login.is_session(first)
    assert not login.is_session(first[:-1])
    assert not login.is_session("")
    login.end(second)
    assert not login.is_session(second)
    for _ in range(MOST_SESSIONS):
        last = login.begin()
    assert not login.is_session(first)
    clock.now += SESSION_S + 1
    assert not login.is_session(last)


def test_wrong_passwords_make_their_address_wait() -> None:
    """Others may still log in, until many addresses fail together."""
    clock = Clock()
    login = Login("correct horse", clock=clock)
    for _ in range(ATTEMPTS):
        assert login.wait_s("1.2.3.4") == 0
        assert not login.is_password("wrong", "1.2.3.4")
    assert login.wait_s("1.2.3.4") == pytest.approx(ATTEMPTS_S)
    assert login.wait_s("5.6.7.8") == 0
    assert login.is_password("correct horse", "5.6.7.8")
    clock.now += ATTEMPTS_S + 1
    assert login.wait_s("1.2.3.4") == 0
    for i in range(ATTEMPTS_OF_ALL):
        login.is_password("wrong", str(i))
    assert login.wait_s("9.9.9.9") > 0


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),  # noqa: S104  # nothing listens
     ("::", False), ("10.0.0.1", False), ("lab.example", False)],
)  # fmt: skip
def test_only_this_machine_reads_without_a_password(host: str, is_local: bool) -> None:
    """Beyond it the dashboard does not start."""
    settings = DashboardSettings(host=host)
    assert settings.is_local is is_local
    if is_local:
        assert password_of(settings, {}) == ""
    else:
        with raises(SettingsError, about="password_file"):
            password_of(settings, {})
        assert password_of(settings, {"FEDMOE_DASHBOARD_PASSWORD": "correct horse"}) == "correct horse"


@pytest.mark.parametrize(
    ("content", "mode"),
    [("correct horse\n", 0o640), ("short\n", 0o600), ("", 0o600), ("x" * 2000, 0o600), (None, 0)],
)
def test_password_file_that_cannot_be_used(tmp_path: Path, content: str | None, mode: int) -> None:
    """Others can read it, too short, empty, too long, missing."""
    file = tmp_path / "password"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with raises(SettingsError, about="password_file"):
        password_of(DashboardSettings(password_file=file), {})


def test_password_file_is_read_without_its_line_end(tmp_path: Path) -> None:
    """But with its spaces."""
    file = tmp_path / "password"
    file.write_text("correct horse \n")
    file.chmod(0o600)
    assert password_of(DashboardSettings(password_file=file), {}) == "correct horse "


def test_every_record_that_a_path_names_is_described() -> None:
    """A reference that leads nowhere makes the document useless; so does a record that no path gives."""
    text = json.dumps(document())
    assert {name for name in SCHEMAS if f'schemas/{name}"' not in text} == set()
    assert set(SUMMARY) == set(SCHEMAS["ExpertSummary"]["properties"])
