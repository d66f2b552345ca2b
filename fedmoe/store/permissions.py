"""The rights of each role: the one list from which rights are checked and ACL rules are generated. Pure.

A right is a command on some keys. `tests/integration/test_permissions.py` compares the list with the commands of real
runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedmoe.protocol.keys import ExpertKeys, Keys, absent
from fedmoe.protocol.names import GATEWAY, may_train_gateway, name_on_gateway
from fedmoe.protocol.parties import Party

ANY = "*"  # stands for any expert's or worker's name
# Nobody can log in as this user. But Redis loads transactions from its append-only file with the rights of this
# user, and forgets those that it may not run (redis/redis#14541, valkey-io/valkey#3983).
DEFAULT_USER = "user default off resetpass ~* &* +@all"
# On a Redis Cluster everybody asks who serves a slot; operators also for the nodes that are down.
CLUSTER_RIGHTS = ("cluster|shards", "cluster|slots")
READS = frozenset({
    "EXISTS", "GET", "GETRANGE", "HGET", "HGETALL", "HKEYS", "HLEN", "HMGET", "MGET", "PTTL", "STRLEN",
    "TYPE", "WATCH", "XINFO GROUPS", "XINFO STREAM", "XLEN", "XRANGE", "XREVRANGE",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Right:
    """A command on keys.

    Args:
        command: as redis-py names it, for example XGROUP CREATE.
        keys: glob patterns; none for a command without keys.
        when: the situation that needs it, if an ordinary run does not send it.
        without: the consequence of lacking it, if the right is optional for the role.
        alone: an ACL grants it in its own selector, because the role's other commands must not work on these keys.
    """

    command: str
    keys: tuple[str, ...] = ()
    when: str = ""
    without: str = ""
    alone: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """A role's task, and its rights as a function of the federation's keys, an expert and a worker (may be unused)."""

    name: str
    does: str
    rights: Callable[[Keys, str, str], tuple[Right, ...]]


def _on(*keys: str, may: str, when: str = "") -> Iterator[Right]:
    """One right for each of these commands (comma separated), on these keys."""
    for command in may.split(", "):
        yield Right(command=command, keys=keys, when=when)


LONG = "the weights of an expert exceed 512 MiB"
NO_COPIES = "each commit writes the weights, instead of the updates that it applied"
NO_COPIED_TAIL = "it cannot serve an expert to whose tail another aggregator has added"
NO_EXACT_PULL = "a worker that cannot use the packed weights waits until they are repaired"


def _parts(keys: ExpertKeys) -> tuple[str, str]:
    """Patterns of the parts of weights and server states."""
    return keys.weights_part(ANY, ANY), keys.server_state_part(ANY, ANY)


def _worker(all_keys: Keys, expert: str, worker: str) -> tuple[Right, ...]:
    keys = all_keys.expert(expert)
    own, payloads = keys.worker(worker), keys.payloads(worker)
    return (
        *_on(keys.spec, may="GET"),
        *_on(keys.meta, may="HGETALL, HMGET"),
        *_on(keys.decided, may="HGET"),
        *_on(keys.packed, may="GETRANGE"),
        *_on(keys.weights, may="STRLEN, GETRANGE", when="the format is fp32"),
        *(
            Right(command=command, keys=(key,), when="the packed weights are damaged", without=NO_EXACT_PULL)
            for command, key in (
                ("GET", keys.weights), ("HGETALL", keys.tail), ("MGET", keys.tail_part(ANY, ANY)),
                ("GET", keys.server_state),
            )
        ),
        Right(command="GET", keys=_parts(keys), when=LONG, without=NO_EXACT_PULL),
        *_on(keys.updates, may="XRANGE"),
        Right(command="XADD", keys=(keys.updates,), alone=True),  # otherwise a worker could delete the stream
        *_on(own, may="HGETALL"),
        *_on(own, keys.trace(worker), may="HSET, PEXPIRE, DEL"),
        *_on(payloads, may="SET, STRLEN, PEXPIRE, INCRBY"),
        *_on(payloads, may="DEL", when="Redis is full"),
        Right(
            command="GET", keys=(keys.lease,),
            without="the worker does not notice that no aggregator serves its expert",
        ),
        *_on(all_keys.experts, may="HKEYS", when="there is no such expert"),
        *_on(may="MULTI, EXEC"),
        *_on(keys.meta, keys.decided, keys.packed, keys.weights, keys.updates, may="WATCH", when="Redis is full"),
        *_on(may="UNWATCH", when="Redis is full"),
        Right(command="INFO", without="the worker notices that Redis is full only when an update is refused"),
    )  # fmt: skip


def _aggregator(all_keys: Keys, expert: str, worker: str) -> tuple[Right, ...]:
    keys, merged = all_keys.expert(expert), all_keys.merged
    payloads = keys.payloads(ANY)
    large, lost, full = (
        "weights of 4 MiB and more",
        "Redis has lost an expert or a part of it",
        "Redis is full",
    )
    remembers = "the server optimizer is not sgd"
    long = "the merged gateway exceeds 512 MiB"
    older = "Redis came back with an older state, and kept updates are resent"
    return (
        *_on(all_keys.experts, may="HGET, HGETALL, HSETNX"),
        *_on(all_keys.experts, may="HSET", when="--expert NAME=WEIGHT changes a weight"),
        *_on(all_keys.experts, may="HDEL", when="an expert is listed that an operator removed"),
        *_on(keys.meta, may="UNLINK", when="--new-lineage creates an expert again that an operator removed"),
        *_on(keys.meta, may="EXISTS, HGETALL, HGET, HSET, WATCH, EVAL"),
        *_on(keys.decided, may="EXISTS, HGETALL, HLEN, HSET, TYPE, WATCH, EVAL"),
        *_on(keys.vectors, may="HGETALL, TYPE, WATCH, EVAL"),
        *_on(keys.vectors, may="HSET", when="a worker publishes its domain vector"),
        *_on(keys.vectors, may="HDEL", when="a worker withholds its domain vector"),
        *_on(keys.meta, keys.spec, keys.weights, keys.decided, keys.vectors, may="UNLINK", when=lost),
        *_on(keys.meta, may="TYPE", when=lost),
        *_on(keys.weights, may="EXISTS, GET, SET, TYPE, STRLEN, WATCH, EVAL"),
        *_on(keys.tail, may="HGETALL, HSET, UNLINK, TYPE, WATCH, EVAL"),
        *_copies(keys),
        *_on(keys.packed, may="SET, UNLINK, TYPE, STRLEN, WATCH, EVAL"),
        *_on(keys.weights, keys.packed, may="GETRANGE"),
        *_on(keys.weights, keys.packed, may="SETRANGE, PTTL", when=large),
        *_on(keys.server_state, may="GET, UNLINK, TYPE, WATCH, EVAL"),
        *_on(keys.server_state, may="SET, STRLEN, GETRANGE, SETRANGE, PTTL", when=remembers),
        *_on(*_parts(keys), may="SET, GET, EXISTS, PERSIST, UNLINK, WATCH, EVAL", when=LONG),
        *_on(keys.weights_part(ANY, ANY), may="STRLEN", when=LONG),
        *_on(keys.spec, may="EXISTS, GET, SET"),
        *_on(keys.log, keys.dead, may="XADD, UNLINK, TYPE, WATCH, EVAL"),
        *_on(keys.log, may="XREVRANGE"),
        *_on(keys.updates, may="XGROUP CREATE, XREADGROUP, XAUTOCLAIM, XACK, XDEL, XINFO STREAM, WATCH"),
        *_on(keys.updates, may="DEL", when="somebody blocked the stream with its highest id"),
        *_on(keys.updates, keys.claims, absent(keys.meta), may="EVAL", when=full),
        *_on(keys.spec, keys.claims, may="WATCH", when=full),
        *_on(keys.updates, may="XADD", when=older),
        *_on(payloads, may="SET", when=older),
        *_on(payloads, may="GETRANGE, UNLINK"),
        *_on(payloads, may="MGET", when=lost),
        *_on(keys.lease, may="EVALSHA, GET, SET, DEL"),
        *_on(keys.lease, may="PTTL", when="a second aggregator runs"),
        *_on(keys.lease, may="PEXPIRE", when="somebody set a lease that does not expire"),
        *_heartbeats(all_keys),
        *_on(keys.lost, may="HGETALL, UNLINK"),
        *_on(keys.lost, may="HSET", when=lost),
        *_on(keys.claims, may="HGETALL, UNLINK"),
        *_on(keys.claims, may="HSET, PEXPIRE", when=lost),
        *_on(keys.problem, merged.problem, may="HSET, PEXPIRE, UNLINK", when="it cannot do something"),
        *_on(keys.worker(ANY), may="HGET", when="a worker was there before it"),
        *_on(merged.meta, may="HGETALL, HSET, DEL"),
        *_on(merged.weights, may="SET, EXISTS"),
        *_on(merged.fit, may="HGETALL"),
        *_on(merged.fit, may="WATCH, EXISTS, HSET", when="Redis has lost the fit of the merged gateway"),
        *_on(merged.weights_part(ANY, ANY), may="SET, EXISTS, PERSIST, UNLINK, WATCH", when=long),
        *_on(merged.weights, may="UNLINK", when=long),
        *_on(merged.meta, may="WATCH", when=long),
        *_on(merged.lease, may="EVALSHA, GET, SET, DEL"),
        *_on(may="SCAN, SCRIPT LOAD, MULTI, EXEC, UNWATCH"),
        Right(
            command="INFO",
            without="the aggregator does not notice that Redis may evict keys (maxmemory-policy)",
        ),
    )


def _copies(keys: ExpertKeys) -> Iterator[Right]:
    """An aggregator's rights on the copied parts of the tail; a user enrolled by an earlier release lacks them."""
    copies, payloads = keys.tail_part(ANY, ANY), keys.payloads(ANY)
    for command in ("EVAL", "STRLEN", "COPY"):
        yield Right(command=command, keys=(payloads,), without=NO_COPIES)
    for command in ("EVAL", "COPY", "PEXPIRE", "GETRANGE", "EXISTS", "WATCH", "PERSIST"):
        yield Right(command=command, keys=(copies,), without=NO_COPIES)
    for command in ("MGET", "UNLINK"):
        yield Right(command=command, keys=(copies,), when="an expert has a tail", without=NO_COPIED_TAIL)


