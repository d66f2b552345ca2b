"""A Redis that comes back from an older file, for tests: what it held is put back, and all connections break."""

from dataclasses import dataclass

from fedmoe.store.connection import Connection


@dataclass(frozen=True)
class Snapshot:
    """All keys of a server at one moment, as its file would hold them."""

    keys: dict[bytes, tuple[bytes, int]]

    @classmethod
    def take(cls, connection: Connection) -> "Snapshot":
        """Read everything in one transaction."""
        client = connection.client
        names = list(client.scan_iter(count=1000))
        with client.pipeline(transaction=True) as pipe:
            for name in names:
                pipe.dump(name)
                pipe.pttl(name)
            replies = iter(pipe.execute())
        return cls({name: (dump, ttl) for name, dump, ttl in zip(names, replies, replies, strict=True)})

    def bring_back(self, connection: Connection) -> None:
        """Make the server what it was, in one transaction, and cut all other connections."""
        client = connection.client
        with client.pipeline(transaction=True) as pipe:
            pipe.flushdb()
            for name, (dump, ttl) in self.keys.items():
                pipe.restore(name, max(0, ttl), dump)
            pipe.client_kill_filter(_type="normal", skipme=True)
            pipe.execute()
