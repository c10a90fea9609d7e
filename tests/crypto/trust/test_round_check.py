"""Every reason for which a member refuses a round before it answers."""

import pytest
from blindsum.crypto.errors import (
    DocumentError,
    ParameterRefused,
    PolicyViolation,
    ServerViolation,
    StateMismatch,
)
from blindsum.crypto.schemes.homomorphic.cipher import choose_parameters
from blindsum.crypto.trust.documents import sign_document
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.header import BoundHeader
from blindsum.crypto.trust.plan import Encoding
from blindsum.crypto.trust.roster import HeKey, RosterEntry
from blindsum.crypto.trust.round_check import (
    check_header,
    check_newer_plan,
    check_newer_policy,
    check_newer_roster,
)
from small_federation import FEDERATION, NOW, SmallFederation, replaced

FED = SmallFederation()


def test_an_honest_round_passes_and_so_does_resuming_it():
    check_header(FED.bound, FED.pinned, now=NOW)
    check_header(BoundHeader.parse(FED.bound.body), FED.pinned, now=NOW + 59.9)
    check_header(FED.bound, FED.pinned_with(last_round=12, last_h0=FED.bound.h0), now=NOW)
    check_header(FED.header_with(n_min=4, n_max=6), FED.pinned, now=NOW)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"federation": bytes(32)}, ServerViolation, "federation"),
        ({"policy": bytes(32)}, ServerViolation, "policy"),
        ({"plan": bytes(32)}, ServerViolation, "plan"),
        ({"roster": bytes(32)}, ServerViolation, "roster"),
        ({"plan_name": "other"}, ServerViolation, "plan"),
        ({"scheme": "bfv"}, PolicyViolation, "scheme"),
        ({"gamma": 100}, PolicyViolation, "gamma"),
        ({"delta": 400}, PolicyViolation, "delta"),
        ({"security": 40}, PolicyViolation, "security"),
        ({"n_min": 3, "n_max": 9}, PolicyViolation, "n_max"),
        ({"n_min": 8, "n_max": 7}, PolicyViolation, "n_min"),
        ({"bits": 15}, ServerViolation, "bits"),
        ({"dimension": 18}, ServerViolation, "dimension"),
        ({"fields": 1}, ServerViolation, "fields"),
        ({"layout": bytes(32)}, ServerViolation, "layout"),
        ({"group_key": bytes(32)}, ServerViolation, "group key"),
        ({"he_key": bytes(32)}, ServerViolation, "HE key"),
        ({"round": 9}, ServerViolation, "first round"),
        ({"round": 10}, ServerViolation, "newer"),
        ({"round": 11}, ServerViolation, "another header"),
        ({"deadline": NOW}, ServerViolation, "deadline"),
        ({"state_round": 4}, PolicyViolation, "rounds are done"),
        ({"state_round": 1}, StateMismatch, "checkpoint"),
        ({"state": bytes(32)}, StateMismatch, "computed here"),
    ],
)
def test_a_header_that_no_honest_server_makes(changes, error, text):
    with pytest.raises(error, match=text):
        check_header(FED.header_with(**changes), FED.pinned, now=NOW)


def test_a_cohort_floor_of_the_plan_above_the_policys():
    plan = replaced(FED.plan, cohort_min=4)
    digest = FED.digest("plan", plan)
    pinned = FED.pinned_with(plan=plan, plan_digest=digest)
    check_header(FED.header_with(plan=digest, n_min=4), pinned, now=NOW)
    with pytest.raises(PolicyViolation, match="n_min"):
        check_header(FED.header_with(plan=digest, n_min=3), pinned, now=NOW)


def larger_roster(members: int, **policy):
    """What a member holds whose roster has so many members, and a header under it."""
    entries = list(FED.roster.members)
    for index in range(members - len(entries)):
        entries.append(
            RosterEntry(
                id=f"x-{index:02}",
                organisation="",
                identity=bytes([index]) * 32,
                hpke=entries[0].hpke,
            )
        )
    roster = replaced(FED.roster, members=tuple(entries))
    rules = replaced(FED.policy, **policy)
    plan = replaced(FED.plan, policy=FED.digest("policy", rules))
    held = {
        "roster": roster,
        "roster_digest": FED.digest("roster", roster),
        "policy": rules,
        "policy_digest": plan.policy,
        "plan": plan,
        "plan_digest": FED.digest("plan", plan),
    }
    named = {"roster": held["roster_digest"], "policy": plan.policy, "plan": held["plan_digest"]}
    return FED.pinned_with(**held), named


