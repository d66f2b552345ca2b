"""Metrics: named as Prometheus wants them, true to `fedmoe status`, and harmless whatever workers write."""

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from consumers.daemon import Aggregator
from consumers.metrics import AggregatorCollector
from fedmoe.errors import SettingsError
from fedmoe.protocol.assignment import AggregatorBeat
from fedmoe.protocol.federation import findings
from fedmoe.protocol.records import HEARTBEAT_TTL_S
from fedmoe.settings import AggregatorSettings, GatewaySettings, RedisSettings
from fedmoe.store.aggregators import Aggregators
from fedmoe.store.connection import Connection
from fedmoe.store.embedded import EmbeddedRedis
from fedmoe.store.inspect import Inspector
from fedmoe.store.worker import WorkerStore
from fedmoe.tools.metrics.federation import federation_families, federation_registry
from fedmoe.tools.metrics.server import MetricsServer, exposition
from fedmoe.tools.metrics.table import AGGREGATOR, FEDERATION, METRICS
from tests.errors import raises
from tests.federation import ScriptedWorker, make_expert, serving, small_spec
from tests.looking import BEAT, look, some_updates
from tests.processes import environment, eventually, fedmoe_here
from tests.scraping import get, lint, names, samples

pytestmark = pytest.mark.one_server


def shown(connection: Connection) -> str:
    """The federation's metrics as text."""
    text, _ = exposition(federation_registry(Inspector(connection).federation))
    return text.decode()


@pytest.fixture
def endpoint(connect: Callable[[], Connection]) -> Iterator[MetricsServer]:
    """A server of the federation's metrics on a free port."""
    server = MetricsServer(federation_registry(Inspector(connect()).federation), "127.0.0.1", 0)
    yield server
    server.close()


def test_the_metrics_are_what_status_shows(connection: Connection) -> None:
    """Two updates applied, one refused, one waiting, a worker that runs, others that left, a gateway."""
    some_updates(connection)
    for name, how in (("ann", "finished"), ("cleo", "failed"), ("dan", "\x1b[2J")):
        gone = WorkerStore(connection, "sql_expert", name)
        gone.beat(BEAT, ttl_s=HEARTBEAT_TTL_S)
        gone.leave(how)
    beat = AggregatorBeat(serves=frozenset(("merged", "sql_expert")), overdue=frozenset(["sql_expert"]))
    Aggregators(connection, holder="agg-1", ttl_ms=60_000).beat(beat)
    found = samples(shown(connection))
    seen = look(connection)
    for name, labels, value in (
        ("fedmoe_aggregator_served_experts", ("agg-1",), 2),
        ("fedmoe_aggregator_overdue_experts", ("agg-1",), 1),
        ("fedmoe_redis_up", (), 1),
        ("fedmoe_redis_persistence_ok", (), 1),
        ("fedmoe_findings", (), len(list(findings(seen)))),
        ("fedmoe_expert_version", ("sql_expert",), 2),
        ("fedmoe_expert_updates_total", ("sql_expert", "applied"), 2),
        ("fedmoe_expert_updates_total", ("sql_expert", "refused"), 1),
        ("fedmoe_expert_staleness_updates_total", ("sql_expert",), 1),
        ("fedmoe_expert_examples_total", ("sql_expert",), 8),
        ("fedmoe_expert_training_loss", ("sql_expert",), 1.5),
        ("fedmoe_expert_waiting_entries", ("sql_expert",), 1),
        ("fedmoe_expert_served", ("sql_expert",), 1),
        ("fedmoe_expert_held", ("sql_expert",), 0),
        ("fedmoe_expert_dead_letters", ("sql_expert",), 1),
        ("fedmoe_expert_workers", ("sql_expert",), 1),
        ("fedmoe_worker_steps_total", ("sql_expert", "alice"), 12),
        ("fedmoe_worker_tokens_per_second", ("sql_expert", "alice"), 310.5),
        ("fedmoe_worker_behind_updates", ("sql_expert", "alice"), 1),
        ("fedmoe_worker_in_flight", ("sql_expert", "alice"), 1),
        ("fedmoe_gateway_exists", (), 1),
        ("fedmoe_gateway_outdated_experts", (), 1),
    ):
        assert found[name, labels] == value, name
    assert found["fedmoe_worker_heartbeat_age_seconds", ("sql_expert", "alice")] == pytest.approx(4, abs=2)
    left = {labels[1:] for name, labels in found if name == "fedmoe_worker_left_age_seconds"}
    assert left == {("finished", "ann"), ("failed", "cleo"), ("unknown", "dan")}
    # What needs TLS, a fit or validation rows is not there.
    absent = {one.name for one in METRICS if FEDERATION in one.of} - names(found)
    assert absent == {
        "fedmoe_redis_certificate_expiry_timestamp_seconds", "fedmoe_gateway_fit_loss", "fedmoe_expert_best_version",
        "fedmoe_worker_validation_loss", "fedmoe_worker_validation_worse",
    }  # fmt: skip


