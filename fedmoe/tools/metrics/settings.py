"""The settings of `/metrics` in a process that does something else."""

from dataclasses import dataclass
from importlib.util import find_spec

from fedmoe.errors import SettingsError
from fedmoe.util.setting import check, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """Where a process serves its metrics."""

    port: int | None = setting(
        None, "Port on which /metrics is served for Prometheus; 0 takes a free one.", option="metrics_port",
        at_least=0, at_most=65535, words="metrics are not served",
    )  # fmt: skip
    host: str = setting(
        "127.0.0.1", "Address on which /metrics is served; 0.0.0.0 lets other machines read it, too.",
        option="metrics_host",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check(self)


def check_installed() -> None:
    """Raise SettingsError unless prometheus-client is installed."""
    if find_spec("prometheus_client") is None:
        raise SettingsError(
            "metrics need prometheus-client: install it with the extra `metrics` (pip install 'fedmoe[metrics]')",
            about="metrics",
        )
