"""The parts of redis-py that it does not promise to keep, all that FedMoE uses; a test holds that they are there.

For these nothing public serves: a connection's socket, to end a wait from another thread, and the encoder, to send
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
