"""The benchmark harness: it runs, judges by the bars, and gives no numbers when something is broken. Never how fast."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedmoe.protocol.rules import AggregationRules, RuleSet
from ops.bench import before, contest
from ops.bench.adapters import LAYOUTS, fp32_bytes
from ops.bench.contest import Contestant, Sample, Seats, take_turns
from ops.bench.fedmoe_side import FedMoE
from ops.bench.processes import ROOT, BenchError, file_settings
from ops.bench.result import BARS, at_least, figure, ratio
from tests.processes import environment

SMALL = LAYOUTS["64kib"]


def bench(*arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops.bench", *arguments],
        env=environment(**extra), capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip


def test_the_file_is_that_of_redis_conf() -> None:
    """By default Redis would rewrite it every few updates, which costs more than they do."""
    assert file_settings() == [
        "--auto-aof-rewrite-min-size", "1gb", "--auto-aof-rewrite-percentage", "100", "--aof-use-rdb-preamble", "yes",
        "--rdbcompression", "no",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("names", "figures"),
    [
        (["wire", "machine"], {"wire_bytes_default_vs_fp32", "memcpy_gb_per_s", "redis_chunks_vs_whole_cpu"}),
        (["codec"], {"codec_int4_cpu_ms", "codec_fp32_fold_moved"}),
        (["stages"], {"stages_memory_aggregator_pack_cpu_ms", "stages_file_redis_cpu_ms"}),
        (["throughput"], {"fp32_vs_raw", "default_vs_raw_fp32", "updates_vs_http", "cpu_vs_http"}),
        (["latency"], {"publish_to_visible_p50_ms", "publish_to_visible_p99_ms"}),
        (["file"], {"aof_bytes_vs_update", "aof_vs_memory", "aof_defaults_vs_memory"}),
        (["growth"], {"growth_2_vs_1_experts_cpu", "endurance_aggregator_rss_growth_mib"}),
        (["size"], {"size_fp32_mib", "size_int4_updates_per_s"}),
        (["overlap"], {"overlap_0.5s", "overlap_0.5s_boundary_ms"}),
        (["turns"], {"turns_both_vs_one", "turns_boundary_ms"}),
        (["cluster"], {"cluster_vs_one_cpu", "cluster_vs_one_server_cpu"}),
        (
            ["exchange"],
            {"exchange_64kib_cpu_ms_unpack", "exchange_64kib_pages_all", "exchange_64kib_peak_rss_mib"},
        ),
        (["scale"], {"scale_update_cpu_most_vs_fewest", "scale_4_workers_idle_redis_mib_vs_predicted"}),
    ],
)
def test_it_runs(names: list[str], figures: set[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--tiny", "--only", *names, "--out", str(out))
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert figures <= {result["name"] for result in results}
    assert len({result["name"] for result in results}) == len(results)
    for result in results:
        assert result.keys() == {"name", "value", "unit", "min", "max", "n", "bar", "met"}
        assert result["min"] <= result["value"] <= result["max"]
        assert result["n"] >= 1
        assert (result["name"] in BARS) == (result["bar"] is not None) == isinstance(result["met"], bool)
        assert result["name"] in done.stdout


def test_tls_beside_plain_tcp(tmp_path: Path) -> None:
    """On a server without TLS one sentence says so."""
    out = tmp_path / "bench.json"
    done = bench("--tiny", "--only", "tls", "--out", str(out))
    if done.returncode:
        assert "did not start with TLS" in done.stderr
        pytest.skip(done.stderr)
    results = {result["name"]: result["value"] for result in json.loads(out.read_text())}
    assert results["tls_vs_plain"] > 0
    assert results["tls_64kib_cpu_ms"] > 0


def test_an_unknown_name_is_one_sentence(tmp_path: Path) -> None:
    done = bench("--only", "latency", "speed", "--out", str(tmp_path / "bench.json"))
    assert done.returncode == 2
    assert done.stderr == (
        "ops/bench.sh: there is no benchmark 'speed': choose among wire, machine, codec, stages, throughput, "
        "latency, file, growth, overlap, turns, size, quality, learning, routing, flower, race, tls, scale, cluster, "
        "exchange, before\n"
    )
    assert not done.stdout


def test_a_release_before_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--tiny", "--only", "wire", "--before", "no-such-release", "--out", str(out))
    assert done.returncode == 1
    assert done.stderr == (
        "ops/bench.sh: this clone has no revision 'no-such-release' to be the release before: fetch it, for example "
        "with git fetch --unshallow, or give --before another one; all processes were ended, nothing is written\n"
    )
    assert not out.exists()
    done = bench("--tiny", "--only", "before", "--out", str(out))
    assert done.returncode == 2
    assert (
        done.stderr
        == "ops/bench.sh: the benchmark 'before' needs the release to compare with: --before REV\n"
    )


def test_a_release_before_without_a_repository_is_git_s_own_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(before, "ROOT", tmp_path)
    with pytest.raises(BenchError, match=r"cannot be taken from git: fatal: not a git repository"):
        before.Release("HEAD")


def test_the_release_before_takes_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release has its own environment and processes; its error messages are passed on unchanged."""
    if not (ROOT / ".git").exists():
        pytest.skip("an unpacked archive has no revisions")
    monkeypatch.setattr(before, "HOME", tmp_path / "before")
    head = before.Release("HEAD")
    with before.Before(head, "memory", "64kib") as contestant:
        sample = contestant.turn(0.3)
    assert sample.updates > 0
    assert sample.cpu_s.keys() == {"redis", "aggregator", "clients"}
    says = r"^before_memory_9tib ended with code 1: KeyError: '9tib'$"
    with pytest.raises(BenchError, match=says), before.Before(head, "memory", "9tib"):
        pass


