"""Key envelopes: the group key and HE secret keys, from the owner to each member (protocols.md 1.6).

HPKE proves no sender, so the owner signs every envelope. It is bound to federation, epoch, member, the
roster's digest and the member's HPKE key, both by the signature and by HPKE's info.
"""

from typing import Annotated

import msgspec
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.errors import DocumentError, OpeningFailed
from blindsum.crypto.primitives.derivation import labelled, same
from blindsum.crypto.primitives.sealing import HpkeKey, seal_to
from blindsum.crypto.primitives.signing import SigningKey, verify
from blindsum.crypto.trust.documents import Count, Digest, MemberId
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.roster import Roster, RosterEntry

GROUP_KEY = "group key"


class KeyEnvelope(Message, frozen=True):
    """One secret, sealed to one member and signed by the owner.

    `purpose` is "group key", or the name of the HE scheme whose secret key this is; `key_id` names the
    key: the group key's id, or the digest of the HE public key.
    """

    federation: Digest
    epoch: Count
    member: MemberId
    roster: Digest
    purpose: Annotated[str, msgspec.Meta(min_length=1, max_length=32)]
    key_id: Digest
    sealed: bytes
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return encode_message(self)


def seal_group_key(
    owner: SigningKey, key: GroupKey, roster: Roster, roster_digest: bytes, member: str
) -> KeyEnvelope:
    """The epoch's group key for a member of the roster, which must name this key."""
    if key.key_id != roster.group_key or key.epoch != roster.epoch:
        raise DocumentError("the roster names another group key; seal the one of its epoch")
    return _seal(owner, roster, roster_digest, member, GROUP_KEY, key.key_id, key.secret_bytes())


def seal_he_key(
    owner: SigningKey, scheme: str, secret: bytes, roster: Roster, roster_digest: bytes, member: str
) -> KeyEnvelope:
    """An HE secret key for a member of the roster, which must name the scheme's public key."""
    public = roster.he_key(scheme)
    if public is None:
        raise DocumentError(f"the roster names no {scheme} key; sign one that does first")
    return _seal(owner, roster, roster_digest, member, scheme, public.digest, secret)


def open_group_key(
    data: bytes, *, owner: bytes, roster: Roster, roster_digest: bytes, member: str, hpke: HpkeKey
) -> GroupKey:
    """The group key in an envelope.

    Raises `DocumentError` for an envelope that isn't the owner's, is another roster's, member's or
    epoch's, or holds another key than the roster names; `OpeningFailed` when it doesn't open; `Refused`
    when malformed.
    """
    secret, envelope = _open(data, owner, roster, roster_digest, member, hpke, GROUP_KEY, roster.group_key)
    if len(secret) != 32:
        raise OpeningFailed("the envelope's group key has the wrong length; ask the owner for a new one")
    key = GroupKey(secret, envelope.epoch)
    if not same(key.key_id, roster.group_key):
        raise DocumentError("the envelope holds another group key than the roster names; ask the owner")
    return key


def open_he_key(
    data: bytes,
    scheme: str,
    *,
    owner: bytes,
    roster: Roster,
    roster_digest: bytes,
    member: str,
    hpke: HpkeKey,
) -> bytes:
    """The HE secret key in an envelope; raises like `open_group_key`. The scheme checks that it fits."""
    public = roster.he_key(scheme)
    if public is None:
        raise DocumentError(f"the roster names no {scheme} key; ask the owner")
    secret, _ = _open(data, owner, roster, roster_digest, member, hpke, scheme, public.digest)
    return secret


def _seal(
    owner: SigningKey,
    roster: Roster,
    roster_digest: bytes,
    member: str,
    purpose: str,
    key_id: bytes,
    secret: bytes,
) -> KeyEnvelope:
    entry = roster.entry(member)
    terms = _terms(roster, roster_digest, entry, purpose, key_id)
    sealed = seal_to(entry.hpke, secret, labelled("key envelope", *terms))
    signature = owner.sign("key envelope", *terms, sealed)
    return KeyEnvelope(
        roster.federation, roster.epoch, member, roster_digest, purpose, key_id, sealed, signature
    )


def _open(
    data: bytes,
    owner: bytes,
    roster: Roster,
    roster_digest: bytes,
    member: str,
    hpke: HpkeKey,
    purpose: str,
    key_id: bytes,
) -> tuple[bytes, KeyEnvelope]:
    envelope = decode_message(data, KeyEnvelope, "a key envelope")
    entry = roster.entry(member)
    if entry.hpke != hpke.public:
        raise DocumentError("the roster has another HPKE key for this member; ask the owner to admit it anew")
    checks = (
        (envelope.federation == roster.federation, "another federation's"),
        (envelope.member == member, "for another member"),
        (envelope.purpose == purpose, f"for another purpose than {purpose}"),
        (envelope.epoch == roster.epoch, f"of epoch {envelope.epoch}, not {roster.epoch}"),
        (envelope.roster == roster_digest, "another roster's"),
        (envelope.key_id == key_id, "for another key than the roster names"),
    )
    for holds, text in checks:
        if not holds:
            raise DocumentError(f"this key envelope is {text}; ask the aggregator for the current one")
    terms = _terms(roster, roster_digest, entry, purpose, key_id)
    if not verify(owner, envelope.signature, "key envelope", *terms, envelope.sealed):
        raise DocumentError("this key envelope isn't signed by the owner; don't use it, and tell the owner")
    return hpke.open(envelope.sealed, labelled("key envelope", *terms)), envelope


def _terms(
    roster: Roster, roster_digest: bytes, entry: RosterEntry, purpose: str, key_id: bytes
) -> tuple[bytes, ...]:
    return (
        roster.federation,
        roster.epoch.to_bytes(8, "little"),
        entry.id.encode(),
        roster_digest,
        purpose.encode(),
        key_id,
        entry.hpke,
    )
