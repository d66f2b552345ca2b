"""fedmoe.util.stopping: a process that was asked to stop has ended soon after, whatever it does."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fedmoe.util.stopping import Stop, stop_on_signals

BEGIN = """
import logging, signal, sys, time
from fedmoe.util.stopping import Stop, end_like_ctrl_c, stop_on_signals
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
"""
STUCK = """
with stop_on_signals(stop := Stop(patience_s=0.1, end_s=0.1)):
    stop.when_asked.append(lambda: print("asked", flush=True))
    stop.when_out_of_patience.append(lambda: print("out of patience", flush=True))
    stop.last_words = lambda: ("nothing is lost", 0)
    print("ready", flush=True)
    time.sleep(600)
"""
PATIENT = STUCK.replace("patience_s=0.1", "patience_s=600")
TIDY = """
end_like_ctrl_c()
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("tidying", flush=True)
    sys.stdin.readline()
    print("tidy", flush=True)
"""


@contextmanager
def script(code: str, before: str = "") -> Iterator["subprocess.Popen[str]"]:
    """Run a program that says when it is ready; `before` is done first."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal\n{before}\n{BEGIN}{code}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_does_not_end_by_itself_is_ended(number: signal.Signals) -> None:
    """A main thread that never looks at the event: each stage comes in its order, then the last words."""
    with script(STUCK) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    first, *rest = out.splitlines()
    assert first == f"{number.name}: stopping; send the signal again to end at once"
    assert rest == ["asked", "out of patience", "nothing is lost"]


def test_a_second_signal_ends_at_once() -> None:
    """Long before the patience is over; SIGHUP alone does not count: kernel and shell both send it."""
    with script(PATIENT) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGHUP)
        assert "stopping" in process.stdout.readline()
        assert process.stdout.readline() == "asked\n"
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "fedmoe: interrupted\n")


@pytest.mark.parametrize(
    ("raising", "expected"),
    [
        ("", (0, "done\n", "")),
        ("raise FedMoEError('lost', about='training')", (1, "done\n", "fedmoe: lost\n")),
    ],
)
def test_after_a_signal_nothing_holds_up_the_end(raising: str, expected: tuple[int, str, str]) -> None:
    """What Python does at its end (here: a thread that never ends) is not waited for; words and exit code are right."""
    code = f"""
import threading
from fedmoe.errors import FedMoEError
with stop_on_signals(stop := Stop()):
    logging.disable()
    threading.Thread(target=time.sleep, args=(600,)).start()
    print("ready", flush=True)
    stop.wait()
    sys.stdout.write("done\\n")
    {raising}
"""
    with script(code) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == expected


@pytest.mark.parametrize("code", [STUCK, TIDY])
def test_under_nohup_a_lost_terminal_changes_nothing(code: str) -> None:
    """SIGHUP that is ignored at the start stays ignored."""
    with script(code, "signal.signal(signal.SIGHUP, signal.SIG_IGN)") as process:
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)


def test_a_lost_terminal_does_not_interrupt_the_tidying() -> None:
    """SIGHUP comes twice; what the first began goes on to its end."""
    with script(TIDY) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "tidying\n"
        process.send_signal(signal.SIGHUP)
        out, err = process.communicate("\n", timeout=30)
    assert (process.returncode, out, err) == (0, "tidy\n", "")


def test_a_stop_from_within_is_bounded_too() -> None:
    """Whoever has done enough sets the event; a checkpoint that is being written is waited for."""
    order: list[str] = []
    saving, out_of_patience = threading.Event(), threading.Event()
    with stop_on_signals(stop := Stop(patience_s=0.0, end_s=0.0)):
        stop.is_saving = lambda: saving.set() or True
        stop.when_asked.append(lambda: order.append("asked"))
        stop.when_out_of_patience += [lambda: order.append("out of patience"), out_of_patience.set]
        stop.set()
        assert out_of_patience.wait(30)
        assert saving.wait(30)
    assert order == ["asked", "out of patience"]


def test_handlers_are_given_back() -> None:
    """A program that uses FedMoE as a library keeps its own."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signals(Stop()):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
