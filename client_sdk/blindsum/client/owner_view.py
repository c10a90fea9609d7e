"""What an owner sees: documents in force, requests that wait, rounds, the newest model and its metrics.

Nothing here signs a document or changes the folder, so that any number of processes may look at once.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from blindsum.client.layout import dress
from blindsum.client.member import FRAMEWORK_SETTING
from blindsum.client.owner_folder import OwnerFolder
from blindsum.client.transport import DEFAULT, EnrolmentLine, Patience
from blindsum.crypto.canonical import decode_document
from blindsum.crypto.errors import DocumentError, RefusalReason, Refused, StateMismatch
from blindsum.crypto.trust import plan as plans
from blindsum.crypto.trust.acceptance import StateClaim, accept_state
from blindsum.crypto.trust.documents import SignedDocument, fingerprint
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.joining import (
    JoinBody,
    check_request_signature,
    check_token,
    prove_owner,
    token_id,
)
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster
from blindsum.crypto.trust.training_state import TrainingState, open_checkpoint
from blindsum.proto.v1 import enrolment_pb2

_log = logging.getLogger("blindsum.client")

_RUNNING: Final = ("open", "published")
"""What the aggregator calls a round that hasn't ended."""


@dataclass(frozen=True)
class Application:
    """A request to be admitted. `problem` says why it can't be, if so."""

    member: str
    organisation: str
    request_id: bytes
    body: JoinBody
    problem: str = ""

    @property
    def fingerprint(self) -> str:
        """What the applicant's device shows too: compare it by telephone."""
        return fingerprint(self.body.identity)


@dataclass(frozen=True)
class RoundMetrics:
    """What the metrics of a concluded round were: means over its survivors, which only key holders open."""

    round: int
    survivors: int
    means: Mapping[str, float]


