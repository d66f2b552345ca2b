"""Metrics in tests: read them over HTTP, look them up, and have promtool check them."""

import shutil
import subprocess
import urllib.request
from collections.abc import Iterable

import pytest
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, tuple[str, ...]], float]


def program(name: str) -> str:
    """The path of a program of Debian's `prometheus`; without it the test is skipped."""
    found = shutil.which(name)
    if found is None:
        return pytest.skip(f"no {name} on this machine: apt-get install prometheus")
    return found


def get(url: str) -> str:
    """What a scrape of the URL gives."""
    with urllib.request.urlopen(url, timeout=20) as reply:  # noqa: S310  # a URL of this test
        text: str = reply.read().decode()
    return text


def samples(text: str) -> Samples:
    """Every sample by metric and values of its labels, which are sorted by their names."""
    return {
        (one.name, tuple(one.labels.values())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def lint(text: str) -> str:
    """What `promtool check metrics` complains of, "" if nothing."""
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 3), done.stderr  # 3: it has a complaint
    return done.stdout + done.stderr


def names(found: Iterable[tuple[str, tuple[str, ...]]]) -> set[str]:
    """The names of the metrics in samples."""
    return {name for name, _ in found}
