"""Checks of a Redis Cluster: are all slots served, and what survives a master."""

from collections.abc import Mapping, Sequence

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.cluster import SLOTS, Cluster, Range
from fedmoe.store.connection import Connection
from fedmoe.store.reading import ask
from fedmoe.store.server_info import info_checks
from fedmoe.store.url import Address, text_of
from fedmoe.util.check import FAIL, OK, WARN, Check

_COVERAGE, _REPLICAS = "cluster-require-full-coverage", "min-replicas-to-write"


def cluster_checks(connection: Connection) -> list[Check]:
    """The checks of a cluster and of each of its masters; those of one master name it.

    Raises:
        RedisUnavailableError: if no node can be asked, or a master announces no address.
    """
    cluster = _cluster(connection)
    with connection.errors():
        ranges = cluster.ranges()
        checks = [_coverage(ranges), *_agreement(dict(cluster.views()))]
        masters = cluster.masters()
    settings = {}
    for node in masters:
        master, name = connection.to(node), text_of(node)
        try:
            checks += [
                Check(check.level, check.what, f"{name}: {check.text}") for check in info_checks(master)
            ]
            settings[name] = _settings(master)
        except RedisUnavailableError as error:
            checks.append(Check(FAIL, "cluster", f"{name}, a master, does not answer: {error}"))
        if not any(one.replicas for one in ranges if one.master == node):
            checks.append(
                Check(WARN, "cluster", f"{name} has no replica: its experts stop while it is away; add one")
            )
    return checks + setting_checks(settings)


def _cluster(connection: Connection) -> Cluster:
    assert connection.cluster is not None
    return connection.cluster


def _coverage(ranges: Sequence[Range]) -> Check:
    """All slots are served. Pure."""
    served = sum(one.last - one.first + 1 for one in ranges)
    masters = len({one.master for one in ranges})
    if served < SLOTS:
        return Check(
            FAIL, "cluster",
            f"{SLOTS - served} of {SLOTS} slots are served by no node, experts in them cannot be reached: start the "
            "node that had them, or give them to another one (redis-cli --cluster fix)",
        )  # fmt: skip
    return Check(OK, "cluster", f"{masters} masters serve all {SLOTS} slots")


def _agreement(views: Mapping[Address, Sequence[Range]]) -> list[Check]:
    """One failed check for each node that names other masters than the first one. Pure."""
    said = {node: {(one.first, one.last, one.master) for one in view} for node, view in views.items()}
    first = next(iter(said))
    return [
        Check(
            FAIL,
            "cluster",
            f"{text_of(node)} and {text_of(first)} name different masters of some slots: look again when a failover or "
            "move is over; if they still do, one of them is cut off from the cluster (redis-cli --cluster check)",
        )
        for node in said
        if said[node] != said[first]
    ]


def _settings(master: Connection) -> dict[str, str]:
    """What CONFIG says of one master; nothing if this user may not read it."""
    found = ask(master, {key: ("CONFIG GET", key) for key in (_COVERAGE, _REPLICAS)})
    return {key: reply[key] for key, reply in found.items() if isinstance(reply, Mapping) and key in reply}


def setting_checks(said: Mapping[str, Mapping[str, str]]) -> list[Check]:
    """Judge the settings of the masters that answered: {master: {setting: value}}. Pure."""
    checks = []
    for name, settings in said.items():
        if settings.get(_COVERAGE) == "yes":
            checks.append(
                Check(
                    WARN,
                    "cluster",
                    f"{name}: {_COVERAGE} is yes, so if one slot is not served no expert can be reached: set it to no",
                )
            )
        if settings.get(_REPLICAS) == "0":
            checks.append(
                Check(
                    WARN,
                    "cluster",
                    f"{name}: {_REPLICAS} is 0, so a master that is cut off takes commits that its failover will undo, "
                    "and their updates are sent again: set it to 1 to refuse them",
                )
            )
    if unread := [name for name, settings in said.items() if len(settings) < len((_COVERAGE, _REPLICAS))]:
        checks.append(
            Check(
                WARN,
                "cluster",
                f"{_COVERAGE} and {_REPLICAS} were not read on {', '.join(unread)}, because this user may not run "
                "CONFIG GET: see for yourself that they are no and 1",
            )
        )
    return checks