class OwnerView:
    """An owner's folder, opened for looking; `Owner.look` makes one. `close` it, or use `with`."""

    def __init__(
        self,
        folder: OwnerFolder,
        *,
        patience: Patience = DEFAULT,
        now: Callable[[], float] = time.time,
        stop: threading.Event | None = None,
    ) -> None:
        self._folder = folder
        self.path = folder.path
        self.federation, self.place = folder.federation, folder.place
        self._key = folder.key
        self._now = now
        try:
            self._line = EnrolmentLine(self.place.enrolment_address, self.place.ca, patience, stop)
        except BaseException:
            folder.close()
            raise

    def close(self) -> None:
        """Close the connection and unlock the folder."""
        self._line.close()
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Owner of {self.federation.name}>"

    # What is in force

    @property
    def public_key(self) -> bytes:
        """The owner's public key: the server's operator lists it, members pin it."""
        return self._key.public

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._folder.policy

    @property
    def roster(self) -> Roster:
        """The roster in force."""
        return self._folder.roster

    @property
    def plan(self) -> Plan | None:
        """The newest plan, if any."""
        return self._folder.plan

    @property
    def group_key(self) -> GroupKey:
        """The group key of the roster's epoch."""
        return self._folder.group_key(self.roster.epoch)

    def signed(self, kind: str) -> SignedDocument:
        """The newest policy, roster or plan, as it was signed."""
        return self._folder.signed(kind)

    # Who waits

    def _proof(self, verb: str, *fields: bytes) -> enrolment_pb2.OwnerProof:
        now = int(self._now())
        signature = prove_owner(self._key, verb, self.federation.id, now, *fields)
        return enrolment_pb2.OwnerProof(federation=self.federation.id, time=now, signature=signature)

    def invited(self) -> list[str]:
        """Names that have an open invitation."""
        return self._folder.invited()

    def pending(self, *, again_within: int = 0) -> list[Application]:
        """Requests that wait for an answer, each checked: signature, invitation, token, date.

        `again_within`: the owner asks again within so many seconds; applicants hear that somebody watches.
        """
        request = enrolment_pb2.ListJoinRequestsRequest(
            proof=self._proof("ListJoinRequests"), again_within=again_within
        )
        answer = self._line.call(self._line.stub.ListJoinRequests, request, what="listing the requests")
        found = [one for one in map(self._application, answer.pending) if one is not None]
        return sorted(found, key=lambda one: (one.member, one.request_id))

    def _application(self, pending: enrolment_pb2.ListJoinRequestsResponse.Pending) -> Application | None:
        try:
            body = decode_document(pending.body, JoinBody, "a join request")
        except Refused as refusal:
            # An honest aggregator relays none of these; one bad request mustn't hide the others.
            _log.warning("the aggregator relayed a join request that isn't one: %s", refusal.text)
            return None
        problem = ""
        try:
            check_request_signature(body.identity, pending.signature, pending.body)
            invitation = self._folder.invitation(body.id)
            if body.federation != self.federation.id:
                raise Refused(RefusalReason.POLICY, "it is for another federation")
            if invitation is None or token_id(invitation.token) != pending.token_id:
                raise Refused(RefusalReason.POLICY, "there is no such invitation")
            if self._now() > invitation.valid_until:
                raise Refused(RefusalReason.EXPIRED, "its invitation has expired")
            check_token(invitation.token, pending.token_mac, pending.body)
        except Refused as refusal:
            problem = refusal.text
        return Application(body.id, body.organisation, pending.request_id, body, problem)

    # What runs

    @property
    def rotation_unfinished(self) -> bool:
        """The keys have changed, and the plan doesn't go on under them yet."""
        return self.plan is not None and 0 < self._folder.plan_epoch < self.roster.epoch

    def round_running(self) -> bool:
        """Whether a round runs, as the aggregator says."""
        rounds = self.status().rounds
        return bool(rounds) and rounds[0].outcome.partition(":")[0].partition(" ")[0] in _RUNNING

    def status(self) -> enrolment_pb2.GetStatusResponse:
        """What the aggregator says is going on: members, rounds, steps. Nothing that is sealed."""
        request = enrolment_pb2.GetStatusRequest(proof=self._proof("GetStatus"))
        answer: enrolment_pb2.GetStatusResponse = self._line.call(
            self._line.stub.GetStatus, request, what="getting the status"
        )
        return answer

    def model(self) -> dict[str, Any]:
        """The newest model, opened with the group key, in the plan's kind of state dict."""
        plan = self.plan
        if plan is None:
            raise DocumentError("there is no plan yet; start one")
        framework: Literal["numpy", "torch"] = (
            "torch" if plan.settings.get(FRAMEWORK_SETTING) == "torch" else "numpy"
        )
        state = self._newest_state()
        return dress(state.layout, state.tensors(), framework)

    def history(self) -> list[RoundMetrics]:
        """The metrics of the plan's newest rounds, oldest first, opened from the newest training state.

        They travelled inside the sums; the aggregator never saw them. Fetches the sealed state: as many
        bytes as the model has.
        """
        plan = self.plan
        if plan is None:
            return []
        names = [metric.name for metric in plan.encoding.metrics]
        return [
            RoundMetrics(past.round, past.survivors, past.metrics(names))
            for past in self._newest_state().history
        ]

    def _newest_state(self) -> TrainingState:
        """The newest training state, verified as a member verifies it."""
        plan, policy = self.plan, self.policy
        if plan is None:
            raise DocumentError("there is no plan yet; start one")
        info, sealed = self._line.retry(self._owner_checkpoint, what="getting the checkpoint")
        claim = StateClaim.parse(info.claim)
        roster = self._folder.earlier_roster(info.roster)
        accept_state(
            claim,
            roster=roster,
            plan=plan,
            plan_digest=self.signed(plans.KIND).digest,
            n_min=policy.n_min,
            index=info.state_round,
        )
        return open_checkpoint(
            sealed,
            self._folder.group_key(roster.epoch),
            claim.h1,
            federation=self.federation.id,
            index=claim.index,
            digest=claim.digest,
        )

    def _owner_checkpoint(self) -> tuple[enrolment_pb2.CheckpointInfo, list[bytes]]:
        request = enrolment_pb2.GetOwnerCheckpointRequest(proof=self._proof("GetOwnerCheckpoint"))
        info: enrolment_pb2.CheckpointInfo | None = None
        pieces: list[bytes] = []
        for part in self._line.stub.GetOwnerCheckpoint(request):
            if part.WhichOneof("part") == "info":
                info = part.info
            else:
                pieces.append(part.data)
        if info is None:
            raise StateMismatch("the aggregator sent a checkpoint without saying of which state")
        return info, pieces
