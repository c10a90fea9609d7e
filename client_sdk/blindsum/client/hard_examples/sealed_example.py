"""An example as it travels: signed by its sender, padded, sealed to the training party's key.

Only a `SealedExample` reaches the wire. HPKE proves no sender, so the signature is inside: the receiver knows
whom the example is from, and the aggregator can't put one in. Padding to whole blocks hides the image's size.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Annotated, Final, Self

import msgspec
import numpy as np
from blindsum.crypto.canonical import Document, Message, decode_document, decode_message, encode_message
from blindsum.crypto.errors import BlindsumError, RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, labelled, labelled_hash, system_random
from blindsum.crypto.primitives.sealing import HpkeKey, seal_to
from blindsum.crypto.primitives.signing import SIGNATURE_BYTES, SigningKey, verify
from blindsum.crypto.trust.documents import Count, Digest, MemberId, UnixTime
from blindsum.crypto.trust.roster import Roster
from numpy.typing import ArrayLike, NDArray

MAX_PIXELS: Final = 100_000
BLOCK: Final = 4096
"""Plaintexts are padded to a multiple of so many bytes."""

Pixels = NDArray[np.float32]
Text = Annotated[str, msgspec.Meta(max_length=200)]
Side = Annotated[int, msgspec.Meta(ge=1, le=4096)]


class ConsentMissing(BlindsumError):
    """An example without a consent that covers it; nothing was sent."""


class Consent(Document, frozen=True, kw_only=True):
    """Whose word allows that this one example leaves the site.

    `content` is the example's digest, `recipient` who may get it, `purpose` what for. `reference` points into
    the site's own records (a form's number), so that no name travels. Good until `until`, in seconds since
    1970.
    """

    content: Digest
    recipient: MemberId
    purpose: Text
    reference: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    given: UnixTime
    until: UnixTime

    def require(self, content: bytes, recipient: str, purpose: str, now: float) -> None:
        """Raises `ConsentMissing` unless it covers exactly this."""
        checks = (
            (self.content == content, "is for another example"),
            (self.recipient == recipient, f"is for {self.recipient}, not {recipient}"),
            (self.purpose == purpose, "is for another purpose"),
            (self.given <= now < self.until, "isn't in force at this time"),
        )
        for holds, text in checks:
            if not holds:
                raise ConsentMissing(
                    f"the consent {text}; ask for one that covers this, or refuse the example"
                )


class Example(Message, frozen=True):
    """An image with its label: `pixels` is float32, little-endian, row by row, values in [0, 1]."""

    shape: tuple[Side, Side]
    pixels: bytes
    label: Annotated[int, msgspec.Meta(ge=0, le=65535)]
    tags: dict[str, Text]

    @classmethod
    def of(cls, pixels: ArrayLike, label: int, tags: dict[str, str] | None = None) -> Self:
        """From an array (rows, columns). Raises `ValueError` for another shape, too many pixels, or values
        outside [0, 1].
        """
        values = np.ascontiguousarray(pixels, dtype="<f4")
        if values.ndim != 2 or not 0 < values.size <= MAX_PIXELS:
            raise ValueError(f"an example is one image of at most {MAX_PIXELS} pixels, not {values.shape}")
        if not np.all(np.isfinite(values)) or values.min() < 0 or values.max() > 1:
            raise ValueError("pixels lie between 0 and 1; scale the image first")
        rows, columns = values.shape
        return cls((rows, columns), values.tobytes(), int(label), dict(tags or {}))

    def array(self) -> Pixels:
        """The pixels, float32 (rows, columns). Raises `Refused` (malformed, out_of_range)."""
        if len(self.pixels) != 4 * math.prod(self.shape):
            raise Refused(RefusalReason.MALFORMED, "an example has more or fewer pixels than its shape says")
        values = np.frombuffer(self.pixels, "<f4").reshape(self.shape)
        if not np.all(np.isfinite(values)) or values.min() < 0 or values.max() > 1:
            raise Refused(RefusalReason.OUT_OF_RANGE, "an example's pixels don't lie between 0 and 1")
        return values.astype(np.float32)

    def digest(self) -> bytes:
        """What consent and duplicate checks name it by: the image alone, not its label."""
        shape = b"".join(side.to_bytes(4, "little") for side in self.shape)
        return labelled_hash("example", shape, self.pixels)


class Letter(Message, frozen=True):
    """All that a receiver gets to know: the example, why it was sent, and the consent's exact bytes."""

    federation: Digest
    id: Digest
    sender: MemberId
    recipient: MemberId
    model: Text
    model_version: Count
    example: Example
    doubt: float
    novelty: float
    reason: Text
    consent: bytes
    sent: UnixTime

    def parsed_consent(self) -> Consent:
        """The consent that came with it. Raises `Refused` (malformed)."""
        return decode_document(self.consent, Consent, "a consent")