def test_what_nobody_may_look_at_is_no_metric(connection: Connection) -> None:
    """A 0 would say that none runs, and the alert of an expert that stands still could not fire."""
    some_updates(connection)
    seen = look(connection)
    less = replace(seen, sees_workers=False, merged=replace(seen.merged, is_known=False))
    blind = exposition(federation_registry(lambda: less))[0].decode()
    for line in ("fedmoe_expert_workers{", "\nfedmoe_gateway_exists "):
        assert line in shown(connection)
        assert line not in blind
    assert samples(blind)["fedmoe_expert_version", ("sql_expert",)] == 2


def test_promtool_finds_nothing_to_complain_of(connection: Connection) -> None:
    """Also of names and reasons that a hostile worker wrote, and of an empty federation."""
    assert lint(shown(connection)) == ""
    make_expert(connection)
    for key in (b'x"} 1\nfedmoe_redis_up 0\n', b"\x1b[2J\xff\\", b"<script>", "é\u2028{}".encode()):
        connection.client.hset(b"fedmoe:{sql_expert}:worker:" + key, mapping={"step": "3", "loss": "nan"})
    text = shown(connection)
    assert lint(text) == ""
    assert not set(text) & {"\x1b", "\u2028", "\x00"}
    found = samples(text)
    workers = {labels[1] for name, labels in found if name == "fedmoe_worker_steps_total"}
    assert workers == {'x"} 1\\nfedmoe_redis_up 0\\n', "\\x1b[2J\\xff\\", "<script>", "é\\u2028{}"}
    assert found["fedmoe_redis_up", ()] == 1
    assert max(len(labels[1]) for name, labels in found if len(labels) == 2) < 100


def test_a_redis_that_is_away_is_a_metric(server: EmbeddedRedis) -> None:
    """The scrape succeeds, and says only that; it is as before once Redis is back."""
    with EmbeddedRedis(server=server.server) as own:
        connection = Connection(RedisSettings(url=own.url, timeout_s=2.0))
        make_expert(connection)
        assert samples(shown(connection))["fedmoe_redis_up", ()] == 1
        own.kill()
        away = samples(shown(connection))
        assert names(away) == {"fedmoe_redis_up", "fedmoe_build_info"}
        assert away["fedmoe_redis_up", ()] == 0
        own.start()
        assert samples(shown(connection))["fedmoe_redis_up", ()] == 1


def test_once_without_redis_is_an_error() -> None:
    """A script must not take an empty answer for a state."""
    done = fedmoe_here("metrics", "--redis", "unix:///nowhere.sock", "--once")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1


def test_why_redis_is_away_is_logged_once(server: EmbeddedRedis, caplog: pytest.LogCaptureFixture) -> None:
    """For example a wrong password: the metric alone does not tell it from a network that is down."""
    wrong = RedisSettings(url=server.url.replace("://", "://:wrong-one@"))
    registry = federation_registry(Inspector(Connection(wrong)).federation)
    for _ in range(2):
        assert b"fedmoe_redis_up 0.0" in exposition(registry)[0]
    (said,) = [one.getMessage() for one in caplog.records if one.name.startswith("fedmoe.tools.metrics")]
    assert "refuses the login" in said
    assert "wrong-one" not in said