@pytest.mark.parametrize("members", [6, 7, 8, 15])
def test_a_cohort_of_half_of_the_roster_is_refused_for_a_server_could_run_two(members):
    pinned, named = larger_roster(members)
    most = members // 2 + 1
    check_header(FED.header_with(n_min=most, **named), pinned, now=NOW)
    with pytest.raises(PolicyViolation, match=f"n_min: {most - 1} < {most}"):
        check_header(FED.header_with(n_min=most - 1, **named), pinned, now=NOW)
    allowed, named = larger_roster(members, split_cohorts=True)
    check_header(FED.header_with(n_min=3, **named), allowed, now=NOW)


def test_a_plan_whose_rounds_cannot_hold_more_than_half_of_the_roster():
    pinned, named = larger_roster(16)
    with pytest.raises(PolicyViolation, match="cohort_max: 8 is no more than half of the 16 members"):
        check_header(FED.header_with(n_min=8, **named), pinned, now=NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"n_min": 4},
        {"n_max": 7},
        {"schemes": ("bfv",)},
        {"bits_max": 12},
        {"weightings": ("equal",)},
        {"max_weight_ratio": 8},
        {"max_range_exponent": -1},
        {"security": 40, "gamma": 100},
    ],
)
def test_a_plan_or_state_that_undercuts_the_policy(change):
    policy = replaced(FED.policy, **change)
    digest = FED.digest("policy", policy)
    plan = replaced(FED.plan, policy=digest)
    pinned = FED.pinned_with(
        policy=policy, policy_digest=digest, plan=plan, plan_digest=FED.digest("plan", plan)
    )
    header = FED.header_with(policy=digest, plan=pinned.plan_digest)
    with pytest.raises(PolicyViolation):
        check_header(header, pinned, now=NOW)


def test_a_plan_made_under_another_policy():
    policy = replaced(FED.policy, version=9)
    digest = FED.digest("policy", policy)
    with pytest.raises(PolicyViolation, match="another policy"):
        check_header(
            FED.header_with(policy=digest), FED.pinned_with(policy=policy, policy_digest=digest), now=NOW
        )


def test_expired_documents():
    check_header(FED.header_with(deadline=NOW + 5000), FED.pinned, now=NOW + 1000)
    with pytest.raises(PolicyViolation, match="expired"):
        check_header(FED.header_with(deadline=NOW + 5000), FED.pinned, now=NOW + 1001)
    roster = replaced(FED.roster, valid_until=NOW - 1)
    digest = FED.digest("roster", roster)
    with pytest.raises(PolicyViolation, match="roster has expired"):
        check_header(
            FED.header_with(roster=digest), FED.pinned_with(roster=roster, roster_digest=digest), now=NOW
        )
    with pytest.raises(ValueError, match="time"):
        check_header(FED.bound, FED.pinned, now=float("nan"))


def test_a_member_that_the_roster_does_not_have():
    with pytest.raises(DocumentError):
        check_header(FED.bound, FED.pinned_with(member="mallory"), now=NOW)


def test_a_group_key_that_this_member_does_not_hold():
    with pytest.raises(ServerViolation, match="group key"):
        check_header(FED.bound, FED.pinned_with(group_key_id=bytes(32)), now=NOW)


def test_a_cohort_whose_sums_overflow():
    plan = replaced(FED.plan, cohort_max=2**30, encoding=Encoding(bits=24))
    policy = replaced(FED.policy, n_max=100_000)
    assert policy.n_max < plan.cohort_max
    with pytest.raises((PolicyViolation, ParameterRefused)):
        check_header(FED.bound, FED.pinned_with(plan=plan, policy=policy), now=NOW)


