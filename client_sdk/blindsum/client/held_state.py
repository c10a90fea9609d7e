"""The training state that a member holds: current, pending, or fetched from a verified checkpoint."""

import hashlib
import logging
from pathlib import Path

from blindsum.client.member_folder import MemberFolder, StateMark
from blindsum.client.owner_documents import OwnerDocuments, RosterMovedOn
from blindsum.client.private_files import write_private
from blindsum.client.progress import OnProgress
from blindsum.client.transport import MemberLine
from blindsum.crypto.encoding.vector import VectorPlan
from blindsum.crypto.errors import RefusalReason, Refused, StateMismatch
from blindsum.crypto.primitives.derivation import labelled_hash, same
from blindsum.crypto.trust.acceptance import StateClaim, accept_state
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.training_state import TrainingState, open_checkpoint, seal_checkpoint
from blindsum.proto.v1 import round_pb2

_log = logging.getLogger("blindsum.client")


def chain_of(plan: Plan) -> bytes:
    """Names the chain of training states that a plan goes on with: its name and its S_0."""
    return labelled_hash("state chain", plan.name.encode(), plan.initial_state)


def checkpoint_limit(plan: Plan) -> int:
    """The most bytes that a sealed state of a plan may have: values, moments, bookkeeping."""
    return 64 * plan.dimension + 8192 * plan.tensors + (1 << 20)


class HeldState:
    """S_r at this member, in memory and on disk.

    The current state is one that the federation agreed on. The pending one was computed here after a
    round, and becomes current when the aggregator says that most survivors signed the same.
    """

    def __init__(
        self, folder: MemberFolder, line: MemberLine, documents: OwnerDocuments, report: OnProgress
    ) -> None:
        self._folder = folder
        self._line = line
        self._documents = documents
        self._report = report
        self._state: TrainingState | None = None

    def current(self) -> TrainingState:
        """The current state. Raises `StateMismatch` when there is none yet."""
        state = self._state
        if state is None:
            mark = self._folder.state_mark("current")
            if mark is None:
                raise StateMismatch("this member holds no training state yet")
            state = self._state = TrainingState.parse(self._folder.read_state(mark))
        return state

    def is_at(self, plan: Plan, digest: bytes) -> bool:
        """Whether the current state is the one of this digest in a plan's chain."""
        mark = self._folder.state_mark("current")
        return mark is not None and mark.chain == chain_of(plan) and same(mark.digest, digest)

    # Between rounds

    def ensure(self, index: int, digest: bytes) -> None:
        """Have the state that the federation goes on from, where this member missed it.

        A state of this or a later index is kept: the check of the header compares the digests. Raises
        `StateMismatch`, `OpeningFailed`, `Refused` or `DocumentError` for a checkpoint that isn't proven.
        """
        plan = self._documents.plan
        assert plan is not None
        mark = self._folder.state_mark("current")
        if mark is None or mark.chain != chain_of(plan) or mark.index < index:
            self._fetch(plan, index, digest)

    def _fetch(self, plan: Plan, index: int, digest: bytes) -> None:
        documents, line, folder = self._documents, self._line, self._folder
        policy = documents.policy
        assert policy is not None
        request = round_pb2.GetCheckpointRequest()
        info = line.call(line.stub.GetCheckpoint, request, what="getting the checkpoint").info
        if info.state_round != index or not same(info.state, digest):
            raise RosterMovedOn("the aggregator's checkpoint isn't of the state that the round goes on from")
        claim = StateClaim.parse(info.claim)
        roster = documents.earlier_roster(info.roster)
        key = folder.group_key(roster.epoch)
        assert key is not None
        accept_state(
            claim,
            roster=roster,
            plan=plan,
            plan_digest=documents.plan_digest,
            n_min=policy.n_min,
            index=index,
        )
        if not same(claim.digest, digest):
            raise StateMismatch("the checkpoint's claim is about another state than the round goes on from")
        if info.total > checkpoint_limit(plan):
            raise Refused(RefusalReason.WRONG_SIZE, "the checkpoint is larger than any state of this plan")
        pieces = line.download(
            round_pb2.BULK_KIND_CHECKPOINT,
            index,
            info.total,
            what="the checkpoint",
            on_bytes=lambda done, total: self._report("checkpoint", done, total),
        )
        state = open_checkpoint(
            pieces, key, claim.h1, federation=folder.pin.federation, index=index, digest=digest
        )
        if not same(state.layout.digest(key), plan.layout):
            raise StateMismatch("the checkpoint's tensors aren't those of the plan; ask the owner")
        VectorPlan.of(plan, state.layout)
        folder.keep_state("current", StateMark(chain_of(plan), index, digest, 0), state.pieces())
        self._state = state

    # After a round

    def pending_of(self, number: int) -> StateMark | None:
        """The mark of the state that a round led to here, as long as nothing was agreed on."""
        mark = self._folder.state_mark("pending")
        return mark if mark is not None and mark.round == number else None

    def was_adopted(self, number: int) -> bool:
        """Whether the current state is the one that a round led to."""
        mark = self._folder.state_mark("current")
        return mark is not None and mark.round == number

    def keep_pending(self, state: TrainingState, plan: Plan, key: GroupKey, number: int) -> None:
        """Store the state that a round led to, durably."""
        mark = StateMark(chain_of(plan), state.index, state.digest(key), number)
        self._folder.keep_state("pending", mark, state.pieces())

    def settle(self, notice: round_pb2.WatchResponse) -> bool:
        """Adopt or drop the pending state by what the federation agreed on; True if it did either.

        Raises `StateMismatch` when the others agreed on another state than this member computed.
        """
        pending, plan = self._folder.state_mark("pending"), self._documents.plan
        if pending is None or plan is None:
            return False
        said, same_place = (
            notice.round,
            notice.state_round == pending.index and chain_of(plan) == pending.chain,
        )
        if same_place and same(notice.state, pending.digest):
            self._folder.adopt_pending()
            self._state = None
            return True
        if same_place or (said.number == pending.round and said.state == round_pb2.ROUND_STATE_CONCLUDED):
            raise StateMismatch(
                f"state {pending.index} that this member computed isn't the one that the others signed; the "
                "member stops. Compare transcript digests with other members"
            )
        aborted = said.number == pending.round and said.state == round_pb2.ROUND_STATE_ABORTED
        if aborted or said.number > pending.round:
            self._folder.drop_pending()
            return True
        return False

    def send_checkpoint(self, mark: StateMark, key: GroupKey, h1: bytes) -> None:
        """Upload a pending state, sealed to the members."""
        state = TrainingState.parse(self._folder.read_state(mark))
        path = self._folder.path / "checkpoint.bin"
        try:
            write_private(path, seal_checkpoint(state, key, h1))
            begin = round_pb2.BeginUploadRequest(
                round=mark.round,
                kind=round_pb2.BULK_KIND_CHECKPOINT,
                total=path.stat().st_size,
                digest=_file_digest(path),
                reply=mark.digest,
            )
            self._line.upload(begin, path, lambda done, total: self._report("checkpoint", done, total))
        except Refused as refusal:
            _log.info("the checkpoint wasn't taken: %s", refusal)
        finally:
            path.unlink(missing_ok=True)


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
