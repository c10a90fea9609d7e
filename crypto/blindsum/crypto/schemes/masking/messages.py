"""The step messages of masking: canonical MessagePack, strict sizes, signed parts named.

Lists of fixed-size records travel as one byte string, in ascending order of position, so that a
message of a thousand neighbours is decoded with a length check. `u32` is 4 bytes, little-endian.
"""

from typing import Annotated, TypeVar

import msgspec
from blindsum.crypto.canonical import Message, decode_message
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.primitives.derivation import labelled_hash
from blindsum.crypto.primitives.one_time_box import OVERHEAD
from blindsum.crypto.primitives.secret_sharing import SHARE_BYTES
from blindsum.crypto.trust.documents import Digest

M = TypeVar("M", bound=Message)

MAX_MEMBERS = 100_000
SALT_BYTES = 32
OPENED_BYTES = SHARE_BYTES + SALT_BYTES
"""A share and its salt: 65 bytes."""
CONTENT_BYTES = 2 * OPENED_BYTES
"""What a box holds: share and salt of the self seed, then of the mask root."""
BOX_BYTES = CONTENT_BYTES + OVERHEAD
COMMITMENTS_BYTES = 64
"""Two SHA-256 commitments for a neighbour: to its share of the self seed, then of the mask root."""
SIGNATURE_BYTES = 64
KEYS_BYTES = 96
ENTRY_BYTES = KEYS_BYTES + SIGNATURE_BYTES
"""An entry of U1: channel key (32), mask key (32), self commitment (32), the member's signature (64)."""

SELF, ROOT = b"self", b"root"
"""The two kinds of shared secret: self seed b, mask root rho."""

Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]
Bitmap = Annotated[bytes, msgspec.Meta(min_length=1, max_length=-(-MAX_MEMBERS // 8))]


class AdvertiseRequest(Message, frozen=True, tag=1):
    """Asks a member into the round of h0."""

    h0: Digest


class Advertisement(Message, frozen=True, tag=2):
    """A member's entry of U1, signed over ("masking advertise", h0, member, keys)."""

    entry: Annotated[bytes, msgspec.Meta(min_length=ENTRY_BYTES, max_length=ENTRY_BYTES)]


class ShareRequest(Message, frozen=True, tag=3):
    """U1, the same for everyone, and the full entries of this member's neighbours.

    `members`: roster indices, u32 each, ascending; `leaves`: their leaf hashes, 32 bytes each.
    """

    members: Annotated[bytes, msgspec.Meta(min_length=4, max_length=4 * MAX_MEMBERS)]
    leaves: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32 * MAX_MEMBERS)]
    entries: Annotated[bytes, msgspec.Meta(max_length=ENTRY_BYTES * MAX_MEMBERS)]


class Shares(Message, frozen=True, tag=4):
    """For each neighbour two commitments and a box; signed over ("masking share", h1, member, both)."""

    commitments: Annotated[bytes, msgspec.Meta(max_length=COMMITMENTS_BYTES * MAX_MEMBERS)]
    boxes: Annotated[bytes, msgspec.Meta(max_length=BOX_BYTES * MAX_MEMBERS)]
    signature: Signature


class UploadRequest(Message, frozen=True, tag=5):
    """Which neighbours shared (bitmap over the member's neighbours), and what they shared with it."""

    live: Bitmap
    commitments: Annotated[bytes, msgspec.Meta(max_length=COMMITMENTS_BYTES * MAX_MEMBERS)]
    boxes: Annotated[bytes, msgspec.Meta(max_length=BOX_BYTES * MAX_MEMBERS)]


class SealedUpload(Message, frozen=True, tag=6):
    """Promises the bulk stream of this digest; signed over ("masking upload", h1, member, digest)."""

    digest: Digest
    signature: Signature


class BoxComplaint(Message, frozen=True, tag=7):
    """The box from position `accused` is bad; signed over ("masking complaint", h1, member, accused)."""

    accused: Annotated[int, msgspec.Meta(ge=0, lt=MAX_MEMBERS)]
    signature: Signature


class ConfirmRequest(Message, frozen=True, tag=8):
    """U2 and U3 as bitmaps over U1."""

    sharers: Bitmap
    survivors: Bitmap


class Confirmation(Message, frozen=True, tag=9):
    """The signature over ("masking confirm", h1, root(U3))."""

    signature: Signature


class RevealRequest(Message, frozen=True, tag=10):
    """Confirmations of at least t neighbours: a bitmap over the member's neighbours, and signatures."""

    signers: Bitmap
    signatures: Annotated[bytes, msgspec.Meta(max_length=SIGNATURE_BYTES * MAX_MEMBERS)]


class Revealed(Message, frozen=True, tag=11):
    """A share and salt for each live neighbour; signed over ("masking reveal", h1, member, root, shares)."""

    shares: Annotated[bytes, msgspec.Meta(max_length=OPENED_BYTES * MAX_MEMBERS)]
    signature: Signature


class Result(Message, frozen=True, tag=12):
    """U2, U3, and confirmations of t members (bitmap over U1), for whoever opens the sum."""

    sharers: Bitmap
    survivors: Bitmap
    signers: Bitmap
    signatures: Annotated[bytes, msgspec.Meta(max_length=SIGNATURE_BYTES * MAX_MEMBERS)]


Request = AdvertiseRequest | ShareRequest | UploadRequest | ConfirmRequest | RevealRequest
Reply = Advertisement | Shares | SealedUpload | BoxComplaint | Confirmation | Revealed


def decode_request(data: bytes, kind: type[M], what: str) -> M:
    """The request of `kind` in `data`. Raises `Refused`: malformed, or another step's."""
    value: Message = decode_message(data, Request, what)  # type: ignore[arg-type]
    if not isinstance(value, kind):
        raise Refused(RefusalReason.WRONG_STEP, f"{what} is another step's message")
    return value


def decode_reply(data: bytes, kinds: tuple[type[Message], ...], what: str) -> Message:
    """The reply of one of `kinds` in `data`. Raises `Refused`: malformed, or another step's."""
    value: Message = decode_message(data, Reply, what)  # type: ignore[arg-type]
    if not isinstance(value, kinds):
        raise Refused(RefusalReason.WRONG_STEP, f"{what} is another step's message")
    return value


def records(data: bytes, size: int) -> list[bytes]:
    """The fixed-size records of a byte string."""
    return [data[start : start + size] for start in range(0, len(data), size)]


def u32(value: int) -> bytes:
    """A position or roster index as it is hashed and sent."""
    return value.to_bytes(4, "little")


def leaf_hash(h0: bytes, index: int, entry: bytes) -> bytes:
    """The leaf of one member of U1: its roster index and its signed entry."""
    return labelled_hash("masking leaf", h0, u32(index), entry)


def self_commitment(h0: bytes, seed: bytes) -> bytes:
    """What a member advertises of its self seed b."""
    return labelled_hash("masking self", h0, seed)


def share_commitment(h1: bytes, dealer: int, receiver: int, kind: bytes, opened: bytes) -> bytes:
    """The commitment to one share: `opened` is the share followed by its salt."""
    return labelled_hash("masking share commitment", h1, u32(dealer), u32(receiver), kind, opened)


def confirm_root(h1: bytes, sharers: bytes, survivors: bytes) -> bytes:
    """root(U3), from the bitmaps of U2 and U3."""
    return labelled_hash("masking survivors", h1, sharers, survivors)