class TestHomomorphic:
    def check(self, scheme, *, bits=16, n_max=8, modulus_bits=3072, policy=None, header=None, form="seeded"):
        parameters = choose_parameters(
            scheme, bits, n_max, form=form, modulus_bits=modulus_bits, minimum_security=112
        )
        key = HeKey(scheme=scheme, parameters=parameters.name, bits=bits, n_max=n_max, digest=bytes([9]) * 32)
        roster = replaced(FED.roster, he_keys=(key,))
        rules = replaced(FED.policy, **(policy or {}))
        rules_digest = FED.digest("policy", rules)
        plan = replaced(FED.plan, scheme=scheme, policy=rules_digest)
        pinned = FED.pinned_with(
            roster=roster,
            roster_digest=FED.digest("roster", roster),
            plan=plan,
            plan_digest=FED.digest("plan", plan),
            policy=rules,
            policy_digest=rules_digest,
        )
        changes = {
            "scheme": scheme,
            "roster": pinned.roster_digest,
            "plan": pinned.plan_digest,
            "policy": rules_digest,
            "he_key": key.digest,
        }
        check_header(FED.header_with(**(changes | (header or {}))), pinned, now=NOW)

    def test_keys_that_fit(self):
        self.check("bfv")
        self.check("bfv", bits=17, n_max=20)
        self.check("paillier")
        self.check("paillier", modulus_bits=2048, policy={"paillier_bits": 2048})
        self.check("bfv", form="public-key", policy={"seeded_uploads": False})

    @pytest.mark.parametrize(
        ("scheme", "settings"),
        [
            ("bfv", {"bits": 15}),
            ("bfv", {"n_max": 7}),
            ("bfv", {"policy": {"seeded_uploads": False}}),
            ("paillier", {"modulus_bits": 2048}),
        ],
    )
    def test_keys_that_do_not(self, scheme, settings):
        with pytest.raises(PolicyViolation):
            self.check(scheme, **settings)

    def test_another_key_than_the_rosters(self):
        with pytest.raises(ServerViolation, match="HE key"):
            self.check("bfv", header={"he_key": bytes(32)})

    def test_a_roster_without_a_key(self):
        plan = replaced(FED.plan, scheme="bfv")
        digest = FED.digest("plan", plan)
        with pytest.raises(PolicyViolation, match="names no bfv key"):
            check_header(
                FED.header_with(scheme="bfv", plan=digest),
                FED.pinned_with(plan=plan, plan_digest=digest),
                now=NOW,
            )


class TestRenewal:
    def test_a_policy_only_grows(self):
        check_newer_policy(FED.policy, FED.policy)
        check_newer_policy(FED.policy, replaced(FED.policy, version=3, n_min=4))
        for new in (
            replaced(FED.policy, version=1),
            replaced(FED.policy, n_min=4),
            replaced(FED.policy, version=3, federation=bytes(32)),
        ):
            with pytest.raises(DocumentError):
                check_newer_policy(FED.policy, new)

    def test_a_plan_only_grows(self):
        check_newer_plan(FED.plan, FED.plan)
        check_newer_plan(FED.plan, replaced(FED.plan, name="other", rounds=9))
        newer = replaced(FED.plan, version=2, rounds=9)
        check_newer_plan(FED.plan, newer)
        for old, new in (
            (newer, FED.plan),
            (FED.plan, replaced(FED.plan, rounds=9)),
            (FED.plan, replaced(newer, federation=bytes(32))),
        ):
            with pytest.raises(DocumentError):
                check_newer_plan(old, new)

    def test_a_roster_only_grows_and_a_removal_rotates_the_key(self):
        old = FED.roster
        rotated = GroupKey(bytes([3]) * 32, 2).key_id
        fewer = old.members[1:]
        newcomer = RosterEntry(id="fay", organisation="", identity=bytes(range(32)), hpke=old.members[0].hpke)
        check_newer_roster(old, old)
        check_newer_roster(old, replaced(old, version=4, members=(*old.members, newcomer)))
        check_newer_roster(old, replaced(old, version=4, epoch=2, group_key=rotated, members=fewer))
        swapped = replaced(old.members[0], identity=bytes(range(32)))
        for new in (
            replaced(old, version=2),
            replaced(old, valid_until=NOW),
            replaced(old, version=4, federation=bytes(32)),
            replaced(old, version=4, members=fewer),
            replaced(old, version=4, members=(swapped, *fewer)),
            replaced(old, version=4, epoch=2, members=fewer),
            replaced(old, version=4, group_key=rotated, members=fewer),
            replaced(old, version=4, epoch=0, group_key=rotated),
        ):
            with pytest.raises(DocumentError):
                check_newer_roster(old, new)


def test_the_builder_signs_what_it_says():
    assert sign_document(FED.owner, "policy", FED.policy).digest == FED.header.policy
    assert FED.header.federation == FEDERATION
