"""A member's folder on disk: keys, the pinned federation, what the owner signed, and the running round.

    federation.json   who the federation is: owner key, addresses, transport CA (pinned at join)
    identity.key      Ed25519 identity key        hpke.key       HPKE private key
    transport.key     TLS key                     certificate.pem  TLS certificate, once admitted
    group-<epoch>.key group key of the epoch      he-<digest>.key  HE secret keys
    member.db         counters, documents, the running round, receipts (SQLite)
    state-*.bin       training states             spool-<n>.bin  the running round's upload
    local.bin         the tensors that aren't shared
    model-*.bin       newest version of each published model that was fetched
    lock              held while the folder is open

Everything has mode 0600 in a folder of mode 0700; what was written is durable before it is used.
"""

import io
import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import numpy as np
from blindsum.client.private_files import (
    FolderError,
    FolderLock,
    make_private_folder,
    read_private,
    remove_private,
    write_private,
)
from blindsum.crypto.canonical import (
    Document,
    Message,
    decode_document,
    decode_message,
    encode_document,
    encode_message,
)
from blindsum.crypto.errors import Refused
from blindsum.crypto.primitives.sealing import HpkeKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.documents import Digest, MemberId, PublicKey
from blindsum.crypto.trust.group_key import GroupKey
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from numpy.typing import NDArray

_SCHEMA: Final = """
CREATE TABLE fact (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE roster (version INTEGER PRIMARY KEY, signed BLOB NOT NULL) STRICT;
CREATE TABLE plan (name TEXT PRIMARY KEY, version INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE round (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    number INTEGER NOT NULL, header BLOB NOT NULL, roster BLOB NOT NULL, plan BLOB NOT NULL,
    snapshot BLOB NOT NULL, upload BLOB NOT NULL, upload_digest BLOB NOT NULL, h1 BLOB NOT NULL,
    confirmed INTEGER NOT NULL) STRICT;
CREATE TABLE reply (
    number INTEGER NOT NULL, step TEXT NOT NULL, reply BLOB NOT NULL, PRIMARY KEY (number, step)
) STRICT, WITHOUT ROWID;
CREATE TABLE receipt (
    number INTEGER PRIMARY KEY, body BLOB NOT NULL, metrics TEXT NOT NULL, sum BLOB NOT NULL,
    max_error REAL NOT NULL) STRICT;
"""
_VERSION: Final = 2


class Pin(Document, frozen=True, kw_only=True):
    """What a member learnt at join and never takes from the aggregator."""

    federation: Digest
    name: str
    owner: PublicKey
    member: MemberId
    organisation: str
    enrolment_address: str
    member_address: str
    ca: str
    request_id: Digest


@dataclass
class StoredRound:
    """The round that a member is in, as it was last made durable. `snapshot` holds secrets."""

    number: int
    header: bytes
    roster: bytes
    plan: bytes
    snapshot: bytes = field(repr=False)
    upload: bytes = field(default=b"", repr=False)
    """The signed reply of the upload step, once sealed."""
    upload_digest: bytes = b""
    h1: bytes = b""
    """Set once the upload began."""
    confirmed: bool = False
    """A reply to confirm was made (without that step: the sum was opened): no cached update may follow."""


@dataclass(frozen=True)
class StoredReceipt:
    """A signed receipt with what only members know of the round."""

    number: int
    body: bytes
    metrics: dict[str, float]
    sum_digest: bytes = field(repr=False)
    max_error: float = 0.0


class StateMark(Message, frozen=True):
    """Which training state a file holds: its place in a plan's chain of states, and what it follows from.

    `chain` names the chain (plan and S_0), `digest` is keyed, `round` the round that made it.
    """

    chain: Digest
    index: int
    digest: Digest
    round: int

    @property
    def file_name(self) -> str:
        """The file's name."""
        return f"state-{self.index}-{self.digest.hex()[:16]}.bin"


