"""Reads the validation losses in an expert's log."""

from fedmoe.protocol.fields import number, whole
from fedmoe.store.connection import Connection
from fedmoe.util.text import printable

MOST_LINES = 10_000  # of the log; the newest


def read_points(connection: Connection, expert: str) -> list[dict[str, str | float | int | None]]:
    """The validation losses in the newest MOST_LINES lines, oldest first: worker, version, loss, rows and rows_set."""
    key = connection.keys.expert(expert).log
    connection = connection.at(key)
    with connection.errors():
        lines = connection.client.xrevrange(key, count=MOST_LINES)
    return [
        {
            "worker": printable(fields.get(b"worker", b"")),
            "version": whole(fields.get(b"val_version")),
            "loss": number(fields.get(b"val_loss")),
            "rows": whole(fields.get(b"val_rows")),
            "rows_set": printable(fields.get(b"val_set", b"")),
        }
        for _, fields in reversed(lines)
        if b"val_loss" in fields
    ]
