"""How a member comes in: federation, invitation, request (protocols.md 1.1).

The owner hands an invitation to a person; the applicant's device makes its keys and sends a request
through the aggregator; the owner admits it into the next roster. The aggregator only relays: it can't
admit, and it can't put its own keys in place of the applicant's, because the request is signed by the
applicant's key and carries a MAC under the invitation's token, which the aggregator never sees.
"""

from typing import Annotated

import msgspec
from blindsum.crypto.canonical import Document, encode_document
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.primitives.derivation import labelled_hash, mac, same
from blindsum.crypto.primitives.signing import SigningKey, require_signature
from blindsum.crypto.trust.documents import Digest, MemberId, PublicKey, UnixTime

FEDERATION_KIND = "federation"
REFUSAL_KIND = "refusal"


class Federation(Document, frozen=True, kw_only=True):
    """What makes a federation itself: its name, its owner's key, and when it was founded."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    owner: PublicKey
    founded: UnixTime
    nonce: Digest

    @property
    def id(self) -> bytes:
        """The federation's id: a labelled hash of this document, 32 bytes."""
        return labelled_hash("federation id", encode_document(self))


class Invitation(Document, frozen=True, kw_only=True):
    """What the owner hands over, in a file with mode 0600: the token in it admits one member.

    `ca` is the PEM certificate of the transport authority of the aggregator's operator; it secures the
    connection and means nothing for trust.
    """

    federation: Digest
    federation_name: str
    owner: PublicKey
    enrolment_address: str
    member_address: str
    ca: str
    token: Digest
    member: MemberId
    valid_until: UnixTime

    def token_id(self) -> bytes:
        """Names the token without giving it away."""
        return token_id(self.token)

    def __repr__(self) -> str:
        return f"<Invitation of {self.member} to {self.federation_name}>"


class JoinBody(Document, frozen=True, kw_only=True):
    """An applicant's request: the name it was invited under, and the public keys its device made."""

    federation: Digest
    id: MemberId
    organisation: Annotated[str, msgspec.Meta(max_length=200)]
    identity: PublicKey
    hpke: Annotated[bytes, msgspec.Meta(min_length=1216, max_length=1216)]
    created: UnixTime


class Refusal(Document, frozen=True, kw_only=True):
    """The owner's signed answer to a request that it doesn't admit."""

    federation: Digest
    request_id: Digest
    reason: Annotated[str, msgspec.Meta(max_length=500)]


def token_id(token: bytes) -> bytes:
    """SHA-256 of the token, labelled."""
    return labelled_hash("invitation token", token)


def request_id(body: bytes) -> bytes:
    """Names a join request by its exact bytes."""
    return labelled_hash("join request", body)


def sign_request(identity: SigningKey, token: bytes, body: bytes) -> tuple[bytes, bytes]:
    """The applicant's signature and the token's MAC over the exact bytes of a `JoinBody`."""
    return identity.sign("join request", body), mac(token, "join request", body)


def check_request_signature(identity: bytes, signature: bytes, body: bytes) -> None:
    """What the aggregator can check. Raises `Refused` (signature)."""
    require_signature(identity, signature, "the join request", "join request", body)


def check_token(token: bytes, token_mac: bytes, body: bytes) -> None:
    """What only the owner can check: that the request was made by who got the invitation.

    Raises `Refused` (signature).
    """
    if not same(mac(token, "join request", body), token_mac):
        raise Refused(
            RefusalReason.SIGNATURE, "the request doesn't prove that it holds the invitation's token"
        )


def prove_owner(owner: SigningKey, verb: str, federation: bytes, time: int, *fields: bytes) -> bytes:
    """The owner's signature that goes with a query to the aggregator (`OwnerProof`)."""
    return owner.sign("owner query", verb.encode(), federation, time.to_bytes(8, "little"), *fields)


def check_owner_proof(
    owner: bytes, signature: bytes, verb: str, federation: bytes, time: int, now: int, *fields: bytes
) -> None:
    """Raises `Refused` unless the owner signed this query within the last or next 300 seconds."""
    if abs(now - time) > 300:
        raise Refused(RefusalReason.EXPIRED, "the owner's query is older than 300 s; check both clocks")
    require_signature(
        owner,
        signature,
        "the owner's query",
        "owner query",
        verb.encode(),
        federation,
        time.to_bytes(8, "little"),
        *fields,
    )
