"""When the certificates of a TLS connection end, so that somebody renews them in time."""

import socket
import ssl
from contextlib import suppress


def earliest_end(used: socket.socket | None, ca_file: str | None, ca_text: str | None = None) -> float | None:
    """The end of the server's certificate or of a CA in file or text, whichever is first (seconds since 1970).

    None without TLS, or if the certificate was not verified: Python then tells nothing of it.
    """
    if not isinstance(used, ssl.SSLSocket) or not (server := used.getpeercert()):
        return None
    certificates = [server]
    if ca_file or ca_text:
        trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with suppress(OSError):  # the file has gone since the connection was made
            trusted.load_verify_locations(ca_file, cadata=ca_text)
            certificates += trusted.get_ca_certs()
    return min(ssl.cert_time_to_seconds(str(one["notAfter"])) for one in certificates)