def _heartbeats(keys: Keys) -> Iterator[Right]:
    """An aggregator's rights on the heartbeats; a user enrolled by an earlier release lacks them."""
    alone = "the aggregator shares no experts with others: it serves those that are free, and hands none over"
    for command in ("EVALSHA", "HSET", "PEXPIRE", "HGETALL", "HDEL"):
        yield Right(command=command, keys=(keys.aggregators,), without=alone)
    yield Right(command="TIME", without=alone)


def _operator(all_keys: Keys, expert: str, worker: str) -> tuple[Right, ...]:
    keys, merged = all_keys.expert(expert), all_keys.merged
    written = (keys.meta, keys.spec, keys.weights, keys.decided, keys.vectors, keys.log, keys.dead)
    enrols = "it enrols or revokes somebody"
    changes, adds = "it changes the rules of an expert or rolls it back", "it adds an expert"
    large = "it rolls back an expert with weights of 4 MiB and more"
    return (
        *_on(all_keys.experts, may="HGETALL, HGET, HSET"),
        *_on(keys.spec, keys.weights, may="GET, SET"),
        *_on(keys.meta, may="HGET"),
        *_on(keys.meta, keys.decided, keys.vectors, may="HGETALL, HSET"),
        *_on(keys.tail, may="HGETALL, UNLINK"),
        *_on(keys.tail_part(ANY, ANY), may="MGET, UNLINK"),
        *_on(keys.log, keys.dead, may="XRANGE, XADD"),
        *_on(keys.packed, may="SET"),
        *_on(keys.server_state, may="GET"),
        *_on(keys.server_state, may="SET", when="it restores a server optimizer's state"),
        *_on(keys.packed, keys.server_state, keys.lost, keys.claims, may="UNLINK"),
        *_on(*written, may="WATCH, EXISTS, UNLINK"),
        *_on(*_parts(keys), may="SET, GET, EXISTS, PERSIST, UNLINK, WATCH, EVAL", when=LONG),
        *_on(keys.weights_part(ANY, ANY), may="STRLEN", when=LONG),
        *_on(merged.weights, may="GET"),
        *_on(merged.fit, may="HGETALL, HSET, DEL", when="it fits the merged gateway"),
        *_on(merged.weights_part(ANY, ANY), may="GET", when="the merged gateway exceeds 512 MiB"),
        *_on(all_keys.experts, may="HKEYS, HDEL", when="it removes an expert"),
        *_on(
            keys.updates,
            keys.lease,
            keys.problem,
            keys.payloads(ANY),
            may="UNLINK",
            when="it removes an expert",
        ),
        *_on(keys.meta, may="EVAL", when=changes),
        *_on(keys.tail, may="WATCH", when=changes),
        *_on(keys.tail_part(ANY, ANY), may="EXISTS", when=changes),
        *_on(
            keys.tail,
            keys.decided,
            keys.vectors,
            keys.log,
            keys.dead,
            keys.weights,
            keys.packed,
            keys.server_state,
            may="EVAL, TYPE",
            when=changes,
        ),
        *_on(absent(keys.meta), may="EVAL", when="Redis is full"),
        *_on(keys.packed, keys.server_state, may="WATCH, STRLEN", when=changes),
        *_on(keys.weights, may="GETRANGE", when=changes),
        *_on(keys.packed, keys.server_state, may="GETRANGE", when=large),
        *_on(keys.weights, keys.packed, keys.server_state, may="SETRANGE, PTTL", when=large),
        *_on(all_keys.experts, may="HSETNX", when=adds),
        *_on(keys.lost, may="HGETALL", when=adds),
        *_on(keys.claims, may="EXISTS", when=changes),
        *_on(keys.worker(ANY), may="HGET", when=adds),
        *_on(may="MULTI, EXEC"),
        *_on(may="UNWATCH", when="Redis is full"),
        *(
            Right(
                command=command,
                when=enrols,
                without="nobody can be enrolled or revoked while the server runs",
            )
            for command in ("ACL SETUSER", "ACL DELUSER", "ACL LIST", "ACL SAVE", "ACL WHOAMI")
        ),
        # Its own selectors: an operator's other commands, such as DEL, do not work on the audit log.
        Right(command="XADD", keys=(all_keys.audit,), alone=True, when=enrols),
        Right(command="XREVRANGE", keys=(all_keys.audit,), alone=True, when=enrols),
        *_monitor(all_keys, expert, worker),
    )