def test_a_server_that_does_not_start_is_one_sentence_and_no_numbers(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = bench("--tiny", "--only", "wire", "--out", str(out), FEDMOE_REDIS_SERVER="/bin/false")
    assert done.returncode == 1
    assert done.stderr.startswith("ops/bench.sh: /bin/false did not start")
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_a_figure_is_judged_by_its_bar() -> None:
    """The median counts; at the bar is met; a figure that nobody set a bar for is not judged."""
    assert figure("fp32_vs_raw", [0.1, 0.8, 0.9], "x").met is True
    assert figure("fp32_vs_raw", [0.1, 0.79, 0.9], "x").met is False
    assert figure("publish_to_visible_p50_ms", [60.0], "ms").met is True
    assert figure("publish_to_visible_p50_ms", [61.0], "ms").met is False
    judged = figure("memcpy_gb_per_s", [3.0, 1.0, 2.0], "GB/s")
    assert (judged.value, judged.min, judged.max, judged.n) == (2.0, 1.0, 3.0, 3)
    assert judged.bar is judged.met is None


def test_the_lower_end_of_an_interval() -> None:
    """Of 15 values the fourth: at most three are below the median with a probability of 1.8 %, four with 5.9 %."""
    assert at_least("r", [float(n) for n in range(15, 0, -1)]).value == 4.0
    assert at_least("r", [float(n) for n in range(1, 7)]).value == 1.0


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    """A round in which the machine was slow for both counts like any other."""
    assert ratio("r", [10.0, 1.0, 12.0], [5.0, 0.5, 4.0]).value == 2.0


def test_contestants_take_turns() -> None:
    """One of each in every round, in both orders."""
    order: list[str] = []

    class Said:
        def __init__(self, name: str) -> None:
            self.name = name

        def turn(self, seconds: float) -> Sample:
            order.append(self.name)
            return Sample(1, seconds, {"clients": 0.5})

    samples = take_turns([Said("a"), Said("b")], rounds=3, seconds=2.0)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [sample.per_s for sample in samples["b"]] == [0.5] * 3
    assert samples["a"][0].cpu_ms() == 500.0


def test_the_layouts_have_their_sizes() -> None:
    mib = {name: fp32_bytes(layout) / 2**20 for name, layout in LAYOUTS.items()}
    sizes = {"64kib": 0.0625, "1mib": 1.05, "9mib": 9.32, "34mib": 33.56, "153mib": 152.5}
    assert mib == pytest.approx(sizes, abs=0.01)
    assert len(LAYOUTS["9mib"].tensors) == 420


def breaks_later(seats: Seats, index: int) -> None:
    seats.wait_for_go(index)
    seats.count(index)
    seats.wait_for_go(index)
    raise ValueError("the hard disk\nfell out")


def does_nothing_more(seats: Seats, index: int) -> None:
    seats.wait_for_go(index)
    seats.count(index)
    while True:
        while seats.go.is_set():
            pass
        seats.wait_for_go(index)


class Odd(Contestant):
    def __init__(self, target: object) -> None:
        super().__init__("odd", n_clients=2)
        self.target = target

    def _start(self) -> None:
        for index in range(self.n_clients):
            self.processes.call("clients", self.target, self.seats, index)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(contestant: Contestant) -> dict[str, int]:
    return {process.role: process.pid for process in contestant.processes.started}


def test_a_client_that_breaks_ends_it_with_its_own_words() -> None:
    says = r"^odd: the clients process ended with code 1: ValueError: the hard disk fell out$"
    with pytest.raises(BenchError, match=says), Odd(breaks_later) as odd:
        odd.turn(5.0)


def test_a_client_that_does_nothing_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whatever happened: no process is left."""
    monkeypatch.setattr(contest, "LONGER_S", 0.0)
    with Odd(does_nothing_more) as odd:
        pid = pids(odd)["clients"]
        assert lives(pid)
        with pytest.raises(BenchError, match=r"^odd: no client made an update in 0\.1 s$"):
            odd.turn(0.1)
    assert not lives(pid)


def works_slowly(seats: Seats, index: int) -> None:
    while True:
        seats.wait_for_go(index)
        seats.count(index)
        time.sleep(0.3)


def test_a_turn_lasts_until_it_has_an_update() -> None:
    """A large adapter on a busy machine has none in the seconds of a turn."""
    with Odd(works_slowly) as odd:
        assert odd.turn(0.01).updates >= 1


def test_an_aggregator_that_dies_ends_it() -> None:
    with FedMoE("fedmoe", SMALL, "fp32") as contestant:
        running = pids(contestant)
        assert running.keys() == {"redis", "aggregator", "clients"}
        os.kill(running["aggregator"], signal.SIGKILL)
        with pytest.raises(BenchError, match=r"^fedmoe: the aggregator process ended with code -9"):
            contestant.turn(5.0)
    assert not any(lives(pid) for pid in running.values())


def test_refused_updates_are_no_updates() -> None:
    """However fast they are refused."""
    contestant = FedMoE("fedmoe", SMALL, "fp32")
    contestant.rules = RuleSet(aggregation=AggregationRules(max_norm=1e-6))
    with pytest.raises(BenchError, match=r"BenchError: update .* was refused: its norm"):
        contestant.__enter__()
    assert not contestant.processes.started
