"""Checks of a Redis Cluster: are all slots served, what survives a master, and do all nodes know this user."""

from collections.abc import Mapping, Sequence

from fedmoe.errors import RedisUnavailableError
from fedmoe.store.cluster import SLOTS, Cluster, Range, slot_of, text_of
from fedmoe.store.connection import Connection
from fedmoe.store.permissions import Right
from fedmoe.store.reading import ask
from fedmoe.store.rights import lacking
from fedmoe.store.server_info import info_checks
from fedmoe.store.url import Address
from fedmoe.util.check import FAIL, OK, WARN, Check

_COVERAGE, _REPLICAS = "cluster-require-full-coverage", "min-replicas-to-write"


def cluster_checks(connection: Connection) -> list[Check]:
    """The checks of a cluster and of each of its masters; those of one master name it.

    Raises:
        RedisUnavailableError: if no node can be asked.
    """
    cluster = _cluster(connection)
    with connection.errors():
        ranges = cluster.ranges()
        checks = [_coverage(ranges), *_agreement(dict(cluster.views()))]
    for node in cluster.masters():
        master, name = connection.to(node), text_of(node)
        try:
            checks += [
                Check(check.level, check.what, f"{name}: {check.text}") for check in info_checks(master)
            ]
            checks += _settings(master, name)
        except RedisUnavailableError as error:
            checks.append(Check(FAIL, "cluster", f"{name}, a master, does not answer: {error}"))
        if not any(one.replicas for one in ranges if one.master == node):
            checks.append(
                Check(WARN, "cluster", f"{name} has no replica: its experts stop while it is away; add one")
            )
    return checks


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


def _settings(master: Connection, name: str) -> list[Check]:
    """What CONFIG says of one master; nothing if this user may not read it."""
    found = ask(master, {key: ("CONFIG GET", key) for key in (_COVERAGE, _REPLICAS)})
    said = {key: reply.get(key, "") for key, reply in found.items() if isinstance(reply, Mapping)}
    checks = []
    if said.get(_COVERAGE) == "yes":
        checks.append(
            Check(
                WARN,
                "cluster",
                f"{name}: {_COVERAGE} is yes, so if one slot is not served no expert can be reached: set it to no",
            )
        )
    if said.get(_REPLICAS) == "0":
        checks.append(
            Check(
                WARN,
                "cluster",
                f"{name}: {_REPLICAS} is 0, so a master that is cut off takes commits that its failover will undo, "
                "and their updates are sent again: set it to 1 to refuse them",
            )
        )
    return checks


def node_rights_checks(connection: Connection, roles: Mapping[str, tuple[Right, ...]]) -> list[Check]:
    """Whether this user has the rights of these roles on every node, as any replica may become a master."""
    with connection.errors():
        others: list[Address] = _cluster(connection).others(slot_of(connection.keys.experts))
    checks = []
    for node in others:
        try:
            lacks = [
                str(lack)
                for rights in roles.values()
                for lack in lacking(connection.to(node), rights)
                if not lack.right.without
            ]
        except RedisUnavailableError as error:
            checks.append(Check(WARN, "permissions", f"the rights on {text_of(node)} are not known: {error}"))
            continue
        if lacks:
            checks.append(
                Check(
                    FAIL,
                    "permissions",
                    f"this user lacks {', '.join(dict.fromkeys(lacks))} on {text_of(node)}: an operator gives all "
                    "nodes the same users (fedmoe operator refresh)",
                )
            )
    return checks or [Check(OK, "permissions", f"the same on all {len(others) + 1} nodes")]
