"""The samples of one scrape, in the form that prometheus-client renders."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedmoe import __version__
from fedmoe.tools.metrics.table import COUNTER, METRICS


class Families:
    """The metrics of one kind of process, at first without samples.

    Args:
        of: federation, aggregator or worker, as the table has them.
    """

    def __init__(self, of: str) -> None:
        self._families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {
            one.name: (CounterMetricFamily if one.kind == COUNTER else GaugeMetricFamily)(
                one.name, one.help, labels=one.labels
            )
            for one in METRICS
            if of in one.of
        }
        self.add("fedmoe_build_info", 1, __version__)

    def add(self, name: str, value: float | None, *labels: str) -> None:
        """Add a sample; an unknown value (None or NaN) gives none."""
        if value is not None and not math.isnan(value):
            self._families[name].add_metric(labels, value)

    def add_disk(self, directory: str, path: Path | None) -> None:
        """Add the free space of the file system of a path, under the name of its setting."""
        if path is None:
            return
        try:
            found = os.statvfs(path)
        except OSError:  # the process that writes there says so itself
            return
        self.add("fedmoe_disk_free_bytes", found.f_bavail * found.f_frsize, directory)
        self.add("fedmoe_disk_size_bytes", found.f_blocks * found.f_frsize, directory)

    def __iter__(self) -> Iterator[Metric]:
        return (family for family in self._families.values() if family.samples)
