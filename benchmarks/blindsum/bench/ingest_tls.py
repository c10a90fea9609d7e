"""The limit that ingest is compared with: mutual TLS into one preallocated buffer, and nothing else.

A process of its own receives, so that its CPU is the receiver's alone.
"""

import datetime
import multiprocessing
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BUFFER_BYTES = 256 * 1024


@contextmanager
def credentials() -> Iterator[tuple[Path, Path]]:
    """A self-signed P-256 certificate that both ends use and trust, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    with tempfile.TemporaryDirectory(prefix="blindsum-") as folder:
        chain, secret = Path(folder) / "certificate.pem", Path(folder) / "key.pem"
        chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        yield chain, secret


def _context(purpose: int, chain: Path, secret: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(purpose)
    context.load_cert_chain(chain, secret)
    context.load_verify_locations(chain)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def _receive(pipe: Connection, chain: Path, secret: Path, total: int) -> None:
    context = _context(ssl.PROTOCOL_TLS_SERVER, chain, secret)
    buffer = bytearray(BUFFER_BYTES)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        plain, _ = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection:
            received, start = 0, 0.0
            while received < total:
                received += connection.recv_into(buffer)
                start = start or time.process_time()  # the handshake isn't counted
            pipe.send(time.process_time() - start)


def raw_tls_cpu_s(total: int) -> float:
    """CPU seconds in which a receiver takes `total` bytes over mutual TLS into one buffer."""
    fork_server = multiprocessing.get_context("spawn")
    with credentials() as (chain, secret):
        here, there = fork_server.Pipe()
        process = fork_server.Process(target=_receive, args=(there, chain, secret, total), daemon=True)
        process.start()
        port = here.recv()
        context = _context(ssl.PROTOCOL_TLS_CLIENT, chain, secret)
        data = memoryview(bytes(BUFFER_BYTES))
        with (
            socket.create_connection(("127.0.0.1", port)) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            left = total
            while left:
                part = data[:left]
                connection.sendall(part)
                left -= part.nbytes
            seconds: float = here.recv()
        process.join()
    return seconds
