"""Every check by which a member refuses a round or a document before it answers (protocols.md 1.2-1.4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from blindsum.crypto.encoding.vector import field_count
from blindsum.crypto.errors import (
    DocumentError,
    ParameterRefused,
    PolicyViolation,
    ServerViolation,
    StateMismatch,
)
from blindsum.crypto.primitives.derivation import same
from blindsum.crypto.schemes.homomorphic.cipher import MINIMUM_SECURITY, restore_parameters
from blindsum.crypto.trust.header import NO_KEY, BoundHeader, Header
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import HeKey, Roster

PAILLIER_2048_SECURITY = 112
"""Bits of security of a 2048-bit modulus (NIST SP 800-57 part 1, table 2)."""


@dataclass(frozen=True)
class Pinned:
    """What a member holds when a header comes: the owner's documents, verified, and its own counters.

    `last_round` and `last_h0` are the newest round that it answered (0 and empty before the first);
    `state_index` and `state_digest` are its training state's, `exponents` the state's range exponents.
    """

    member: str
    policy: Policy
    policy_digest: bytes
    plan: Plan
    plan_digest: bytes
    roster: Roster
    roster_digest: bytes
    group_key_id: bytes
    state_index: int
    state_digest: bytes
    exponents: Sequence[int]
    last_round: int = 0
    last_h0: bytes = b""


def check_header(bound: BoundHeader, pinned: Pinned, *, now: float) -> None:
    """Raises unless the member may take part in this round; `now` in seconds since 1970.

    `PolicyViolation`: the round undercuts policy or plan, or they have expired. `ServerViolation`: the
    header isn't one that an honest aggregator makes. `StateMismatch`: it continues from another
    training state. `DocumentError`: the member isn't in the roster. `ParameterRefused`: the plan's sums
    could overflow.
    """
    header = bound.header
    _check_documents(header, pinned, now)
    _check_floors(header, pinned)
    _check_vector(header, pinned)
    _check_keys(header, pinned)
    _check_progress(bound, pinned, now)
    _check_state(header, pinned)


def require_valid(policy: Policy, roster: Roster, now: float) -> None:
    """Raises `PolicyViolation` for an expired one: a removal that is withheld ends here at the latest."""
    for name, until in (("policy", policy.valid_until), ("roster", roster.valid_until)):
        if now > until:
            raise PolicyViolation(
                f"the {name} has expired; nothing goes on under it until the owner renews it"
            )


def check_newer_policy(old: Policy, new: Policy) -> None:
    """Raises `DocumentError` unless `new` may take the place of the pinned `old`: versions only grow."""
    if new.federation != old.federation:
        raise DocumentError("this policy is another federation's; keep the pinned one")
    if new.version < old.version or (new.version == old.version and new != old):
        raise DocumentError(
            f"policy version {new.version} doesn't follow the pinned version {old.version}; "
            "ask the owner for the current one"
        )


def check_newer_plan(old: Plan, new: Plan) -> None:
    """Raises `DocumentError` unless `new` may take the place of `old`: versions of one name only grow."""
    if new.federation != old.federation:
        raise DocumentError("this plan is another federation's; keep the one you have")
    if new.name == old.name and (new.version < old.version or (new.version == old.version and new != old)):
        raise DocumentError(
            f"plan {new.name!r} version {new.version} doesn't follow version {old.version}; "
            "ask the owner for the current one"
        )


def check_newer_roster(old: Roster, new: Roster) -> None:
    """Raises `DocumentError` unless `new` may take the place of `old`.

    Versions and epochs only grow; whoever removes or replaces a member changes the group key too.
    """
    if new.federation != old.federation:
        raise DocumentError("this roster is another federation's; keep the one you have")
    if new.version < old.version or (new.version == old.version and new != old):
        raise DocumentError(
            f"roster version {new.version} doesn't follow version {old.version}; "
            "ask the owner for the current one"
        )
    if new.epoch < old.epoch or ((new.epoch == old.epoch) != (new.group_key == old.group_key)):
        raise DocumentError("the roster's epoch and group key don't follow the ones before; ask the owner")
    kept = {(entry.id, entry.identity, entry.hpke) for entry in new.members}
    gone = [entry.id for entry in old.members if (entry.id, entry.identity, entry.hpke) not in kept]
    if gone and new.group_key == old.group_key:
        raise DocumentError(
            f"the roster removes {', '.join(gone)} but keeps the group key; ask the owner to rotate it"
        )


def _check_documents(header: Header, pinned: Pinned, now: float) -> None:
    if not math.isfinite(now):
        raise ValueError("now isn't a time")
    policy, plan, roster = pinned.policy, pinned.plan, pinned.roster
    if not header.federation == policy.federation == plan.federation == roster.federation:
        raise ServerViolation("federation", "the round is another federation's")
    for name, found, held in (
        ("policy", header.policy, pinned.policy_digest),
        ("plan", header.plan, pinned.plan_digest),
        ("roster", header.roster, pinned.roster_digest),
    ):
        if not same(found, held):
            raise ServerViolation(name, f"the round is under another {name} than the one held here")
    if plan.policy != pinned.policy_digest:
        raise PolicyViolation("the plan was made under another policy; ask the owner to sign it anew")
    require_valid(policy, roster, now)
    if header.plan_name != plan.name:
        raise ServerViolation("plan name", "the round names another plan")
    roster.entry(pinned.member)
    plan.check_against(policy)


def _check_floors(header: Header, pinned: Pinned) -> None:
    policy, plan = pinned.policy, pinned.plan
    _require(header.scheme == plan.scheme, "scheme", f"{header.scheme}, but the plan says {plan.scheme}")
    _require(header.gamma == policy.gamma, "gamma", f"{header.gamma}, but the policy says {policy.gamma}")
    _require(header.delta == policy.delta, "delta", f"{header.delta}, but the policy says {policy.delta}")
    _require(header.security >= policy.security, "security", f"{header.security} < {policy.security}")
    floor = plan.cohort_floor(policy, len(pinned.roster.members))
    cap = min(policy.n_max, plan.cohort_max)
    _require(header.n_min >= floor, "n_min", f"{header.n_min} < {floor}")
    _require(header.n_max <= cap, "n_max", f"{header.n_max} > {cap}")
    _require(header.n_min <= header.n_max, "n_min", f"{header.n_min} > n_max {header.n_max}")
    largest = max(pinned.exponents)
    _require(
        largest <= policy.max_range_exponent,
        "range",
        f"a tensor's range 2^{largest} is above the policy's 2^{policy.max_range_exponent}",
    )


def _check_vector(header: Header, pinned: Pinned) -> None:
    plan = pinned.plan
    for name, found, wanted in (
        ("bits", header.bits, plan.encoding.bits),
        ("dimension", header.dimension, plan.dimension),
        ("fields", header.fields, field_count(plan)),
    ):
        if found != wanted:
            raise ServerViolation(name, f"the round says {name} = {found}, but the plan gives {wanted}")
    if not same(header.layout, plan.layout):
        raise ServerViolation("layout", "the round is for another layout than the plan's")


def _check_keys(header: Header, pinned: Pinned) -> None:
    roster = pinned.roster
    if not (same(header.group_key, roster.group_key) and same(header.group_key, pinned.group_key_id)):
        raise ServerViolation("group key", "the round is under another group key than the roster's")
    if header.scheme == "masking":
        wanted = NO_KEY
    else:
        key = roster.he_key(header.scheme)
        if key is None:
            raise PolicyViolation(f"the roster names no {header.scheme} key; ask the owner for one")
        _require(key.bits >= header.bits, "HE key", f"made for {key.bits} bits, not {header.bits}")
        _require(key.n_max >= header.n_max, "HE key", f"made for {key.n_max} members, not {header.n_max}")
        _check_he_parameters(key, pinned.policy)
        wanted = key.digest
    if not same(header.he_key, wanted):
        raise ServerViolation("HE key", "the round is under another HE key than the roster's")


def _check_he_parameters(key: HeKey, policy: Policy) -> None:
    paillier = key.scheme == "paillier"
    floor = PAILLIER_2048_SECURITY if paillier and policy.paillier_bits == 2048 else MINIMUM_SECURITY
    try:
        parameters = restore_parameters(key.parameters, key.bits, key.n_max, minimum_security=floor)
    except ParameterRefused as refusal:
        raise PolicyViolation(f"the roster's {key.scheme} key isn't acceptable: {refusal}") from None
    if paillier:
        _require(
            parameters.modulus_bits >= policy.paillier_bits,
            "HE key",
            f"a modulus of {parameters.modulus_bits} bits < {policy.paillier_bits}",
        )
    _require(
        parameters.upload_form != "seeded" or policy.seeded_uploads,
        "HE key",
        "seeded uploads, which the policy doesn't allow",
    )


def _check_progress(bound: BoundHeader, pinned: Pinned, now: float) -> None:
    header, plan = bound.header, pinned.plan
    if header.round < plan.first_round:
        raise ServerViolation(
            "round", f"round {header.round} is before the plan's first round {plan.first_round}"
        )
    if header.round < pinned.last_round:
        raise ServerViolation(
            "round", f"round {header.round} isn't newer than round {pinned.last_round}, answered already"
        )
    if header.round == pinned.last_round and not same(bound.h0, pinned.last_h0):
        raise ServerViolation("round", f"round {header.round} was answered already under another header")
    if header.state_round >= plan.rounds:
        raise PolicyViolation(f"the plan's {plan.rounds} rounds are done; the owner can sign a new plan")
    if now >= header.deadline:
        raise ServerViolation("deadline", "the round's deadline has passed already")


def _check_state(header: Header, pinned: Pinned) -> None:
    if header.state_round != pinned.state_index:
        raise StateMismatch(
            f"the round continues from state {header.state_round}, but this member holds state "
            f"{pinned.state_index}; get that state's checkpoint first"
        )
    if not same(header.state, pinned.state_digest):
        raise StateMismatch(
            f"state {header.state_round} of this round isn't the one computed here; the member stops. "
            "Compare transcript digests with other members"
        )


def _require(holds: bool, name: str, text: str) -> None:
    if not holds:
        raise PolicyViolation(f"the round undercuts policy or plan: {name}: {text}")
