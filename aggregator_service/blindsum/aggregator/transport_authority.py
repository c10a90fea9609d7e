"""The operator's transport authority: who may open a TLS connection. It means nothing for trust.

ECDSA P-256 throughout (Ed25519 certificates fail gRPC's handshake). The authority's key is made on first
start, lives in the data directory with mode 0600, and never leaves it. A member's certificate carries the
URI `blindsum:<federation id hex>/<member id>`; it is short-lived, and whether it still counts is decided
at each call (peer_identity), since TLS here has no revocation list.
"""

import datetime
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from blindsum.aggregator.store.file_blobs import sync_directory
from blindsum.crypto.errors import RefusalReason, Refused
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_AUTHORITY_DAYS = 3650
_SKEW = datetime.timedelta(minutes=10)
MAX_CSR_BYTES = 4096


@dataclass(frozen=True)
class IssuedCertificate:
    """A member's certificate: PEM chain, serial number (big-endian bytes), and when it expires."""

    chain: bytes
    serial: bytes
    not_after_ms: int


def serial_bytes(serial: int) -> bytes:
    """A certificate's serial number as it is stored."""
    return serial.to_bytes(20, "big")


def member_uri(federation: bytes, member: str) -> str:
    """The subject alternative name that stands for a member."""
    return f"blindsum:{federation.hex()}/{member}"


def parse_csr(csr: bytes) -> x509.CertificateSigningRequest:
    """A signing request (DER) for a P-256 key that its sender holds. Raises `Refused`."""
    if len(csr) > MAX_CSR_BYTES:
        raise Refused(RefusalReason.WRONG_SIZE, f"the certificate request is above {MAX_CSR_BYTES} bytes")
    try:
        request = x509.load_der_x509_csr(csr)
        key = request.public_key()
        valid = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature, TypeError):
        raise Refused(RefusalReason.MALFORMED, "the certificate request isn't valid DER PKCS#10") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise Refused(RefusalReason.MALFORMED, "the certificate request must be for an ECDSA P-256 key")
    if not valid:
        raise Refused(RefusalReason.SIGNATURE, "the certificate request isn't signed by its own key")
    return request


def _write_private(path: Path, data: bytes) -> None:
    aside = path.with_name(path.name + ".new")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)
    aside.rename(path)
    sync_directory(path.parent)


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _names(names: tuple[str, ...]) -> list[x509.GeneralName]:
    general: list[x509.GeneralName] = []
    for name in names:
        try:
            general.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            general.append(x509.DNSName(name))
    return general


class TransportAuthority:
    """Opens or makes the authority in `directory`, and issues certificates under it."""

    def __init__(self, directory: Path, now: datetime.datetime | None = None) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        now = now or datetime.datetime.now(datetime.UTC)
        key_path, certificate_path = directory / "transport_ca.key", directory / "transport_ca.pem"
        if not key_path.exists() or not certificate_path.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            certificate = self._self_signed(key, now)
            _write_private(key_path, _pem_key(key))
            _write_private(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
        loaded = serialization.load_pem_private_key(key_path.read_bytes(), None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        self._key = loaded
        self.pem = certificate_path.read_bytes()
        self._certificate = x509.load_pem_x509_certificate(self.pem)

    @staticmethod
    def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "blindsum transport authority")])
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + datetime.timedelta(days=_AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )

    def _issue(
        self,
        public: ec.EllipticCurvePublicKey,
        common_name: str,
        names: list[x509.GeneralName],
        use: x509.ObjectIdentifier,
        days: int,
        now: datetime.datetime,
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(min(now + datetime.timedelta(days=days), self._certificate.not_valid_after_utc))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )

    def server_certificate(
        self, names: tuple[str, ...], days: int, now: datetime.datetime | None = None
    ) -> tuple[bytes, bytes]:
        """A fresh (key PEM, certificate chain PEM) for the listeners; the key stays in memory."""
        now = now or datetime.datetime.now(datetime.UTC)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._issue(
            key.public_key(), names[0], _names(names), ExtendedKeyUsageOID.SERVER_AUTH, days, now
        )
        return _pem_key(key), certificate.public_bytes(serialization.Encoding.PEM) + self.pem

    def member_certificate(
        self, csr: bytes, federation: bytes, member: str, days: int, now_ms: int
    ) -> IssuedCertificate:
        """A certificate for a member's transport key. Whatever names the request asks for are ignored."""
        key = parse_csr(csr).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        now = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(member_uri(federation, member))]
        certificate = self._issue(key, member, names, ExtendedKeyUsageOID.CLIENT_AUTH, days, now)
        return IssuedCertificate(
            chain=certificate.public_bytes(serialization.Encoding.PEM) + self.pem,
            serial=serial_bytes(certificate.serial_number),
            not_after_ms=int(certificate.not_valid_after_utc.timestamp() * 1000),
        )


def _usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
