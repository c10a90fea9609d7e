"""What the owner publishes: checked as a whole, stored all or none (protocols.md 1.2, 1.6).

The aggregator schedules what the owner signed and writes none of it. It checks what members will check
again, so that a mistake is refused here, with the reason, and not by every member in every round.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from blindsum.aggregator.engine import chain_of, event
from blindsum.aggregator.round_header import DocumentsInForce, next_header, round_terms
from blindsum.aggregator.store.records import (
    CheckpointRecord,
    DocumentRecord,
    EnvelopeRecord,
    FederationRecord,
    InitialStateRecord,
    JoinRecord,
)
from blindsum.aggregator.store.state import Change, Delete, Put, StateStore
from blindsum.crypto.canonical import decode_message
from blindsum.crypto.errors import BlindsumError, DocumentError, PolicyViolation, RefusalReason, Refused
from blindsum.crypto.primitives.signing import verify
from blindsum.crypto.schemes.base import Scheme
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import SignedDocument, open_document, parse_signed
from blindsum.crypto.trust.envelope import GROUP_KEY, KeyEnvelope
from blindsum.crypto.trust.joining import REFUSAL_KIND, Refusal
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from blindsum.crypto.trust.round_check import check_newer_policy, check_newer_roster

MAX_HE_KEY_BYTES = 8 << 20


@dataclass
class _Draft:
    """What is in force after the publication, as it is put together."""

    record: FederationRecord
    documents: DocumentsInForce
    changes: list[Change] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    he_public: dict[bytes, bytes] = field(default_factory=dict)


def _refuse(text: str) -> Refused:
    return Refused(RefusalReason.POLICY, text)


class Publication:
    """Checks one `Publish` call and turns it into changes of the state."""

    def __init__(
        self,
        store: StateStore,
        schemes: Callable[[str], Scheme],
        record: FederationRecord,
        documents: DocumentsInForce,
        now_ms: int,
    ) -> None:
        self._store = store
        self._schemes = schemes
        self._now_ms = now_ms
        self._draft = _Draft(record, documents)

    def changes(
        self, documents: Sequence[bytes], envelopes: Sequence[bytes], he_public_keys: Sequence[bytes]
    ) -> list[Change]:
        """The changes to commit. Raises `Refused`; then nothing is to be changed."""
        if not documents:
            raise Refused(RefusalReason.MALFORMED, "nothing was published")
        draft = self._draft
        old_roster = draft.documents.roster_digest
        for key in he_public_keys:
            if not 0 < len(key) <= MAX_HE_KEY_BYTES:
                raise Refused(RefusalReason.WRONG_SIZE, f"an HE public key has 1 to {MAX_HE_KEY_BYTES} bytes")
            digest = hashlib.sha256(key).digest()
            draft.he_public[digest] = key
        order = {policies.KIND: 0, rosters.KIND: 1, plans.KIND: 2, REFUSAL_KIND: 3}
        signed = [parse_signed(data) for data in documents]
        for one in signed:
            if one.kind not in order:
                raise Refused(RefusalReason.MALFORMED, f"a {one.kind!r} can't be published")
            if one.kind != REFUSAL_KIND and one.kind in draft.seen:
                raise Refused(RefusalReason.CONFLICT, f"two documents of kind {one.kind} in one publication")
            draft.seen.add(one.kind)
        try:
            for one in sorted(signed, key=lambda one: order[one.kind]):
                self._take(one)
            self._check_together()
        except Refused:
            raise
        except (DocumentError, PolicyViolation, BlindsumError) as error:
            raise _refuse(str(error)) from None
        if draft.documents.roster_digest != old_roster or envelopes:
            self._take_envelopes(envelopes)
        for digest, key in draft.he_public.items():
            roster = draft.documents.roster
            if roster is None or all(entry.digest != digest for entry in roster.he_keys):
                raise _refuse("an HE public key isn't named by the roster")
            draft.changes.append(Put(DocumentRecord(draft.record.federation, digest, "he public key", key)))
        draft.changes.append(Put(draft.record))
        draft.changes.append(
            event(
                self._now_ms,
                draft.record.federation,
                "published",
                kinds=sorted(draft.seen),
                roster=draft.record.roster_version,
                policy=draft.record.policy_version,
                plan=draft.record.plan_version,
            )
        )
        return draft.changes

    def _take(self, signed: SignedDocument) -> None:
        draft, owner = self._draft, self._draft.record.owner
        federation = draft.record.federation
        now = self._now_ms // 1000
        digest = signed.digest
        if signed.kind == REFUSAL_KIND:
            refusal = open_document(signed, owner, REFUSAL_KIND, Refusal)
            self._require_own(refusal.federation)
            join = self._store.get(JoinRecord, federation, refusal.request_id)
            if join is None:
                raise _refuse("a refusal names no request that is waiting")
            draft.changes.append(Put(replace(join, refusal=refusal.reason)))
            draft.changes.append(
                event(self._now_ms, federation, "join refused", member=join.member, reason=refusal.reason)
            )
            return
        if signed.kind == policies.KIND:
            policy = open_document(signed, owner, policies.KIND, Policy)
            self._require_own(policy.federation)
            if draft.documents.policy is not None:
                check_newer_policy(draft.documents.policy, policy)
            _require_valid("policy", policy.valid_until, now)
            draft.documents = replace(draft.documents, policy=policy, policy_digest=digest)
            draft.record = replace(draft.record, policy=digest, policy_version=policy.version)
        elif signed.kind == rosters.KIND:
            roster = open_document(signed, owner, rosters.KIND, Roster)
            self._require_own(roster.federation)
            if draft.documents.roster is not None:
                check_newer_roster(draft.documents.roster, roster)
            _require_valid("roster", roster.valid_until, now)
            self._take_he_keys(draft.documents.roster, roster)
            self._record_members(draft.documents.roster, roster)
            draft.documents = replace(draft.documents, roster=roster, roster_digest=digest)
            draft.record = replace(draft.record, roster=digest, roster_version=roster.version)
        else:
            plan = open_document(signed, owner, plans.KIND, Plan)
            self._require_own(plan.federation)
            before = draft.documents.plan
            if before is not None and (
                plan.version < before.version or (plan.version == before.version and plan != before)
            ):
                raise _refuse(f"plan version {plan.version} doesn't follow version {before.version}")
            draft.documents = replace(draft.documents, plan=plan, plan_digest=digest)
            draft.record = replace(draft.record, plan=digest, plan_version=plan.version)
        draft.changes.append(Put(DocumentRecord(federation, digest, signed.kind, signed.to_bytes())))

    def _take_he_keys(self, before: Roster | None, after: Roster) -> None:
        """Every HE key is there, and none comes back that was retired: its seeds are no longer remembered."""
        kept = {key.digest for key in before.he_keys} if before is not None else set()
        for key in after.he_keys:
            self._he_public(key.digest)
            known = self._store.get(DocumentRecord, after.federation, key.digest)
            if known is not None and key.digest not in kept:
                raise _refuse(f"the {key.scheme} key was retired by an earlier roster; make a new one")

    def _record_members(self, before: Roster | None, after: Roster) -> None:
        """Who came in and who went, for the audit, with the identity keys that the owner signed."""
        old = {entry.id: entry.identity for entry in before.members} if before is not None else {}
        new = {entry.id: entry.identity for entry in after.members}
        for kind, one, other in (("members admitted", new, old), ("members removed", old, new)):
            changed = {name: key.hex() for name, key in one.items() if other.get(name) != key}
            if changed:
                self._draft.changes.append(
                    event(
                        self._now_ms,
                        after.federation,
                        kind,
                        roster=after.version,
                        identities=changed,
                    )
                )

    def _require_own(self, federation: bytes) -> None:
        if federation != self._draft.record.federation:
            raise _refuse("a document is another federation's")

    def _he_public(self, digest: bytes) -> bytes:
        key = self._draft.he_public.get(digest)
        if key is not None:
            return key
        stored = self._store.get(DocumentRecord, self._draft.record.federation, digest)
        if stored is None:
            raise _refuse("the roster names an HE public key that wasn't published with it")
        return stored.body

    def _check_together(self) -> None:
        """A plan must fit the policy, the roster and its first state; its scheme must be safe with it."""
        draft = self._draft
        documents, plan = draft.documents, draft.documents.plan
        if plan is None or plans.KIND not in draft.seen:
            return
        if documents.policy is None or documents.roster is None:
            raise _refuse("publish roster and policy before, or together with, a plan")
        if plan.policy != documents.policy_digest:
            raise _refuse("the plan names another policy than the one in force")
        plan.check_against(documents.policy)
        federation = draft.record.federation
        scheme = self._schemes(plan.scheme)
        bound = next_header(
            federation, plan.first_round, documents, scheme, plan.initial_state, 0, self._now_ms
        )
        key = documents.roster.he_key(plan.scheme)
        public = b"" if key is None else self._he_public(key.digest)
        scheme.check_terms(round_terms(bound, documents.roster, public))
        self._take_first_state(plan)

    def _take_first_state(self, plan: Plan) -> None:
        draft = self._draft
        federation, chain = draft.record.federation, chain_of(plan)
        agreed = self._store.find(CheckpointRecord, federation=federation, chain=chain, agreed=1)
        if any(row.state_round > 0 for row in agreed):
            return
        if any(row.sealing_context == draft.documents.plan_digest for row in agreed):
            return
        waiting = self._store.get(InitialStateRecord, federation, plan.initial_state)
        if waiting is None:
            raise _refuse("publish the plan's first state, sealed under this plan, before the plan")
        draft.changes += [
            Put(
                CheckpointRecord(
                    federation=federation,
                    chain=chain,
                    state_round=0,
                    round=0,
                    state=plan.initial_state,
                    sealing_context=draft.documents.plan_digest,
                    total=waiting.total,
                    sealed_digest=waiting.sealed_digest,
                    agreed=1,
                    h1=draft.documents.plan_digest,
                    roster=draft.documents.roster_digest,
                )
            ),
            Delete(InitialStateRecord, (("federation", federation), ("state", plan.initial_state))),
        ]

    def _take_envelopes(self, envelopes: Sequence[bytes]) -> None:
        """Each member of a new roster needs the group key and every HE key under that very roster."""
        draft = self._draft
        roster, digest = draft.documents.roster, draft.documents.roster_digest
        if roster is None:
            raise _refuse("key envelopes need a roster")
        wanted = {GROUP_KEY: roster.group_key} | {key.scheme: key.digest for key in roster.he_keys}
        found: set[tuple[str, str]] = set()
        federation = draft.record.federation
        draft.changes.append(Delete(EnvelopeRecord, (("federation", federation), ("roster", digest))))
        for position, data in enumerate(envelopes):
            envelope = decode_message(data, KeyEnvelope, "a key envelope")
            index = roster.position.get(envelope.member)
            place = (envelope.member, envelope.purpose)
            if (
                index is None
                or place in found
                or envelope.federation != federation
                or envelope.epoch != roster.epoch
                or envelope.roster != digest
                or wanted.get(envelope.purpose) != envelope.key_id
            ):
                raise _refuse(f"a key envelope for {envelope.member} doesn't belong to this roster")
            signed = (
                federation,
                roster.epoch.to_bytes(8, "little"),
                envelope.member.encode(),
                digest,
                envelope.purpose.encode(),
                envelope.key_id,
                roster.members[index].hpke,
                envelope.sealed,
            )
            if not verify(draft.record.owner, envelope.signature, "key envelope", *signed):
                raise Refused(
                    RefusalReason.SIGNATURE, f"the key envelope for {envelope.member} isn't the owner's"
                )
            found.add(place)
            draft.changes.append(Put(EnvelopeRecord(federation, digest, envelope.member, position, data)))
        missing = {(entry.id, purpose) for entry in roster.members for purpose in wanted} - found
        if missing:
            member, purpose = min(missing)
            raise _refuse(f"{member} gets no envelope for the {purpose} under this roster")


def _require_valid(what: str, until: int, now: int) -> None:
    if until <= now:
        raise _refuse(f"the {what} has expired already; check valid_until and the clocks")
