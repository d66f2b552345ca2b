"""Turns an error of TLS into one sentence: which certificate is wrong, and who does what. Pure."""

import re
import time

_OTHER_HOST = re.compile(r"(?:Hostname|IP address) mismatch, certificate is not valid for '([^']+)'")


def tls_problem(text: str, url: str, now: float | None = None) -> tuple[str, str] | None:
    """What an error text of redis-py is about and the sentence for it; None if TLS is not the reason.

    Args:
        text: of the error.
        url: for people, without login.
        now: Unix time; None for the clock's.
    """
    found = _certificate_problem(text, now)
    if found is None and "WRONG_VERSION_NUMBER" in text.upper().replace(" ", "_"):
        found = "does not speak TLS at this port: check the port, or its tls-port"
    elif found is None and re.search(r"CERTIFICATE_REQUIRED|certificate required", text):
        found = (
            "asks for a client certificate: name certificate_file and key_file in the enrolment file (`--csr` of the "
            "enrol commands signs a request)"
        )
    elif found is None and re.search(r"ALERT_(UNKNOWN_CA|BAD_CERTIFICATE|CERTIFICATE_EXPIRED)", text.upper()):
        found = "refuses the client certificate of this enrolment: ask the operator to sign a new request"
    return ("certificate", f"Redis at {url} {found}") if found else None


def hint_of_silence(error: BaseException | None) -> str:
    """What may be wrong if a server took the connection and said nothing to the beginning of TLS; else ""."""
    while error is not None and "handshake operation timed out" not in str(error):
        error = error.__cause__ or error.__context__
    if error is None:
        return ""
    return (
        ": if it does not speak TLS at this port, its URL begins with redis://, or is one without ?ssl=true"
    )


def _certificate_problem(text: str, now: float | None) -> str | None:
    if "certificate has expired" in text:
        return (
            f"has a certificate that has expired (this machine's clock says {_utc(now)}): the operator renews it "
            "(fedmoe init DIR --renew)"
        )
    if "certificate is not yet valid" in text:
        return f"has a certificate that is not valid yet: this machine's clock says {_utc(now)}, set it right, or wait"
    if found := _OTHER_HOST.search(text):
        return (
            f"has a certificate for other hosts, not for {found[1]}: use a host that it names, or renew it for this "
            f"one too (fedmoe init DIR --renew --host {found[1]}); behind Sentinel or in a cluster, it is what "
            "these announce"
        )
    if "CERTIFICATE_VERIFY_FAILED" in text or "certificate verify failed" in text:
        return (
            "has a certificate that the CA of this party did not sign: take the enrolment file of this federation, "
            "or name the right CA (?ssl_ca_certs=FILE); if neither helps, somebody else answers there"
        )
    return None


def _utc(now: float | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