def _monitor(all_keys: Keys, expert: str, worker: str) -> tuple[Right, ...]:
    keys, merged = all_keys.expert(expert), all_keys.merged
    leases = (keys.lease, merged.lease)
    return (
        *_on(all_keys.experts, keys.meta, keys.decided, merged.meta, merged.fit, may="HGETALL"),
        *_on(keys.weights, keys.spec, merged.weights, may="STRLEN"),
        *_on(keys.updates, may="XLEN, XINFO GROUPS"),
        *_on(keys.dead, may="XLEN, XREVRANGE"),
        *_on(keys.log, may="XREVRANGE"),
        *_on(keys.meta, may="HMGET", when="a worker trains an expert that is not listed"),
        *_on(keys.problem, merged.problem, may="HGETALL"),
        *_on(keys.worker(ANY), keys.trace(ANY), may="HMGET, PTTL"),
        *_on(*leases, may="PTTL"),
        *_on(may="SCAN"),
        Right(command="GET", keys=leases, alone=True, without="who serves an expert is shown as `somebody`"),
        Right(
            command="HGETALL", keys=(all_keys.aggregators,), without="it is not shown which aggregators live"
        ),
        Right(command="INFO", without="version and memory of the server are not shown"),
    )


AGGREGATOR = Role(name="aggregator", does="serve experts", rights=_aggregator)
WORKER = Role(name="worker", does="train", rights=_worker)
OPERATOR = Role(
    name="operator",
    does="back up, restore, change, roll back, add, remove, verify, fit, export and enrol",
    rights=_operator,
)
MONITOR = Role(name="monitor", does="read the status", rights=_monitor)
ROLES = {role.name: role for role in (AGGREGATOR, WORKER, OPERATOR, MONITOR)}


