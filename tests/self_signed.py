"""A certificate of a server on loopback, for tests of TLS."""

import shutil
import subprocess
from pathlib import Path

import pytest


def certificate_for(server: str, directory: Path) -> Path:
    """A self-signed certificate for 127.0.0.1 with its key, in one file (PEM).

    Skips the test if there is no openssl, or the server was built without TLS.
    """
    openssl = shutil.which("openssl")
    without = [server, "--port", "0", "--tls-port", "1"]  # no certificate: it ends, and says why
    said = subprocess.run(without, capture_output=True, text=True, check=False, cwd=directory).stdout
    if openssl is None or "Failed finding TLS support" in said:
        pytest.skip("no openssl, or a server that was built without TLS")
    file = directory / "both.pem"
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
         "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", directory / "c.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    with file.open("a") as both:
        both.write((directory / "c.pem").read_text())
    return file
