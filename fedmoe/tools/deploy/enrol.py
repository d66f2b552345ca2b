"""Makes the enrolment of a further party from the connection of an operator."""

from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from fedmoe.enrolment import Enrolment
from fedmoe.errors import SettingsError
from fedmoe.protocol.parties import Party
from fedmoe.redis_settings import RedisSettings
from fedmoe.store.url import is_loopback, is_tls
from fedmoe.tools.deploy.certificates import require_cryptography, sign_request
from fedmoe.tools.deploy.deployment import read_authority
from fedmoe.tools.deploy.parties import new_enrolment

BESIDE = (".acl", ".crt", ".key")  # ends of the files beside an enrolment file


def enrolment_for(
    redis: RedisSettings, party: Party, old: Enrolment | None, *, url: str = "", certificate_file: str = ""
) -> Enrolment:
    """A party's enrolment, with a new password: the operator's CA, and a URL by which the party reaches Redis.

    Args:
        redis: of the operator.
        party: whom it enrols.
        old: the enrolment that it replaces, None if there is none; its certificate is kept.
        url: "" for the operator's own; or for the old one's, if the operator's is of this machine only.
        certificate_file: of a new certificate, "" for none.

    Raises:
        SettingsError: if the URL cannot be used, or the CA that the operator's URL names cannot be read.
    """
    own = without_login(redis.url)
    if url:
        if "@" in url:
            raise SettingsError("--url has a login: the enrolment has its own", about="url")
        RedisSettings(url=url, insecure=redis.insecure)
    elif old and is_loopback(own):
        url = old.url
    ca = ca_of(redis)
    enrolled = new_enrolment(party, url=url or own, prefix=redis.prefix, ca=ca)
    if certificate_file:
        key_file = str(Path(certificate_file).with_suffix(".key"))
        return replace(enrolled, certificate_file=certificate_file, key_file=key_file)
    return (
        replace(enrolled, certificate_file=old.certificate_file, key_file=old.key_file) if old else enrolled
    )


def check_out(out: Path, party: Party, prefix: str, *, rotate: bool) -> Enrolment | None:
    """Refuse a file that must not be written as this party's enrolment.

    Returns:
        The enrolment to replace, None if there is none.

    Raises:
        SettingsError: if the files beside it would have its name, or it is there and is not the one to replace.
    """
    if out.suffix in BESIDE:
        raise SettingsError(
            f"{str(out)!r} would be the name of a file beside the enrolment ({', '.join(BESIDE)}): end it with .toml",
            about="out",
        )
    if not out.exists():
        return None
    if not rotate:
        raise SettingsError(f"there is {str(out)!r} already: name another file (--out)", about="out")
    there = Enrolment.read(out)
    if there.user != party.user(prefix):
        raise SettingsError(
            f"{str(out)!r} is not the enrolment file of the {party}: name another file (--out)", about="out"
        )
    return there


def certificate_for(party: Party, prefix: str, csr: Path | None, deployment: Path | None) -> str:
    """The certificate for a party's request; "" if it has none.

    Raises:
        SettingsError: if one of the two is missing, or cannot be read.
    """
    if csr is None and deployment is None:
        return ""
    if csr is None or deployment is None:
        raise SettingsError(
            "--csr and --deployment go together: the request, and the directory with the CA that signs it",
            about="csr" if csr is None else "deployment",
        )
    require_cryptography()
    authority = read_authority(deployment)
    try:
        request = csr.read_bytes()
    except OSError as error:
        raise SettingsError(f"cannot read {str(csr)!r}: {error.strerror}", about="csr") from error
    return sign_request(authority, request, party.user(prefix))


def without_login(url: str) -> str:
    """The URL without user, password and certificate files of this machine."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    kept = [item for item in query.split("&") if item and not item.startswith("ssl_")]
    if scheme in ("sentinel", "cluster") and is_tls(url) and "ssl=true" not in kept:
        kept.append("ssl=true")
    return f"{scheme}://{place.rpartition('@')[2]}" + (f"?{'&'.join(kept)}" if kept else "")


def ca_of(redis: RedisSettings) -> str:
    """The CA in the operator's enrolment, or the text of the file that `ssl_ca_certs` in the URL names; "" for neither.

    Raises:
        SettingsError: if that file cannot be read.
    """
    from urllib.parse import parse_qs

    if redis.enrolled:
        return redis.enrolled.ca
    named = parse_qs(urlsplit(redis.url).query).get("ssl_ca_certs")
    if not named:
        return ""
    try:
        return Path(named[0]).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the CA {named[0]!r} of the URL", about="ssl_ca_certs") from error
