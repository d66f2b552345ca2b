"""A federation's own certificate authority: the server's certificate, and clients' from their requests.

Needs the package `cryptography`, and only where certificates are made. All keys are on the curve P-256.
"""

import datetime
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedmoe.errors import SettingsError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes

CA_DAYS = 3650
SERVER_DAYS = 730
CLIENT_DAYS = 730
EARLY = datetime.timedelta(hours=1)  # clocks differ
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: str
    key: str = field(repr=False)


def require_cryptography() -> None:
    """Raise SettingsError, which says what to install, if the package is missing."""
    try:
        import cryptography.x509  # noqa: F401  # only to see whether it is installed
    except ImportError:
        raise SettingsError(
            "certificates are made with the package cryptography, which is not installed: pip install "
            "'fedmoe[secure]'",
            about="cryptography",
        ) from None


def make_authority(name: str, *, now: datetime.datetime | None = None) -> Pair:
    """A new certificate authority of this name."""
    from cryptography import x509

    key = _new_key()
    builder = _builder(name, name, key.public_key(), now or _now(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(is_ca=True), critical=True)
    return Pair(certificate=_signed(builder, key, key.public_key()), key=_key_text(key))


def make_server(
    authority: Pair, hosts: Sequence[str], *, days: int = SERVER_DAYS, now: datetime.datetime | None = None
) -> Pair:
    """A server's certificate for these host names and addresses.

    Raises:
        SettingsError: if a host is neither.
    """
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    key = _new_key()
    names = x509.SubjectAlternativeName([_alternative(host) for host in dict.fromkeys(hosts)])
    builder = _builder(hosts[0], _issuer(authority), key.public_key(), now or _now(), days)
    builder = builder.add_extension(names, critical=False)
    # A replica is a client of its master.
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return Pair(certificate=_leaf(builder, authority, purposes), key=_key_text(key))


def sign_request(
    authority: Pair,
    request: bytes,
    name: str,
    *,
    days: int = CLIENT_DAYS,
    now: datetime.datetime | None = None,
) -> str:
    """A client's certificate for the key of a certificate request (PEM); the names in the request are ignored.

    Raises:
        SettingsError: if the request cannot be read, or its signature is wrong.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        asked = x509.load_pem_x509_csr(request)
        is_sound, key = asked.is_signature_valid, asked.public_key()
    except ValueError:
        raise SettingsError("the certificate request is not PEM, or it is damaged", about="csr") from None
    is_strong = isinstance(key, ec.EllipticCurvePublicKey) or (
        isinstance(key, rsa.RSAPublicKey) and key.key_size >= 2048
    )
    if not is_sound or not is_strong:
        raise SettingsError(
            "the certificate request must be signed by its own key, an EC key or an RSA key of 2048 bits or more",
            about="csr",
        )
    assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    builder = _builder(name[:64], _issuer(authority), key, now or _now(), days)
    return _leaf(builder, authority, [ExtendedKeyUsageOID.CLIENT_AUTH])


def hosts_of(certificate: str) -> list[str]:
    """The host names and addresses in a certificate."""
    from cryptography import x509

    found = x509.load_pem_x509_certificate(certificate.encode())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def fits(pair: Pair) -> bool:
    """True if the key is the certificate's, and both can be read."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(pair.key.encode(), None)
        certified = x509.load_pem_x509_certificate(pair.certificate.encode()).public_key()
    except (ValueError, TypeError):  # TypeError: it has a passphrase
        return False
    return isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certified


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _new_key() -> "ec.EllipticCurvePrivateKey":
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _key_text(key: "ec.EllipticCurvePrivateKey") -> str:
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()).decode()


def _name(text: str) -> "x509.Name":
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _issuer(authority: Pair) -> str:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    subject = x509.load_pem_x509_certificate(authority.certificate.encode()).subject
    return str(subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _builder(
    subject: str, issuer: str, key: "CertificatePublicKeyTypes", now: datetime.datetime, days: int
) -> "x509.CertificateBuilder":
    from cryptography import x509

    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _leaf(
    builder: "x509.CertificateBuilder", authority: Pair, purposes: "Sequence[x509.ObjectIdentifier]"
) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    ca_key = load_pem_private_key(authority.key.encode(), None)
    assert isinstance(ca_key, ec.EllipticCurvePrivateKey)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(is_ca=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return _signed(builder, ca_key, ca_key.public_key())


def _signed(
    builder: "x509.CertificateBuilder", key: "ec.EllipticCurvePrivateKey", issuer: "ec.EllipticCurvePublicKey"
) -> str:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer)
    made = builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())
    return made.public_bytes(Encoding.PEM).decode()


def _usage(*, is_ca: bool) -> "x509.KeyUsage":
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_ca, key_cert_sign=is_ca, crl_sign=is_ca, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _alternative(host: str) -> "x509.GeneralName":
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise SettingsError(
            f"{host!r} is neither a host name nor an IP address: write letters outside ASCII as punycode",
            about="host",
        ) from None
