"""Which member calls: the name in its transport certificate, checked at each call."""

import datetime
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blindsum.aggregator.peer_identity import CertifiedName
from blindsum.crypto.errors import RefusalReason, Refused
from cryptography import x509

_CACHED = 4096


@dataclass(frozen=True)
class CallingMember:
    """The member that calls, of the federation it belongs to."""

    federation: bytes
    member: str

    def __str__(self) -> str:
        return f"{self.federation.hex()}/{self.member}"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class MemberCheck:
    """Turns a call's TLS context into the member that calls.

    TLS has checked the certificate's chain when the connection was made; whether it has expired since, and
    whether the operator serves the member, is checked at each call. `served` are federations in hexadecimal;
    all if empty.
    """

    def __init__(
        self,
        refused: frozenset[str],
        served: frozenset[str] = frozenset(),
        now: Callable[[], datetime.datetime] = _now,
    ) -> None:
        self._refused = refused
        self._served = served
        self._now = now
        self._expiry: OrderedDict[bytes, datetime.datetime] = OrderedDict()

    def __call__(self, context: Any) -> CallingMember:
        """The caller. Raises `Refused` (unknown_member, expired)."""
        named = CertifiedName.of(context)
        if self._now() >= self._not_after(named.pem):
            raise Refused(RefusalReason.EXPIRED, "the client certificate has expired; renew it")
        caller = CallingMember(named.federation, named.member)
        if str(caller) in self._refused or caller.member in self._refused:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "the operator refuses this member")
        if self._served and caller.federation.hex() not in self._served:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, "this service isn't for the member's federation")
        return caller

    def _not_after(self, pem: bytes) -> datetime.datetime:
        found = self._expiry.get(pem)
        if found is None:
            try:
                found = x509.load_pem_x509_certificate(pem).not_valid_after_utc
            except ValueError:
                raise Refused(RefusalReason.UNKNOWN_MEMBER, "the client certificate can't be read") from None
            self._expiry[pem] = found
            if len(self._expiry) > _CACHED:
                self._expiry.popitem(last=False)
        return found
