"""Three masters and their replicas on loopback, as a Redis Cluster: real processes that can be stopped and killed."""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis

from fedmoe.store.cluster import SLOTS, slot_of
from tests.ports import free_port
from tests.processes import eventually
from tests.sentinel import Process

NODE_TIMEOUT_MS = 1000  # a master that does not answer for so long has failed


class Cluster:
    """A cluster; use as a context manager. The first `masters` nodes are its masters until one fails over.

    Args:
        program: redis-server or valkey-server.
        directory: empty; everything is written there.
        masters: how many.
        replicas: of each master, 0 or 1.
        options: further lines of each node's configuration.
        certificate: as in `tests.sentinel.Process`.
    """

    def __init__(
        self, program: str, directory: Path, *, masters: int = 3, replicas: int = 1, options: Sequence[str] = (),
        certificate: Path | None = None,
    ) -> None:  # fmt: skip
        directory.mkdir(exist_ok=True)
        config = [
            "save ''", "appendonly yes", "appendfsync no", "repl-diskless-sync-delay 0", "repl-ping-replica-period 1",
            "cluster-enabled yes", f"cluster-node-timeout {NODE_TIMEOUT_MS}", "cluster-replica-validity-factor 0",
            *options,
        ]  # fmt: skip
        config += ["tls-cluster yes"] if certificate else []
        self.masters = masters
        self.nodes = []
        for number in range(masters * (1 + replicas)):
            # The bus listens on port + 10000 by default, which may be no port at all.
            config_of = [*config, f"cluster-port {free_port()}"]
            self.nodes.append(
                Process(program, directory / f"node{number}", config_of, certificate=certificate)
            )
        self.hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:masters])
        self.url = f"cluster://{self.hosts}"

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            self._join()
        except BaseException:
            self.stop()
            raise
        return self

    def _join(self) -> None:
        first = self.nodes[0]
        for number, node in enumerate(self.nodes[: self.masters]):
            begin, end = (SLOTS * n // self.masters for n in (number, number + 1))
            node.client.execute_command("CLUSTER ADDSLOTSRANGE", begin, end - 1)
            node.client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in self.nodes[1:]:
            words = node.client.execute_command("CLUSTER MYID"), self._bus(node)
            first.client.execute_command("CLUSTER MEET", "127.0.0.1", node.port, words[1])
        eventually("all nodes to know all", self._all_known, timeout_s=20)
        for number, node in enumerate(self.nodes[self.masters :]):
            node.client.execute_command("CLUSTER REPLICATE", self.id_of(self.nodes[number % self.masters]))
        eventually("the cluster", self.is_whole, timeout_s=30)

    def _bus(self, node: Process) -> int:
        return int(node.client.config_get("cluster-port")["cluster-port"])

    def _all_known(self) -> bool:
        return all(int(self.info(node)["cluster_known_nodes"]) == len(self.nodes) for node in self.nodes)

    @staticmethod
    def id_of(node: Process) -> str:
        """The id by which the cluster knows a node."""
        raw: Any = node.client.execute_command("CLUSTER MYID")
        return str(raw.decode())

    @staticmethod
    def info(node: Process) -> dict[str, str]:
        """What a node says about the cluster."""
        raw: Any = node.client.execute_command("CLUSTER INFO")
        if isinstance(raw, bytes):
            raw = dict(line.split(":") for line in raw.decode().splitlines() if ":" in line)
        return dict(raw)

    def is_whole(self) -> bool:
        """True if all nodes say that all slots are served, and each replica follows a master."""
        alive = [node for node in self.nodes if node.is_running()]
        roles = [node.client.role() for node in alive]
        return (
            all(self.info(node)["cluster_state"] == "ok" for node in alive)
            and sum(role[0] == b"master" for role in roles) >= self.masters
            and all(role[3] == b"connected" for role in roles if role[0] == b"slave")
        )

    def master_of(self, key: str) -> Process:
        """The node that is the master of this key's slot now."""
        slot = slot_of(key)
        for node in self.nodes:
            with suppress(redis.RedisError):
                if node.is_running() and node.client.role()[0] == b"master" and slot in self.slots_of(node):
                    return node
        raise LookupError(f"no master of slot {slot}")

    def slots_of(self, node: Process) -> set[int]:
        """The slots that a node says are its own."""
        for one in node.client.cluster("NODES").values():
            if "myself" in one["flags"]:
                return {slot for ends in one["slots"] for slot in range(int(ends[0]), int(ends[-1]) + 1)}
        return set()

    def replica_of(self, master: Process) -> Process:
        """A replica of this master that is in step."""
        for node in self.nodes:
            with suppress(redis.RedisError):
                role = node.client.role() if node.is_running() else (b"",)
                if role[0] == b"slave" and role[2] == master.port and role[3] == b"connected":
                    return node
        raise LookupError(f"no replica of {master.port}")

    def fail_over(self, key: str) -> Process:
        """CLUSTER FAILOVER of this key's master; returns the new one."""
        replica = self.replica_of(self.master_of(key))

        def failed_over() -> bool:
            if replica.client.role()[0] == b"master":
                return True
            with suppress(redis.ResponseError):  # one is under way; it gives up after 5 s
                replica.client.execute_command("CLUSTER FAILOVER")
            return False

        eventually("the failover", failed_over, timeout_s=30)
        return replica

    def begin_move(self, key: str, target: Process) -> tuple[Process, int]:
        """Mark this key's slot as on its way to `target`; returns its source and the slot."""
        source, slot = self.master_of(key), slot_of(key)
        target.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", self.id_of(source))
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", self.id_of(target))
        return source, slot

    def move_keys(self, source: Process, target: Process, slot: int, *, pause_s: float = 0.0) -> int:
        """Move all keys of a slot, as redis-cli does, and then the slot; returns how many keys were moved."""
        moved = 0
        while keys := source.client.execute_command("CLUSTER GETKEYSINSLOT", slot, 10):
            source.client.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 30_000, "KEYS", *keys)
            moved += len(keys)
            time.sleep(pause_s)
        self.end_move(source, target, slot)
        return moved

    def end_move(self, source: Process, target: Process, slot: int) -> None:
        """Tell all masters that the slot is the target's; the target first."""
        new = self.id_of(target)
        for node in (target, source, *self.nodes):
            with suppress(redis.RedisError):
                node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", new)

    def move_slot(self, key: str, *, pause_s: float = 0.0) -> int:
        """Move this key's slot to another master; returns how many keys were moved."""
        source = self.master_of(key)
        others = (
            node for node in self.nodes if node is not source and node.is_running() and self.slots_of(node)
        )
        target = next(node for node in others if node.client.role()[0] == b"master")
        source, slot = self.begin_move(key, target)
        return self.move_keys(source, target, slot, pause_s=pause_s)

    def stop(self) -> None:
        """Kill everything that runs."""
        for node in self.nodes:
            with suppress(ProcessLookupError):
                node.kill()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