def test_the_server_answers_get_of_its_page_only(endpoint: MetricsServer) -> None:
    """Nothing can be written, and nothing else is there."""
    assert "fedmoe_redis_up 1.0" in get(endpoint.url)
    for url, method, status in (
        (endpoint.url, "POST", 405),
        (endpoint.url, "DELETE", 405),
        (endpoint.url.replace("/metrics", "/"), "GET", 404),
        (endpoint.url.replace("/metrics", "/../etc/passwd"), "GET", 404),
    ):
        request = urllib.request.Request(url, method=method)  # noqa: S310  # a URL of this test
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=20)  # noqa: S310  # a URL of this test
        assert refused.value.code == status


def test_an_accept_header_without_sense_gets_text(endpoint: MetricsServer) -> None:
    """Not an internal error: anybody may send one."""
    request = urllib.request.Request(endpoint.url, headers={"Accept": "text/plain;version=abc"})  # noqa: S310  # a URL of this test
    with urllib.request.urlopen(request, timeout=20) as reply:  # noqa: S310  # a URL of this test
        assert b"fedmoe_redis_up 1.0" in reply.read()


def test_a_client_that_says_nothing_holds_nobody_up(endpoint: MetricsServer) -> None:
    """Other clients are answered meanwhile."""
    with socket.create_connection(("127.0.0.1", endpoint.port)):
        assert "fedmoe_redis_up" in get(endpoint.url)


def test_a_port_that_is_taken_is_named(endpoint: MetricsServer, redis_url: str, tmp_path: Path) -> None:
    """One sentence, also of the commands, and exit code 2, before anything is trained or served."""
    with raises(SettingsError, about="metrics_port"):
        MetricsServer(CollectorRegistry(), "127.0.0.1", endpoint.port)
    with raises(SettingsError, about="metrics_port"):
        MetricsServer(CollectorRegistry(), "203.0.113.1", 0)
    port = str(endpoint.port)
    for command in (
        ("metrics", "--port", port),
        ("aggregator", "run", "--metrics-port", port),
        ("worker", "run", "--stream", "a", "--data", str(tmp_path), "--metrics-port", port),
    ):
        done = fedmoe_here(*command, "--redis", redis_url)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(
            f"fedmoe: metrics cannot be served on 127.0.0.1:{port}"
        )


