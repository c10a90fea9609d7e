"""Documents signed by the owner, carried as the exact bytes that were signed (protocols.md 1.2).

Verify first, parse after: `open_document` checks the owner's signature over the bytes, and only then
decodes them strictly.
"""

import hashlib
from typing import Annotated, TypeVar

import msgspec
from blindsum.crypto.canonical import (
    Document,
    Message,
    decode_document,
    decode_message,
    encode_document,
    encode_message,
)
from blindsum.crypto.errors import DocumentError
from blindsum.crypto.primitives.derivation import labelled_hash
from blindsum.crypto.primitives.signing import SigningKey, verify

D = TypeVar("D", bound=Document)

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
"""A SHA-256 digest, key id or other 32-byte value."""
PublicKey = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
MemberId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""A member's name in the roster: lower-case letters, digits and hyphens, at most 63."""
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]
UnixTime = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]
"""Whole seconds since 1970-01-01 UTC."""
PerMille = Annotated[int, msgspec.Meta(ge=0, le=999)]


class SignedDocument(Message, frozen=True):
    """A document's kind, its exact bytes, and the owner's signature over both."""

    kind: Annotated[str, msgspec.Meta(max_length=32)]
    body: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

    def to_bytes(self) -> bytes:
        """The canonical bytes that travel and are stored."""
        return encode_message(self)

    @property
    def digest(self) -> bytes:
        """SHA-256 that names this document in headers: over kind and body, not the signature."""
        return document_digest(self.kind, self.body)


def document_digest(kind: str, body: bytes) -> bytes:
    """The digest by which headers and other documents name a document of `kind`."""
    return labelled_hash("document", kind.encode(), body)


def sign_document(owner: SigningKey, kind: str, document: Document) -> SignedDocument:
    """The document as canonical bytes with the owner's signature."""
    body = encode_document(document)
    return SignedDocument(kind, body, owner.sign("document", kind.encode(), body))


def parse_signed(data: bytes) -> SignedDocument:
    """The envelope in `data`, its signature not yet checked. Raises `Refused` (malformed)."""
    return decode_message(data, SignedDocument, "a signed document")


def open_document(signed: SignedDocument, owner: bytes, kind: str, form: type[D]) -> D:
    """Check the owner's signature, then decode.

    Raises `DocumentError` for another kind or a bad signature, `Refused` for a malformed body.
    """
    if signed.kind != kind:
        raise DocumentError(f"expected a {kind}, got a {signed.kind!r}; ask the aggregator's operator")
    if not verify(owner, signed.signature, "document", kind.encode(), signed.body):
        raise DocumentError(
            f"this {kind} isn't signed by the owner whose key is pinned here; don't use it, and ask the owner"
        )
    return decode_document(signed.body, form, f"the {kind}")


def fingerprint(public: bytes) -> str:
    """What people compare when they pin a key: SHA-256 of it, in groups of eight hex digits."""
    text = hashlib.sha256(public).hexdigest()
    return " ".join(text[i : i + 8] for i in range(0, 64, 8))
