"""The header of the next round, from what the owner signed and where the training state is."""

from dataclasses import dataclass

from blindsum.crypto.encoding.vector import field_count
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.base import RoundTerms, Scheme
from blindsum.crypto.trust.header import NO_KEY, BoundHeader, Header
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster


@dataclass(frozen=True)
class DocumentsInForce:
    """The owner's documents that rounds follow, with the digests that name them."""

    roster: Roster | None = None
    roster_digest: bytes = b""
    policy: Policy | None = None
    policy_digest: bytes = b""
    plan: Plan | None = None
    plan_digest: bytes = b""


def step_seconds(plan: Plan, step: str) -> int:
    """Seconds that a step (or `conclude`) may take under the plan."""
    seconds: int = getattr(plan.deadlines, step)
    return seconds


def next_header(
    federation: bytes,
    number: int,
    documents: DocumentsInForce,
    scheme: Scheme,
    state: bytes,
    state_round: int,
    now_ms: int,
) -> BoundHeader:
    """The header of round `number`, starting from the state with this digest and index.

    Raises `ParameterRefused` when the roster lacks the HE key that the plan's scheme needs,
    `PolicyViolation` when the plan's cohorts are too small for the roster.
    """
    roster, policy, plan = documents.roster, documents.policy, documents.plan
    assert roster is not None
    assert policy is not None
    assert plan is not None
    he_key = roster.he_key(plan.scheme)
    if plan.scheme != "masking" and he_key is None:
        raise ParameterRefused(
            f"plan {plan.name!r} uses {plan.scheme}, but the roster names no key for it; the owner has to "
            "publish a roster with one"
        )
    seconds = sum(step_seconds(plan, step) for step in scheme.steps) + plan.deadlines.conclude
    return BoundHeader.of(
        Header(
            federation=federation,
            round=number,
            plan_name=plan.name,
            scheme=plan.scheme,
            gamma=policy.gamma,
            delta=policy.delta,
            security=policy.security,
            state=state,
            state_round=state_round,
            plan=documents.plan_digest,
            roster=documents.roster_digest,
            policy=documents.policy_digest,
            group_key=roster.group_key,
            he_key=NO_KEY if he_key is None else he_key.digest,
            dimension=plan.dimension,
            layout=plan.layout,
            bits=plan.encoding.bits,
            fields=field_count(plan),
            n_min=plan.cohort_floor(policy, len(roster.members)),
            n_max=plan.cohort_max,
            deadline=now_ms // 1000 + seconds,
        )
    )


def round_terms(bound: BoundHeader, roster: Roster, he_public: bytes) -> RoundTerms:
    """The terms of a round under the roster that its header names."""
    he_key = roster.he_key(bound.header.scheme)
    return RoundTerms(bound, roster, "" if he_key is None else he_key.parameters, he_public)