class _Signed(Message, frozen=True):
    letter: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
    padding: bytes


@dataclass(frozen=True)
class SealedExample:
    """Ciphertext for one recipient; made by `seal_example` only."""

    id: bytes
    recipient: str
    sealed: bytes

    @property
    def digest(self) -> bytes:
        """SHA-256 of the ciphertext."""
        return hashlib.sha256(self.sealed).digest()


def new_id(random: Random = system_random) -> bytes:
    """A fresh example id: 32 random bytes, so that it says nothing about the image."""
    return random(32)


def seal_example(letter: Letter, identity: SigningKey, roster: Roster) -> SealedExample:
    """The letter signed by `identity` and sealed to its recipient's key in the roster.

    Raises `DocumentError` for a recipient who isn't in the roster.
    """
    entry = roster.entry(letter.recipient)
    data = encode_message(letter)
    terms = _terms(letter.federation, letter.id, letter.sender, letter.recipient)
    signed = _Signed(data, identity.sign("forwarded example", *terms, data), b"")
    # Of 256 bytes and more the length's own prefix is one byte longer than that of an empty padding.
    short = 256 + -(len(encode_message(signed)) + 1 + 256) % BLOCK
    padded = _Signed(signed.letter, signed.signature, bytes(short))
    sealed = seal_to(entry.hpke, encode_message(padded), labelled("forwarded example", *terms))
    return SealedExample(letter.id, letter.recipient, sealed)


def open_example(
    sealed: bytes, *, identifier: bytes, sender: str, recipient: str, hpke: HpkeKey, roster: Roster
) -> Letter:
    """The letter in `sealed`, which the aggregator says is from `sender`.

    Raises `OpeningFailed`, `DocumentError` for a sender who isn't in the roster, `Refused` for a signature
    that isn't the sender's, another id or recipient, or a malformed example.
    """
    entry = roster.entry(sender)
    terms = _terms(roster.federation, identifier, sender, recipient)
    data = hpke.open(sealed, labelled("forwarded example", *terms))
    signed = decode_message(data, _Signed, "a forwarded example")
    if not verify(entry.identity, signed.signature, "forwarded example", *terms, signed.letter):
        raise Refused(RefusalReason.SIGNATURE, f"a forwarded example isn't signed by {sender}")
    if any(signed.padding):
        raise Refused(RefusalReason.MALFORMED, "a forwarded example's padding isn't empty")
    letter = decode_message(signed.letter, Letter, "a forwarded example")
    said = (letter.federation, letter.id, letter.sender, letter.recipient)
    if said != (roster.federation, identifier, sender, recipient):
        raise Refused(RefusalReason.MALFORMED, "a forwarded example says another sender, recipient or id")
    if not (math.isfinite(letter.doubt) and math.isfinite(letter.novelty)):
        raise Refused(RefusalReason.OUT_OF_RANGE, "a forwarded example's scores aren't numbers")
    letter.example.array()
    return letter


def _terms(federation: bytes, identifier: bytes, sender: str, recipient: str) -> tuple[bytes, ...]:
    return federation, identifier, sender.encode(), recipient.encode()
