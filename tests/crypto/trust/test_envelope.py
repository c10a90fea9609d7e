"""Key envelopes: only the owner's, for this member, under this roster and epoch."""

import pytest
from blindsum.crypto.canonical import encode_message
from blindsum.crypto.errors import DocumentError, OpeningFailed, Refused
from blindsum.crypto.primitives.derivation import labelled
from blindsum.crypto.primitives.sealing import seal_to
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.envelope import (
    open_group_key,
    open_he_key,
    seal_group_key,
    seal_he_key,
)
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.roster import HeKey
from small_federation import FEDERATION, SmallFederation, replaced

FED = SmallFederation()
BFV = HeKey(scheme="bfv", parameters="p", bits=16, n_max=8, digest=bytes([9]) * 32)


def group_envelope(member="bob", owner=FED.owner):
    return seal_group_key(owner, FED.group_key, FED.roster, FED.roster_digest, member)


def open_group(data, member="bob", **changes):
    terms = {"owner": FED.owner.public, "roster": FED.roster, "roster_digest": FED.roster_digest} | changes
    return open_group_key(data, member=member, hpke=FED.hpke[member], **terms)


def test_every_member_opens_its_own():
    for member in FED.identities:
        key = open_group(group_envelope(member).to_bytes(), member)
        assert key.key_id == FED.group_key.key_id
        assert key.secret_bytes() == FED.group_key.secret_bytes()


def test_an_attackers_envelope_with_a_key_of_its_own():
    mallory = SigningKey.generate()
    own = GroupKey(bytes([6]) * 32, 1)
    roster = replaced(FED.roster, group_key=own.key_id)
    digest = FED.digest("roster", roster)
    for envelope in (
        group_envelope(owner=mallory),
        seal_group_key(mallory, own, roster, digest, "bob"),
        replaced(group_envelope(), sealed=seal_group_key(mallory, own, roster, digest, "bob").sealed),
        replaced(group_envelope(), signature=bytes(64)),
    ):
        with pytest.raises(DocumentError):
            open_group(envelope.to_bytes())


def test_another_members_rosters_epochs_federations_or_purposes():
    other = replaced(FED.roster, version=4)
    rotated = GroupKey(bytes([3]) * 32, 2)
    newer = replaced(FED.roster, version=4, epoch=2, group_key=rotated.key_id)
    foreign = replaced(FED.roster, federation=bytes(32))
    with_he = replaced(FED.roster, he_keys=(BFV,))
    cases = (
        (group_envelope("ann"), {}),
        (group_envelope(), {"roster": other, "roster_digest": FED.digest("roster", other)}),
        (group_envelope(), {"roster": newer, "roster_digest": FED.digest("roster", newer)}),
        (group_envelope(), {"roster": foreign}),
        (group_envelope(), {"owner": SigningKey.generate().public}),
        (seal_he_key(FED.owner, "bfv", bytes(32), with_he, FED.roster_digest, "bob"), {}),
    )
    for envelope, changes in cases:
        with pytest.raises(DocumentError):
            open_group(envelope.to_bytes(), **changes)


def test_an_envelope_that_the_owner_signed_around_a_foreign_ciphertext_does_not_open():
    envelope = group_envelope()
    terms = (
        FEDERATION,
        (1).to_bytes(8, "little"),
        b"bob",
        FED.roster_digest,
        b"group key",
        FED.group_key.key_id,
        FED.hpke["bob"].public,
    )
    for info, secret, error in (
        (b"another info", FED.group_key.secret_bytes(), OpeningFailed),
        (labelled("key envelope", *terms), bytes(31), OpeningFailed),
        (labelled("key envelope", *terms), bytes(32), DocumentError),
    ):
        sealed = seal_to(FED.hpke["bob"].public, secret, info)
        signature = FED.owner.sign("key envelope", *terms, sealed)
        with pytest.raises(error):
            open_group(replaced(envelope, sealed=sealed, signature=signature).to_bytes())


def test_malformed_bytes():
    data = group_envelope().to_bytes()
    for bad in (b"", data[:-1], data + b"\0", encode_message([1, 2, 3])):
        with pytest.raises(Refused):
            open_group(bad)


def test_a_member_whose_hpke_key_the_roster_does_not_have():
    with pytest.raises(DocumentError, match="HPKE"):
        open_group_key(
            group_envelope().to_bytes(),
            owner=FED.owner.public,
            roster=FED.roster,
            roster_digest=FED.roster_digest,
            member="bob",
            hpke=FED.hpke["ann"],
        )


def test_the_owner_cannot_seal_a_key_that_the_roster_does_not_name():
    with pytest.raises(DocumentError):
        seal_group_key(FED.owner, GroupKey(bytes(32), 1), FED.roster, FED.roster_digest, "bob")
    with pytest.raises(DocumentError):
        seal_he_key(FED.owner, "bfv", bytes(32), FED.roster, FED.roster_digest, "bob")


def test_he_keys_travel_the_same_way():
    roster = replaced(FED.roster, he_keys=(BFV,))
    digest = FED.digest("roster", roster)
    secret = bytes(range(256)) * 400
    envelope = seal_he_key(FED.owner, "bfv", secret, roster, digest, "ann")
    terms = {"owner": FED.owner.public, "roster": roster, "roster_digest": digest}
    opened = open_he_key(envelope.to_bytes(), "bfv", member="ann", hpke=FED.hpke["ann"], **terms)
    assert opened == secret
    with pytest.raises(DocumentError):
        open_he_key(envelope.to_bytes(), "bfv", member="bob", hpke=FED.hpke["bob"], **terms)
    with pytest.raises(DocumentError):
        open_he_key(envelope.to_bytes(), "ckks", member="ann", hpke=FED.hpke["ann"], **terms)
