"""Checkpoints: which claims a newcomer believes."""

import pytest
from blindsum.crypto.errors import Refused, StateMismatch
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.acceptance import StateClaim, StateSignature, accept_state, sign_state
from small_federation import FEDERATION, MEMBERS, SmallFederation, replaced

FED = SmallFederation()
H1 = bytes([4]) * 32
DIGEST = bytes([8]) * 32


def signed(member, *, identity=None, survivors=MEMBERS, h1=H1, index=7, digest=DIGEST, federation=FEDERATION):
    identity = identity or FED.identities[member]
    return StateSignature(
        member,
        sign_state(identity, federation=federation, h1=h1, index=index, digest=digest, survivors=survivors),
    )


def claim(signers=MEMBERS[:3], survivors=MEMBERS, **changes):
    signatures = tuple(signed(member, survivors=survivors) for member in signers)
    return replaced(StateClaim(FEDERATION, H1, 7, DIGEST, tuple(survivors), signatures), **changes)


def accept(candidate, n_min=3, index=7):
    accept_state(
        StateClaim.parse(candidate.to_bytes()),
        roster=FED.roster,
        plan=FED.plan,
        plan_digest=FED.header.plan,
        n_min=n_min,
        index=index,
    )


def test_more_than_half_and_at_least_n_min():
    accept(claim(MEMBERS[:3]))
    accept(claim(MEMBERS))
    accept(claim(MEMBERS[:4], MEMBERS[:4]))
    for candidate, n_min in (
        (claim(MEMBERS[:2]), 2),
        (claim(()), 3),
        (claim(MEMBERS[:2], MEMBERS[:4]), 2),
        (claim(MEMBERS[:2], MEMBERS[:2]), 3),
        (claim(MEMBERS[:3]), 4),
    ):
        with pytest.raises(StateMismatch):
            accept(candidate, n_min)


def test_a_smaller_survivor_set_than_was_signed():
    with pytest.raises(Refused):
        accept(replaced(claim(MEMBERS[:3], MEMBERS), survivors=MEMBERS[:3]))


@pytest.mark.parametrize(
    "last",
    [
        signed("cid", digest=bytes(32)),
        signed("cid", h1=bytes(32)),
        signed("cid", index=8),
        signed("cid", federation=bytes(32)),
        signed("cid", identity=SigningKey.generate()),
        signed("mallory", identity=SigningKey.generate()),
        replaced(signed("cid"), signature=bytes(64)),
        signed("ann"),
    ],
)
def test_a_signature_that_does_not_count_spoils_the_claim(last):
    good = claim(MEMBERS[:4])
    with pytest.raises(Refused):
        accept(replaced(good, signatures=(*good.signatures[:2], last, *good.signatures[3:])))


def test_a_signer_who_did_not_survive():
    with pytest.raises(Refused):
        accept(claim(MEMBERS, MEMBERS[:4]))


def test_a_survivor_named_twice():
    with pytest.raises(Refused):
        accept(claim(MEMBERS[:3], (*MEMBERS[:4], "ann")))


@pytest.mark.parametrize("index", [6, 8])
def test_another_index_than_the_round_continues_from(index):
    with pytest.raises(StateMismatch):
        accept(claim(), index=index)


def test_another_federation():
    with pytest.raises(StateMismatch):
        accept(claim(federation=bytes(32)))


def test_the_first_state_is_the_one_in_the_plan():
    first = StateClaim(FEDERATION, FED.header.plan, 0, FED.plan.initial_state, (), ())
    accept(first, index=0)
    with pytest.raises(StateMismatch):
        accept(replaced(first, digest=DIGEST), index=0)
    for candidate in (replaced(first, h1=H1), replaced(first, signatures=claim().signatures)):
        with pytest.raises(Refused):
            accept(candidate, index=0)


def test_a_first_state_that_five_members_signed_is_still_not_the_owners():
    with pytest.raises((StateMismatch, Refused)):
        accept(claim(MEMBERS, index=0), index=0)


def test_strict():
    data = claim().to_bytes()
    for bad in (b"", data[:-1], data + b"\0"):
        with pytest.raises(Refused):
            StateClaim.parse(bad)
