"""Which member of which federation calls: from the certificate, checked against the roster at each call.

A TLS handshake may be days old, so it only says who the peer was then. Each call asks again: is the
certificate one that was issued, not expired, and does the roster in force still hold the same identity
key under that name.
"""

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol, Self

from blindsum.aggregator.clock import Clock
from blindsum.aggregator.store.records import CertificateRecord
from blindsum.aggregator.store.state import StateStore
from blindsum.aggregator.transport_authority import serial_bytes
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.trust.roster import Roster
from cryptography import x509

_URI = re.compile(r"blindsum:([0-9a-f]{64})/([a-z0-9][a-z0-9-]{0,62})")
_CACHED = 4096


@dataclass(frozen=True)
class PeerIdentity:
    """The member that calls, and the identity key its certificate was issued for."""

    federation: bytes
    member: str
    identity: bytes
    not_after_ms: int

    def __str__(self) -> str:
        return f"{self.member}@{self.federation.hex()[:8]}"


@dataclass(frozen=True)
class CertifiedName:
    """Whom a call's client certificate names. TLS checked the chain when the connection was made, no more."""

    federation: bytes
    member: str
    pem: bytes

    @classmethod
    def of(cls, context: Any) -> Self:
        """From a call's TLS context. Raises `Refused` (unknown_member)."""
        auth = context.auth_context()
        names = auth.get("x509_subject_alternative_name") or []
        pems = auth.get("x509_pem_cert") or []
        if len(names) != 1 or len(pems) != 1:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "the client certificate names no single member")
        match = _URI.fullmatch(names[0].decode("ascii", "replace"))
        if match is None:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "the client certificate isn't a member's")
        return cls(bytes.fromhex(match.group(1)), match.group(2), pems[0])


class RosterSource(Protocol):
    """Where the roster in force comes from."""

    def roster_in_force(self, federation: bytes) -> Roster | None:
        """The federation's roster, or None if there is no such federation or roster."""


class PeerCheck:
    """Turns a call's TLS context into a `PeerIdentity`, or refuses it."""

    def __init__(self, store: StateStore, rosters: RosterSource, clock: Clock) -> None:
        self._store = store
        self._rosters = rosters
        self._clock = clock
        self._issued: OrderedDict[bytes, CertificateRecord] = OrderedDict()

    def __call__(self, context: Any) -> PeerIdentity:
        """The caller. Raises `Refused` (unknown_member, expired)."""
        named = CertifiedName.of(context)
        issued = self._record(named.pem)
        if issued is None or (issued.federation, issued.member) != (named.federation, named.member):
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "this server didn't issue the client certificate")
        peer = PeerIdentity(named.federation, named.member, issued.identity, issued.not_after_ms)
        self.require_current(peer)
        return peer

    def require_current(self, peer: PeerIdentity) -> None:
        """Raises `Refused` unless the peer is still a member with an unexpired certificate."""
        if self._clock.now_ms() >= peer.not_after_ms:
            raise Refused(
                RefusalReason.EXPIRED, "the client certificate has expired; poll the join request again"
            )
        roster = self._rosters.roster_in_force(peer.federation)
        index = None if roster is None else roster.position.get(peer.member)
        if roster is None or index is None or roster.members[index].identity != peer.identity:
            raise Refused(
                RefusalReason.UNKNOWN_MEMBER, f"{peer.member} isn't in the roster in force; ask the owner"
            )

    def _record(self, pem: bytes) -> CertificateRecord | None:
        issued = self._issued.get(pem)
        if issued is not None:
            self._issued.move_to_end(pem)
            return issued
        try:
            serial = serial_bytes(x509.load_pem_x509_certificate(pem).serial_number)
        except (ValueError, OverflowError):
            return None
        issued = self._store.get(CertificateRecord, serial)
        if issued is not None:
            self._issued[pem] = issued
            if len(self._issued) > _CACHED:
                self._issued.popitem(last=False)
        return issued
