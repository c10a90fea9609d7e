"""What the owner signed, as a member pins it: verified, never older than what was seen before."""

import hashlib
import threading

from blindsum.client.member_folder import MemberFolder
from blindsum.client.transport import MemberLine
from blindsum.crypto.canonical import decode_message
from blindsum.crypto.errors import DocumentError, RefusalReason, Refused
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust import policy as policies
from blindsum.crypto.trust import roster as rosters
from blindsum.crypto.trust.documents import SignedDocument, open_document, parse_signed
from blindsum.crypto.trust.envelope import GROUP_KEY, KeyEnvelope, open_group_key, open_he_key
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from blindsum.crypto.trust.round_check import check_newer_policy, check_newer_roster
from blindsum.proto.v1 import round_pb2


class RosterMovedOn(DocumentError):
    """The key envelopes aren't those of the roster that was named; a newer notice may explain it."""


class OwnerDocuments:
    """The policy, roster and plan in force at this member, with the keys that came under the roster.

    `follow` takes newer ones from the aggregator; it raises, and changes nothing, for any that isn't
    signed by the pinned owner, is older than one seen before, or whose key envelope doesn't fit.
    """

    def __init__(self, folder: MemberFolder, line: MemberLine) -> None:
        self._folder = folder
        self._line = line
        self._lock = threading.RLock()
        self.policy: Policy | None = None
        self.policy_digest = b""
        self.roster: Roster | None = None
        self.roster_digest = b""
        self.roster_bytes = b""
        self.plan: Plan | None = None
        self.plan_digest = b""
        self.plan_bytes = b""
        self.group_key: GroupKey | None = None
        self._he_public: dict[bytes, bytes] = {}
        self._restore()

    def _restore(self) -> None:
        folder, owner = self._folder, self._folder.pin.owner
        if stored := folder.fact("policy"):
            signed = parse_signed(stored)
            self.policy = open_document(signed, owner, policies.KIND, Policy)
            self.policy_digest = signed.digest
        if stored := folder.fact("roster"):
            signed = parse_signed(stored)
            self.roster = open_document(signed, owner, rosters.KIND, Roster)
            self.roster_digest, self.roster_bytes = signed.digest, stored
            self.group_key = folder.group_key(self.roster.epoch)
        if stored := folder.fact("plan"):
            signed = parse_signed(stored)
            self.plan = open_document(signed, owner, plans.KIND, Plan)
            self.plan_digest, self.plan_bytes = signed.digest, stored

    def follow(self, notice: round_pb2.WatchResponse) -> bool:
        """Take over the documents that a notice names; True when there is a whole set of them.

        Raises `DocumentError`, `Refused` or `OpeningFailed`.
        """
        with self._lock:
            if notice.policy and notice.policy != self.policy_digest:
                self._take_policy(self.fetch(notice.policy, policies.KIND))
            if notice.roster and notice.roster != self.roster_digest:
                self._take_roster(self.fetch(notice.roster, rosters.KIND))
            if notice.plan and notice.plan != self.plan_digest:
                self._take_plan(self.fetch(notice.plan, plans.KIND))
            return None not in (self.policy, self.roster, self.plan)

    def fetch(self, digest: bytes, kind: str) -> SignedDocument:
        """The signed document of this digest; its signature not yet checked."""
        signed = parse_signed(self._fetch(digest))
        if signed.kind != kind or signed.digest != digest:
            raise Refused(
                RefusalReason.WRONG_DIGEST, f"the aggregator sent another document than the {kind} asked for"
            )
        return signed

    def _fetch(self, digest: bytes) -> bytes:
        request = round_pb2.GetDocumentRequest(digest=digest)
        answer = self._line.call(self._line.stub.GetDocument, request, what="getting a signed document")
        return bytes(answer.document)

    def _take_policy(self, signed: SignedDocument) -> None:
        policy = open_document(signed, self._folder.pin.owner, policies.KIND, Policy)
        self._require_own(policy.federation, "policy")
        if self.policy is not None:
            check_newer_policy(self.policy, policy)
        self._folder.keep(policy=signed.to_bytes())
        self.policy, self.policy_digest = policy, signed.digest

    def _take_roster(self, signed: SignedDocument) -> None:
        pin = self._folder.pin
        roster = open_document(signed, pin.owner, rosters.KIND, Roster)
        self._require_own(roster.federation, "roster")
        if self.roster is not None:
            check_newer_roster(self.roster, roster)
        entry = roster.entry(pin.member)
        if entry.identity != self._folder.identity.public:
            raise DocumentError(f"the roster has another identity key for {pin.member!r}; ask the owner")
        self._take_keys(roster, signed.digest)
        data = signed.to_bytes()
        self._folder.keep_roster(roster.version, data)
        self.roster, self.roster_digest, self.roster_bytes = roster, signed.digest, data
        self._drop_he_secrets()

    def _drop_he_secrets(self) -> None:
        """Remove HE secret keys that neither the roster in force nor the running round needs."""
        assert self.roster is not None
        wanted = {key.digest for key in self.roster.he_keys}
        running = self._folder.round()
        if running is not None:
            wanted |= {key.digest for key in restored_roster(self._folder, running.roster).he_keys}
        self._folder.drop_he_secrets(wanted)

    def _take_keys(self, roster: Roster, digest: bytes) -> None:
        """Open this member's envelopes under a roster: the group key, and HE secret keys."""
        pin, hpke = self._folder.pin, self._folder.hpke
        answer = self._line.call(
            self._line.stub.GetEnvelopes, round_pb2.GetEnvelopesRequest(), what="getting the key envelopes"
        )
        found: GroupKey | None = None
        secrets: dict[bytes, bytes] = {}
        for data in answer.envelopes:
            envelope = decode_message(data, KeyEnvelope, "a key envelope")
            if envelope.roster != digest:
                raise RosterMovedOn("the key envelopes are another roster's; the aggregator has a newer one")
            if envelope.purpose == GROUP_KEY:
                found = open_group_key(
                    data, owner=pin.owner, roster=roster, roster_digest=digest, member=pin.member, hpke=hpke
                )
            elif (key := roster.he_key(envelope.purpose)) is not None:
                secrets[key.digest] = open_he_key(
                    data,
                    key.scheme,
                    owner=pin.owner,
                    roster=roster,
                    roster_digest=digest,
                    member=pin.member,
                    hpke=hpke,
                )
        if found is None:
            raise RosterMovedOn("the aggregator has no group key envelope for this member under its roster")
        for he_digest, secret in secrets.items():
            self._folder.keep_he_secret(he_digest, secret)
        self._folder.keep_group_key(found)
        self.group_key = found

    def _take_plan(self, signed: SignedDocument) -> None:
        plan = open_document(signed, self._folder.pin.owner, plans.KIND, Plan)
        self._require_own(plan.federation, "plan")
        seen = self._folder.plan_version(plan.name)
        if plan.version <= seen:
            raise DocumentError(
                f"plan {plan.name!r} version {plan.version} isn't newer than version {seen}, seen before; "
                "ask the owner for the current one"
            )
        data = signed.to_bytes()
        with self._folder.transaction():
            self._folder.keep(plan=data)
            self._folder.keep_plan_version(plan.name, plan.version)
        self.plan, self.plan_digest, self.plan_bytes = plan, signed.digest, data
        if self.roster is not None:
            # A plan that goes on under new keys comes once the round under the old ones has ended.
            self._drop_he_secrets()

    def _require_own(self, federation: bytes, what: str) -> None:
        if federation != self._folder.pin.federation:
            raise DocumentError(f"this {what} is another federation's; tell the aggregator's operator")

    def earlier_roster(self, digest: bytes) -> Roster:
        """An owner-signed roster that was in force earlier, or now; this member has its group key.

        Raises `DocumentError`, `Refused`.
        """
        assert self.roster is not None
        if digest in (b"", self.roster_digest):
            return self.roster
        signed = self.fetch(digest, rosters.KIND)
        roster = open_document(signed, self._folder.pin.owner, rosters.KIND, Roster)
        self._require_own(roster.federation, "roster")
        if roster.version > self.roster.version:
            raise DocumentError(
                "the checkpoint's roster isn't an earlier one than that in force; ask the owner"
            )
        if self._folder.group_key(roster.epoch) is None:
            raise DocumentError(
                f"the model is sealed under the keys of epoch {roster.epoch}, from before this member came; "
                "wait until the owner lets the plan go on under the new ones"
            )
        return roster

    def he_public(self, digest: bytes) -> bytes:
        """The HE public key that the roster names by this digest."""
        held = self._he_public.get(digest)
        if held is None:
            held = self._fetch(digest)
            if hashlib.sha256(held).digest() != digest:
                raise Refused(
                    RefusalReason.WRONG_DIGEST, "the aggregator sent another HE public key than the roster's"
                )
            self._he_public = {digest: held}
        return held


def restored_roster(folder: MemberFolder, data: bytes) -> Roster:
    """The roster of a stored round: it was verified when the round began, and is verified again."""
    return open_document(parse_signed(data), folder.pin.owner, rosters.KIND, Roster)


def restored_plan(folder: MemberFolder, data: bytes) -> tuple[Plan, bytes]:
    """The plan of a stored round and its digest."""
    signed = parse_signed(data)
    return open_document(signed, folder.pin.owner, plans.KIND, Plan), signed.digest