class MemberFolder:
    """An open member's folder, locked until `close`.

    `read_only` takes no lock and changes nothing: for looking while a member runs.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._lock = None if read_only else FolderLock(path)
        try:
            try:
                self.pin = decode_document(read_private(path / "federation.json"), Pin, "federation.json")
            except Refused as refusal:
                raise FolderError(
                    f"{path}: {refusal.text}; restore it from a backup, or join again"
                ) from None
            self.identity = SigningKey(read_private(path / "identity.key"))
            self.hpke = HpkeKey(read_private(path / "hpke.key"))
            self._db = self._open_database(read_only)
        except BaseException:
            if self._lock is not None:
                self._lock.release()
            raise
        self._mutex = threading.RLock()

    @classmethod
    def create(
        cls,
        path: Path,
        pin: Pin,
        identity: SigningKey,
        hpke: HpkeKey,
        transport: bytes,
        body: bytes,
        csr: bytes,
    ) -> Self:
        """A new folder with its keys and its join request (body, certificate request).

        Raises `FolderError` unless the folder is new or empty.
        """
        make_private_folder(path)
        write_private(path / "identity.key", identity.secret_bytes())
        write_private(path / "hpke.key", hpke.secret_bytes())
        write_private(path / "transport.key", transport)
        write_private(path / "join.json", body)
        write_private(path / "transport.csr", csr)
        write_private(path / "federation.json", encode_document(pin))
        return cls(path)

    def close(self) -> None:
        """Close the database and release the lock."""
        with self._mutex:
            self._db.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<MemberFolder of {self.pin.member}>"

    # Keys

    @property
    def transport_key(self) -> bytes:
        """PEM of the TLS key."""
        return read_private(self.path / "transport.key")

    @property
    def certificate(self) -> bytes:
        """PEM chain of the TLS certificate; empty before admission."""
        path = self.path / "certificate.pem"
        return read_private(path) if path.exists() else b""

    @property
    def join_body(self) -> bytes:
        """The exact bytes of the join request."""
        return read_private(self.path / "join.json")

    @property
    def certificate_request(self) -> bytes:
        """The certificate request (DER) that went with the join request."""
        return read_private(self.path / "transport.csr")

    def keep_certificate(self, chain: bytes) -> None:
        """Store a new TLS certificate."""
        write_private(self.path / "certificate.pem", chain)

    def group_key(self, epoch: int) -> GroupKey | None:
        """The group key of an epoch, if it was opened before."""
        path = self.path / f"group-{epoch}.key"
        return GroupKey(read_private(path), epoch) if path.exists() else None

    def keep_group_key(self, key: GroupKey) -> None:
        """Store the group key of its epoch."""
        write_private(self.path / f"group-{key.epoch}.key", key.secret_bytes())

    def he_secret(self, digest: bytes) -> bytes:
        """The secret key that belongs to an HE public key; empty if it wasn't opened yet."""
        path = self.path / f"he-{digest.hex()}.key"
        return read_private(path) if path.exists() else b""

    def keep_he_secret(self, digest: bytes, secret: bytes) -> None:
        """Store the secret key of an HE public key."""
        write_private(self.path / f"he-{digest.hex()}.key", secret)

    def drop_he_secrets(self, keep: Iterable[bytes]) -> None:
        """Remove secret keys of HE keys that are no longer in the roster."""
        wanted = {f"he-{digest.hex()}.key" for digest in keep}
        for path in self.path.glob("he-*.key"):
            if path.name not in wanted:
                remove_private(path)

    # Facts

    def fact(self, name: str, default: bytes = b"") -> bytes:
        """A stored value."""
        with self._mutex:
            row = self._db.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
        return default if row is None else bytes(row[0])

    def number(self, name: str) -> int:
        """A stored counter; 0 if there is none."""
        return int.from_bytes(self.fact(name), "little")

    def keep(self, **facts: bytes | int) -> None:
        """Store values, all or none."""
        with self.transaction():
            for name, value in facts.items():
                data = value.to_bytes(8, "little") if isinstance(value, int) else value
                self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, data))

    def keep_roster(self, version: int, signed: bytes) -> None:
        """Store a roster that was verified: the one in force from now on."""
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO roster VALUES (?, ?)", (version, signed))
            self.keep(roster=signed)

    def rosters(self) -> list[bytes]:
        """Every roster that was in force here, oldest first: receipts name members that left since."""
        with self._mutex:
            rows = self._db.execute("SELECT signed FROM roster ORDER BY version").fetchall()
        return [bytes(row[0]) for row in rows]

    def plan_version(self, name: str) -> int:
        """The newest version seen of a plan of this name; 0 for a new one."""
        with self._mutex:
            row = self._db.execute("SELECT version FROM plan WHERE name = ?", (name,)).fetchone()
        return 0 if row is None else int(row[0])

    def keep_plan_version(self, name: str, version: int) -> None:
        """Remember the version of a plan."""
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO plan VALUES (?, ?)", (name, version))

    # The running round

    def round(self) -> StoredRound | None:
        """The round that the member is in, if any."""
        with self._mutex:
            row = self._db.execute(
                "SELECT number, header, roster, plan, snapshot, upload, upload_digest, h1, confirmed"
                " FROM round"
            ).fetchone()
        if row is None:
            return None
        record = StoredRound(*row[:8])
        record.confirmed = bool(row[8])
        return record

    def enter_round(self, record: StoredRound, h0: bytes) -> None:
        """A new round begins: its number and h0 become the counter below which nothing is answered."""
        with self.transaction():
            before = self.round()
            if before is not None:
                self.leave_round(before.number)
            self._put_round(record)
            self.keep(last_round=record.number, last_h0=h0)

    def keep_round(self, record: StoredRound, step: str | None = None, reply: bytes = b"") -> None:
        """Make the round's progress durable; with `step`, also the exact bytes of its reply."""
        with self.transaction():
            self._put_round(record)
            if step is not None:
                self._db.execute("INSERT INTO reply VALUES (?, ?, ?)", (record.number, step, reply))

    def reply(self, number: int, step: str) -> bytes | None:
        """The exact bytes that were made for a step, if any."""
        with self._mutex:
            row = self._db.execute(
                "SELECT reply FROM reply WHERE number = ? AND step = ?", (number, step)
            ).fetchone()
        return None if row is None else bytes(row[0])

    def leave_round(self, number: int) -> None:
        """Forget a round: its secrets, replies and spooled upload."""
        with self.transaction():
            self._db.execute("DELETE FROM round WHERE number = ?", (number,))
            self._db.execute("DELETE FROM reply WHERE number = ?", (number,))
        remove_private(self.spool(number))

    def _put_round(self, record: StoredRound) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO round VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.number,
                record.header,
                record.roster,
                record.plan,
                record.snapshot,
                record.upload,
                record.upload_digest,
                record.h1,
                int(record.confirmed),
            ),
        )

    def spool(self, number: int) -> Path:
        """Where a round's upload lies, protected already."""
        return self.path / f"spool-{number}.bin"

    # Receipts and states

    def keep_receipt(self, receipt: StoredReceipt) -> None:
        """Store the receipt of a round."""
        with self.transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO receipt VALUES (?, ?, ?, ?, ?)",
                (
                    receipt.number,
                    receipt.body,
                    json.dumps(receipt.metrics),
                    receipt.sum_digest,
                    receipt.max_error,
                ),
            )

    def receipts(self) -> list[StoredReceipt]:
        """All receipts in the order of their rounds."""
        with self._mutex:
            rows = self._db.execute(
                "SELECT number, body, metrics, sum, max_error FROM receipt ORDER BY number"
            ).fetchall()
        return [StoredReceipt(row[0], row[1], json.loads(row[2]), row[3], row[4]) for row in rows]

    def state_mark(self, name: str) -> StateMark | None:
        """Which state is the "current" or the "pending" one."""
        data = self.fact(name)
        return decode_message(data, StateMark, f"the {name} state's mark") if data else None

    def keep_state(self, name: str, mark: StateMark, pieces: Iterable[bytes | memoryview]) -> None:
        """Write a training state and make it the "current" or the "pending" one."""
        # One at a time: another thread may adopt this very state, and both marks say what is dropped.
        with self._mutex:
            write_private(self.path / mark.file_name, pieces)
            self.keep(**{name: encode_message(mark)})
            self._drop_states()

    def read_state(self, mark: StateMark) -> bytearray:
        """The bytes of a stored training state."""
        return bytearray(read_private(self.path / mark.file_name))

    def adopt_pending(self) -> None:
        """The pending state becomes the current one."""
        with self._mutex:
            self.keep(current=self.fact("pending"), pending=b"")
            self._drop_states()

    def drop_pending(self) -> None:
        """Forget the pending state and the receipt of its round: the round was aborted after all."""
        with self._mutex:
            mark = self.state_mark("pending")
            if mark is not None:
                with self.transaction():
                    self._db.execute("DELETE FROM receipt WHERE number = ?", (mark.round,))
                    self.keep(pending=b"")
                self._drop_states()

    def _drop_states(self) -> None:
        marks = (self.state_mark("current"), self.state_mark("pending"))
        wanted = {mark.file_name for mark in marks if mark is not None}
        for path in self.path.glob("state-*.bin"):
            if path.name not in wanted:
                remove_private(path)

    # Local tensors

    def keep_local(self, tensors: dict[str, NDArray[Any]]) -> None:
        """Store the tensors that aren't shared, for the next start."""
        buffer = io.BytesIO()
        # By position: a tensor's name may hold what a file name in the archive may not.
        np.savez(buffer, *tensors.values())
        names = msgspec.json.encode(list(tensors))
        pieces = (len(names).to_bytes(8, "little"), names, buffer.getbuffer())
        write_private(self.path / "local.bin", pieces)

    def local(self) -> dict[str, NDArray[Any]]:
        """The tensors that `keep_local` stored; empty if there are none."""
        path = self.path / "local.bin"
        if not path.exists():
            return {}
        data = read_private(path)
        length = int.from_bytes(data[:8], "little")
        names = msgspec.json.decode(data[8 : 8 + length], type=list[str])
        with np.load(io.BytesIO(data[8 + length :])) as stored:
            return {name: stored[f"arr_{index}"] for index, name in enumerate(names)}

    # Database

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; may be nested."""
        with self._mutex:
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                raise
            self._db.commit()

    def _open_database(self, read_only: bool) -> sqlite3.Connection:
        path = self.path / "member.db"
        if read_only:
            read_private(path)
            return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, check_same_thread=False)
        if not path.exists():
            path.touch(mode=0o600)
        read_private(path)
        database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        # DELETE journal with secure_delete: what a round forgets is overwritten, not kept in a log.
        database.execute("PRAGMA secure_delete = ON")
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("PRAGMA synchronous = FULL")
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == 0:
            database.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {_VERSION}; COMMIT;")
        elif version != _VERSION:
            database.close()
            raise FolderError(
                f"{path} was written by another version of blindsum ({version}); update blindsum"
            )
        return database


def transport_key() -> bytes:
    """A fresh ECDSA P-256 key for TLS, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_request(key_pem: bytes, member: str) -> bytes:
    """A signing request (DER) for a TLS key."""
    key = serialization.load_pem_private_key(key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, member)])
    request = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)
