"""The round header H and its hash h0, which everything in a round is bound to (protocols.md 1.3)."""

import hashlib
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
from blindsum.crypto.canonical import Document, decode_document, encode_document
from blindsum.crypto.primitives.derivation import labelled_hash
from blindsum.crypto.trust.documents import Count, Digest, PerMille, UnixTime
from blindsum.crypto.trust.policy import SchemeName

NO_KEY = hashlib.sha256(b"blindsum/v1/no key").digest()
"""Stands in `he_key` where a scheme has no HE key."""


class Header(Document, frozen=True, kw_only=True):
    """What a round is, said once and bound by everything.

    `state` is the keyed digest of the training state S_(r-1) that the round starts from; `state_round`
    is r - 1 as an index into the federation's states (aborted rounds make round numbers skip).
    `fields` is the whole length of the integer vector: coordinates, clip counts, weight, metrics, tags.
    """

    protocol: Literal[1] = 1
    federation: Digest
    round: Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
    plan_name: str
    scheme: SchemeName
    gamma: PerMille
    delta: PerMille
    security: Literal[40, 80]
    state: Digest
    state_round: Count
    plan: Digest
    roster: Digest
    policy: Digest
    group_key: Digest
    he_key: Digest
    dimension: Annotated[int, msgspec.Meta(ge=1)]
    layout: Digest
    bits: Annotated[int, msgspec.Meta(ge=2, le=32)]
    fields: Annotated[int, msgspec.Meta(ge=1)]
    n_min: Annotated[int, msgspec.Meta(ge=3)]
    n_max: Annotated[int, msgspec.Meta(ge=3)]
    deadline: UnixTime

    def to_bytes(self) -> bytes:
        """The canonical bytes H."""
        return encode_document(self)


@dataclass(frozen=True)
class BoundHeader:
    """A header together with its exact bytes and h0 = SHA-256 over them, labelled."""

    header: Header
    body: bytes
    h0: bytes

    @classmethod
    def parse(cls, body: bytes) -> "BoundHeader":
        """Decode strictly. Raises `Refused` (malformed)."""
        return cls(decode_document(body, Header, "the round header"), body, labelled_hash("header", body))

    @classmethod
    def of(cls, header: Header) -> "BoundHeader":
        """Bind a header that was just made."""
        body = header.to_bytes()
        return cls(header, body, labelled_hash("header", body))