def worker_rights(keys: Keys, expert: str, worker: str, *, trains_gateway: bool) -> tuple[Right, ...]:
    """The rights of an expert's worker, with those that it needs on the gateway if it trains that, too.

    Raises:
        SettingsError: if the worker cannot train the gateway because of its name.
    """
    rights = WORKER.rights(keys, expert, worker)
    if not trains_gateway:
        return rights
    return rights + WORKER.rights(keys, GATEWAY, name_on_gateway(expert, worker))


def party_rights(party: Party, keys: Keys) -> tuple[Right, ...]:
    """A party's rights; a worker's cover the gateway, too, as the rules of its expert may ask for it at any time."""
    if party.role != WORKER.name:
        return ROLES[party.role].rights(keys, ANY, "")
    both = may_train_gateway(party.expert, party.name)
    return worker_rights(keys, party.expert, party.name, trains_gateway=both)


def party_rules(party: Party, keys: Keys, *, database: int = 0, cluster: bool = False) -> list[str]:
    """ACL rules of a party's user."""
    return acl_rules(party_rights(party, keys), database=database, cluster=cluster)


def acl_rules(rights: tuple[Right, ...], *, database: int = 0, cluster: bool = False) -> list[str]:
    """ACL rules that grant these rights and no others, for an ACL file or ACL SETUSER (Redis 7.0, Valkey).

    Args:
        rights: of one role, or of several roles that share a user.
        database: of the URL; one other than 0 needs SELECT, which is then allowed.
        cluster: of a Redis Cluster, whose users also ask it for its nodes.
    """
    shared = [right for right in rights if not right.alone]
    touched = dict.fromkeys(key for right in shared for key in right.keys)
    written = {key for right in shared if right.command not in READS for key in right.keys}
    more = ["select"] * bool(database) + list(CLUSTER_RIGHTS) * cluster
    commands = sorted({*(_acl_name(right.command) for right in shared), *more})
    selectors = [
        f"({' '.join(f'{_mode(right.command)}~{key}' for key in right.keys)} -@all +{_acl_name(right.command)})"
        for right in rights
        if right.alone
    ]
    return [
        "resetkeys", "resetchannels", *(f"~{key}" if key in written else f"%R~{key}" for key in touched), "-@all",
        *(f"+{command}" for command in commands), *selectors,
    ]  # fmt: skip


def _mode(command: str) -> str:
    return "%R" if command in READS else "%W"


def _acl_name(command: str) -> str:
    return command.lower().replace(" ", "|")
