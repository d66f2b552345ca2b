"""All private parts of redis-py that FedMoE uses; a test checks that they still exist.

redis-py has no public way to reach a connection's socket, to end a wait from another thread, or the encoder, to send
buffers without copying them.
"""

import socket
from typing import Any

from redis._parsers import Encoder

__all__ = ["Encoder", "socket_of"]


def socket_of(connection: Any) -> socket.socket | None:
    """The socket of one of redis-py's connections, None while it is not connected."""
    found: socket.socket | None = connection._sock
    return found