def test_without_the_library_the_extra_is_named() -> None:
    """Metrics are an extra; everything else works without it."""
    code = (
        "import sys; sys.modules['prometheus_client'] = None; sys.argv = ['fedmoe', *sys.argv[1:]]\n"
        "from fedmoe.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "metrics", "--once"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "fedmoe[metrics]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_serves_until_it_is_stopped(connection: Connection) -> None:
    """On the port that it names; SIGTERM ends it at once with exit code 0, and --once prints the same."""
    make_expert(connection)
    url = connection.settings.url
    with subprocess.Popen(
        [sys.executable, "-m", "fedmoe.cli.main", "metrics", "--redis", url, "--port", "0"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        served = get(process.stdout.readline().split()[-1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    once = fedmoe_here("metrics", "--redis", url, "--once").stdout
    assert names(samples(once)) == names(samples(served)) > {"fedmoe_expert_version"}


def test_an_aggregator_counts_what_it_decides(
    connection: Connection, connect: Callable[[], Connection]
) -> None:
    """By outcome; a duplicate, too, and the time that it took."""
    make_expert(connection)
    worker = ScriptedWorker(connection, small_spec())
    with serving(connect()) as served:
        update = worker.push(0.5)
        eventually("applied", lambda: worker.pull().correction is not None or worker.ledger.meta.version == 1)
        worker.publish(update)
        worker.push(1e6)
        tally = served.server.tally
        eventually("three decisions", lambda: sum(tally.outcomes.values()) == 3)
    counts = {outcome.value: n for outcome, n in tally.outcomes.items()}
    assert counts == {"applied": 1, "duplicate": 1, "refused": 1}
    assert 0 < tally.seconds < 60
    assert 2 <= tally.batches <= 3


def test_a_scrape_of_a_process_asks_no_redis(tmp_path: Path) -> None:
    """Its metrics come from memory, so they are there, and quick, while Redis is away."""
    collector = AggregatorCollector(tmp_path)
    assert names_of(collector) == {"fedmoe_build_info", "fedmoe_disk_free_bytes", "fedmoe_disk_size_bytes"}
    away = RedisSettings(url="redis://127.0.0.1:1")
    collector.daemon = Aggregator(away, ["a"], AggregatorSettings(), GatewaySettings(), holder="one")
    began = time.monotonic()
    found = names_of(collector)
    assert time.monotonic() - began < 1.0
    assert "fedmoe_redis_connections_total" in found
    assert collector.daemon.connections[0].generation == 0
    assert found < {one.name for one in METRICS if AGGREGATOR in one.of}


def names_of(collector: AggregatorCollector) -> set[str]:
    return {sample.name for family in collector.collect() for sample in family.samples}


def test_a_full_disk_of_redis_is_told(server: EmbeddedRedis, tmp_path: Path) -> None:
    """A save that fails is a finding of status and a metric, until one succeeds."""
    with EmbeddedRedis(server=server.server) as own:
        connection = Connection(RedisSettings(url=own.url))
        (own.directory / "dump.rdb").mkdir()  # in the way
        connection.client.set("a", "b")
        connection.client.bgsave()
        eventually("the save has failed", lambda: look(connection).server.persists is False)
        assert samples(shown(connection))["fedmoe_redis_persistence_ok", ()] == 0
        assert any("its last write to disk failed" in one for one in findings(look(connection)))
        (own.directory / "dump.rdb").rmdir()
        connection.client.save()
        assert look(connection).server.persists is True


def test_the_end_of_a_certificate_is_told(server: EmbeddedRedis, tmp_path: Path) -> None:
    """Of the server's or the CA's, whichever is first; only if it was verified."""
    if "redis-server" not in server.server:
        pytest.skip("the server of the wheel has no TLS")
    make_certificates(tmp_path, days=10, ca_days=30)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = {"cert-file": "server.pem", "key-file": "server.key", "ca-cert-file": "ca.pem"}
    options = [word for name, file in tls.items() for word in (f"--tls-{name}", str(tmp_path / file))]
    with EmbeddedRedis(
        server=server.server, options=["--tls-port", str(port), "--tls-auth-clients", "no", *options]
    ):
        url = f"rediss://localhost:{port}?ssl_ca_certs={tmp_path / 'ca.pem'}"
        seen = look(connection := Connection(RedisSettings(url=url)))
        day = 24 * 3600
        assert seen.server.certificate_ends == pytest.approx(time.time() + 10 * day, abs=600)
        assert any("certificate" in one and "10 days" in one for one in findings(seen))
        found = {
            sample.name: sample.value for family in federation_families(seen) for sample in family.samples
        }
        assert found["fedmoe_redis_certificate_expiry_timestamp_seconds"] == seen.server.certificate_ends
        connection.close()
        make_certificates(tmp_path, days=10, ca_days=5, keep_server=True)
        seen = look(Connection(RedisSettings(url=url)))
        assert seen.server.certificate_ends == pytest.approx(time.time() + 5 * day, abs=600)
        unverified = look(Connection(RedisSettings(url=f"rediss://localhost:{port}?ssl_cert_reqs=none")))
        assert unverified.server.certificate_ends is None


def make_certificates(directory: Path, *, days: int, ca_days: int, keep_server: bool = False) -> None:
    """A CA and a server's certificate for localhost; with `keep_server` the CA is only issued again."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=directory, capture_output=True, check=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "ca.key")
    key = ("-key", "ca.key") if keep_server else key
    openssl("req", "-x509", *key, "-subj", "/CN=test CA", "-days", str(ca_days), "-out", "ca.pem")
    if keep_server:
        return
    openssl(
        "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", "server.key",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", "server.csr",
    )  # fmt: skip
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days",
        str(days), "-copy_extensions", "copy", "-out", "server.pem",
    )  # fmt: skip
