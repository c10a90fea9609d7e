"""Receipts and the transcript: the same at every member, signed, chained."""

import pytest
from blindsum.crypto.errors import DocumentError, Refused
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.receipt import (
    make_receipt,
    sign_receipt,
    survivors_digest,
    verify_chain,
    verify_receipt,
    verify_sum,
)
from blindsum.crypto.trust.transcript import extend, genesis
from small_federation import FEDERATION, MEMBERS, SmallFederation, replaced

FED = SmallFederation()


def receipt(number=12, previous=None, survivors=MEMBERS):
    return make_receipt(
        FED.header_with(round=number),
        bytes([4]) * 32,
        FED.opened(survivors),
        FED.group_key,
        parameters="",
        trust="two of them",
        previous=previous or genesis(FEDERATION),
    )


def signed(member="bob", document=None, identity=None):
    return sign_receipt(identity or FED.identities[member], member, document or receipt())


def test_every_survivor_makes_the_same_receipt_and_anyone_with_the_roster_verifies_it():
    documents = {verify_receipt(signed(member).to_bytes(), FED.roster) for member in MEMBERS}
    (one,) = documents
    assert one.survivor_count == 5
    assert (one.n_min, one.honest) == (3, 3)
    assert one.survivors == survivors_digest(bytes([4]) * 32, MEMBERS)


def test_who_has_the_sum_and_the_group_key_compares_it():
    one = receipt()
    assert verify_sum(one, FED.group_key, FED.opened().digest)
    assert not verify_sum(one, FED.group_key, FED.opened(MEMBERS[:4]).digest)
    assert not verify_sum(one, GroupKey(bytes(32), 1), FED.opened().digest)


def test_a_receipt_that_nobody_in_the_roster_signed():
    other = replaced(receipt(), survivor_count=6)
    good = signed()
    for data, error in (
        (signed(identity=SigningKey.generate()).to_bytes(), Refused),
        (replaced(good, body=other.to_bytes()).to_bytes(), Refused),
        (replaced(good, member="ann").to_bytes(), Refused),
        (replaced(good, member="mallory").to_bytes(), DocumentError),
        (good.to_bytes() + b"\0", Refused),
        (b"", Refused),
        (signed(document=replaced(receipt(), federation=bytes(32))).to_bytes(), DocumentError),
    ):
        with pytest.raises(error):
            verify_receipt(data, FED.roster)


class TestTranscript:
    def chain(self):
        receipts = []
        digest = genesis(FEDERATION)
        for number in (12, 13, 15):
            receipts.append(receipt(number, digest))
            digest = extend(digest, receipts[-1].to_bytes())
        return receipts, digest

    def test_a_whole_history_ends_in_one_digest(self):
        receipts, digest = self.chain()
        assert verify_chain(receipts) == digest == receipts[-1].transcript()

    def test_a_missing_swapped_repeated_or_changed_round_breaks_it(self):
        (one, two, three), _ = self.chain()
        for history in (
            [],
            [two, three],
            [one, three],
            [two, one, three],
            [one, one, two],
            [replaced(one, sum=bytes(32)), two],
            [one, replaced(two, round=12)],
        ):
            with pytest.raises(DocumentError):
                verify_chain(history)

    def test_two_histories_that_differ_in_one_survivor_set_differ_in_their_digest(self):
        assert receipt().transcript() != receipt(survivors=MEMBERS[:4]).transcript()
