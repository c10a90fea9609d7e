"""Receipts: what a member can show about a round (protocols.md 1.10).

A receipt is the same at every survivor of a round; each survivor signs it with its identity key.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from blindsum.crypto.canonical import (
    Document,
    Message,
    decode_document,
    decode_message,
    encode_document,
    encode_message,
)
from blindsum.crypto.encoding.vector import OpenedSum
from blindsum.crypto.errors import DocumentError
from blindsum.crypto.primitives.derivation import labelled_hash, mac, same
from blindsum.crypto.primitives.signing import SigningKey, require_signature
from blindsum.crypto.trust.documents import Count, Digest, MemberId, PerMille
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.policy import SchemeName
from blindsum.crypto.trust.roster import Roster
from blindsum.crypto.trust.transcript import extend, genesis


class Receipt(Document, frozen=True, kw_only=True):
    """One finished round.

    `h0` names the header, `h1` the round as its members agreed on it. `survivors` is the digest of the
    survivor set, `survivor_count` its size, `honest` how many of n_min are left when the share gamma
    colludes. `sum` is the HMAC of the opened sum, `trust` who would have to collude to learn an update,
    `previous` the digest of the transcript before this round.
    """

    federation: Digest
    plan_name: str
    round: Count
    h0: Digest
    h1: Digest
    scheme: SchemeName
    parameters: str
    gamma: PerMille
    delta: PerMille
    security: Literal[40, 80]
    n_min: Count
    honest: Count
    survivors: Digest
    survivor_count: Count
    dimension: Count
    sum: Digest
    sum_check: Literal["passed"]
    trust: str
    previous: Digest

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return encode_document(self)

    def transcript(self) -> bytes:
        """The digest of the transcript after this round."""
        return extend(self.previous, self.to_bytes())


class SignedReceipt(Message, frozen=True):
    """A receipt's exact bytes and one survivor's signature over them."""

    member: MemberId
    body: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

    def to_bytes(self) -> bytes:
        """The canonical bytes that are stored and shown."""
        return encode_message(self)


def survivors_digest(h1: bytes, survivors: Sequence[str]) -> bytes:
    """The digest of a survivor set, in the order given: roster order."""
    return labelled_hash("survivors", h1, *(member.encode() for member in survivors))


def make_receipt(
    bound: BoundHeader,
    h1: bytes,
    opened: OpenedSum,
    key: GroupKey,
    *,
    parameters: str,
    trust: str,
    previous: bytes,
) -> Receipt:
    """The receipt of a round whose sum was opened and checked.

    `parameters` is the HE parameter set's name, empty for masking; `trust` the scheme's trust line.
    """
    header = bound.header
    return Receipt(
        federation=header.federation,
        plan_name=header.plan_name,
        round=header.round,
        h0=bound.h0,
        h1=h1,
        scheme=header.scheme,
        parameters=parameters,
        gamma=header.gamma,
        delta=header.delta,
        security=header.security,
        n_min=header.n_min,
        honest=header.n_min - header.gamma * header.n_min // 1000,
        survivors=survivors_digest(h1, opened.survivors),
        survivor_count=len(opened.survivors),
        dimension=header.dimension,
        sum=sum_mac(key, h1, opened.digest),
        sum_check="passed",
        trust=trust,
        previous=previous,
    )


def sum_mac(key: GroupKey, h1: bytes, summed_digest: bytes) -> bytes:
    """What a receipt says of the sum: only a key holder that has the sum can compare it."""
    return mac(key.receipt_key(), "receipt sum", h1, summed_digest)


def sign_receipt(identity: SigningKey, member: str, receipt: Receipt) -> SignedReceipt:
    """The receipt with a survivor's signature."""
    body = receipt.to_bytes()
    return SignedReceipt(member, body, identity.sign("receipt", member.encode(), body))


def verify_receipt(data: bytes, roster: Roster) -> Receipt:
    """The receipt in a signed receipt's bytes, whose signer is in the roster.

    Raises `DocumentError` for a stranger or another federation, `Refused` for a bad signature or form.
    """
    signed = decode_message(data, SignedReceipt, "a receipt")
    identity = roster.entry(signed.member).identity
    require_signature(
        identity,
        signed.signature,
        f"{signed.member}'s receipt",
        "receipt",
        signed.member.encode(),
        signed.body,
    )
    receipt = decode_document(signed.body, Receipt, "a receipt")
    if receipt.federation != roster.federation:
        raise DocumentError("this receipt is another federation's; ask its owner")
    return receipt


def verify_sum(receipt: Receipt, key: GroupKey, summed_digest: bytes) -> bool:
    """Whether a sum, by its digest, is the one of the receipt."""
    return same(receipt.sum, sum_mac(key, receipt.h1, summed_digest))


def verify_chain(receipts: Sequence[Receipt]) -> bytes:
    """The transcript digest after these receipts, which must be a federation's whole history in order.

    Raises `DocumentError` naming the round at which the chain breaks.
    """
    if not receipts:
        raise DocumentError("there are no receipts to verify; give at least one")
    digest = genesis(receipts[0].federation)
    number = 0
    for receipt in receipts:
        if receipt.previous != digest or receipt.round <= number:
            raise DocumentError(
                f"the receipt of round {receipt.round} doesn't continue the one before: a round is missing, "
                "or histories differ. Compare transcript digests with another member"
            )
        digest, number = receipt.transcript(), receipt.round
    return digest
