"""The aggregator's part in a masking round (protocols.md 3; Bonawitz et al., CCS 2017, figure 4).

It holds no secret and draws no randomness. What it rebuilds at the end, self seeds of survivors and mask
roots of the dropped, opens sums that stay sealed under K (protocols.md 1.7).
"""

import hashlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
from blindsum.crypto.canonical import Message, encode_message
from blindsum.crypto.errors import ParameterRefused, RefusalReason, Refused
from blindsum.crypto.primitives.key_agreement import AgreementKey, is_small_order
from blindsum.crypto.primitives.mask_expansion import LANE_BYTES, MaskSet
from blindsum.crypto.primitives.secret_sharing import SHARE_BYTES, LagrangeBasis, share_value
from blindsum.crypto.primitives.signing import require_signature
from blindsum.crypto.schemes.base import Abort, RoundTerms, StepName
from blindsum.crypto.schemes.masking.bitmaps import Flags, to_bitmap
from blindsum.crypto.schemes.masking.cohort import Cohort
from blindsum.crypto.schemes.masking.frames import FRAME_LANES, LaneArithmetic, LaneBuffers, bulk_layout
from blindsum.crypto.schemes.masking.graph import Positions
from blindsum.crypto.schemes.masking.member import mask_pair, pair_mask_key, self_mask_key
from blindsum.crypto.schemes.masking.messages import (
    BOX_BYTES,
    COMMITMENTS_BYTES,
    KEYS_BYTES,
    OPENED_BYTES,
    ROOT,
    SELF,
    Advertisement,
    AdvertiseRequest,
    BoxComplaint,
    Confirmation,
    ConfirmRequest,
    Result,
    Revealed,
    RevealRequest,
    SealedUpload,
    ShareRequest,
    Shares,
    UploadRequest,
    confirm_root,
    decode_reply,
    leaf_hash,
    self_commitment,
    share_commitment,
)

_REPLIES: dict[StepName, tuple[type[Message], ...]] = {
    "advertise": (Advertisement,),
    "share": (Shares,),
    "upload": (SealedUpload, BoxComplaint),
    "confirm": (Confirmation,),
    "reveal": (Revealed,),
}


class MaskingAggregator:
    """One round at the aggregator. `Scheme.aggregator` makes it."""

    def __init__(self, terms: RoundTerms, exclude: frozenset[str]) -> None:
        self._terms = terms
        self._h0 = terms.bound.h0
        self._roster = terms.roster
        self.layout = bulk_layout(terms.bound.header)
        self._step: StepName | None = "advertise"
        self._abort: Abort | None = None
        self._named: dict[str, str] = {}
        self._participants = tuple(m.id for m in terms.roster.members if m.id not in exclude)
        self._asked = frozenset(self._participants)
        self._replied: set[str] = set()
        self._seen: dict[str, set[bytes]] = {}
        self._checked: dict[str, tuple[bytes, Message]] = {}

        self._entries: dict[int, bytes] = {}
        self._public_keys: set[bytes] = set()
        self._cohort: Cohort | None = None
        self._positions: dict[str, int] = {}
        self._by_position: list[bytes] = []
        self._table: Positions = np.empty((0, 0), dtype=np.int64)
        self._sharing = self._alive = self._confirmed = np.zeros(0, dtype=np.bool_)
        self._root = b""
        self._confirm_request = b""
        self._shares: dict[int, Shares] = {}
        self._commitments: dict[int, bytes] = {}
        self._confirmations: dict[int, bytes] = {}
        self._revealed: dict[int, bytes] = {}
        self._masks: MaskSet | None = None
        self._buffers = LaneBuffers()
        self._result = b""

    # -- the interface of AggregatorRound --------------------------------------------------------

    @property
    def step(self) -> StepName | None:
        """The open step; None once the round is finished or aborted."""
        return self._step

    @property
    def participants(self) -> tuple[str, ...]:
        """Who is asked in the open step, in roster order."""
        return self._participants

    @property
    def replied(self) -> frozenset[str]:
        """Whose reply to the open step was accepted."""
        return frozenset(self._replied)

    @property
    def quorum(self) -> int:
        """Replies without which the open step can only close by aborting.

        In a ring more may be needed, because t live neighbours must be left to every single member.
        """
        n_min = self._terms.bound.header.n_min
        if self._cohort is None:
            return n_min
        if self._step in ("share", "upload"):
            return max(n_min, self._cohort.t + 1)
        return self._cohort.t + 1

    @property
    def abort(self) -> Abort | None:
        """Set when the round has ended without a sum."""
        return self._abort

    @property
    def named(self) -> Mapping[str, str]:
        """Members found at fault so far, with the reason."""
        return MappingProxyType(self._named)

    @property
    def h1(self) -> bytes:
        """h1 of the round, known once the cohort is fixed."""
        return self._known.h1

    @property
    def survivors(self) -> tuple[str, ...]:
        """The survivor set in roster order; empty until the upload step closes."""
        return self._known.ids(self._alive) if len(self._alive) else ()

    def request(self, member: str) -> bytes:
        """The open step's request for a participant: always the same bytes."""
        if self._step is None:
            raise Refused(RefusalReason.CLOSED, "the round has ended")
        if member not in self._asked:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} isn't asked in {self._step}")
        if self._step == "advertise":
            return encode_message(AdvertiseRequest(self._h0))
        position = self._positions[member]
        if self._step == "share":
            entries = b"".join(self._by_position[other] for other in self._table[position].tolist())
            return encode_message(ShareRequest(self._known.members, self._known.leaves, entries))
        if self._step == "upload":
            return self._upload_request(position)
        if self._step == "confirm":
            return self._confirm_request
        return self._reveal_request(position)

    def check_reply(self, member: str, reply: bytes) -> bool:
        """What `accept` checks, changing nothing; True when bulk must follow."""
        if self._repeated(member, reply):
            return False
        return isinstance(self._verified(member, reply), SealedUpload)

    def expected_digest(self, reply: bytes) -> bytes:
        """The upload digest that an upload reply promises. Raises `Refused` if it promises none."""
        message = decode_reply(reply, (SealedUpload,), "the upload reply")
        assert isinstance(message, SealedUpload)
        return message.digest

    def accept(self, member: str, reply: bytes) -> bool:
        """Check a reply to the open step and record it; False if the same bytes were there already.

        A complaint aborts the round, without both sides in the retry. Raises `Refused`.
        """
        if self._repeated(member, reply):
            return False
        message = self._verified(member, reply)
        del self._checked[member]
        self._seen.setdefault(member, set()).add(hashlib.sha256(reply).digest())
        self._replied.add(member)
        self._record(member, message)
        return True

    def close(self) -> None:
        """Close the open step: on to the next one, to the end, or to `abort`."""
        if self._step is None:
            raise Refused(RefusalReason.CLOSED, "the round has ended")
        self._checked.clear()
        if len(self._replied) < self.quorum:
            self._give_up(
                f"{len(self._replied)} replies to {self._step} of {len(self._participants)} asked; "
                f"{self.quorum} are needed"
            )
            return
        if self._step == "advertise":
            self._close_advertise()
        elif self._step == "share":
            self._close_share()
        elif self._step == "upload":
            self._close_upload()
        elif self._step == "confirm":
            self._close_confirm()
        else:
            self._close_reveal()

    def arithmetic(self) -> LaneArithmetic:
        """The frame arithmetic."""
        return LaneArithmetic(self._terms.bound.header)

    def finish_frame(self, index: int, total: bytes | bytearray) -> bytes:
        """Frame `index` of the published sum: without self masks and the dropped members' masks."""
        if self._masks is None:
            raise Refused(RefusalReason.WRONG_STEP, "the round isn't finished")
        if not 0 <= index < self.layout.frames or len(total) != self.layout.sum_bytes(index):
            raise Refused(RefusalReason.WRONG_SIZE, f"the sum of frame {index} has a wrong size")
        with self._buffers.borrow(len(total) // LANE_BYTES) as lanes:
            lanes[:] = np.frombuffer(total, dtype="<u8")
            self._masks.apply(lanes, index * FRAME_LANES)
            return lanes.tobytes()

    def result(self) -> bytes:
        """The result message: U2, U3 and confirmations of t members."""
        if self._masks is None:
            raise Refused(RefusalReason.WRONG_STEP, "the round isn't finished")
        return self._result

    # -- replies -------------------------------------------------------------------------------------

    @property
    def _known(self) -> Cohort:
        if self._cohort is None:
            raise Refused(RefusalReason.WRONG_STEP, "the cohort isn't fixed yet")
        return self._cohort

    def _repeated(self, member: str, reply: bytes) -> bool:
        """Whether these bytes were accepted before. Raises `Refused` where no reply is wanted."""
        if member not in self._roster.position:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, f"{member!r} isn't in the roster")
        if hashlib.sha256(reply).digest() in self._seen.get(member, ()):
            return True
        if self._step is None:
            raise Refused(RefusalReason.CLOSED, "the round has ended")
        if member not in self._asked:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} isn't asked in {self._step}")
        if member in self._replied:
            raise Refused(RefusalReason.CONFLICT, f"{member} gave another reply to {self._step} before")
        return False

    def _verified(self, member: str, reply: bytes) -> Message:
        """The decoded reply, its signature checked once however often it is asked."""
        digest = hashlib.sha256(reply).digest()
        known = self._checked.get(member)
        if known is None or known[0] != digest:
            known = (digest, self._verify(member, reply))
            self._checked[member] = known
        elif isinstance(known[1], Advertisement):
            self._check_room(known[1].entry)  # others may have been accepted in between
        return known[1]

    def _verify(self, member: str, reply: bytes) -> Message:
        assert self._step is not None
        what = f"{member}'s reply to {self._step}"
        message = decode_reply(reply, _REPLIES[self._step], what)
        identity, name = self._roster.entry(member).identity, member.encode()
        if isinstance(message, Advertisement):
            keys, signature = message.entry[:KEYS_BYTES], message.entry[KEYS_BYTES:]
            self._check_room(message.entry)
            require_signature(identity, signature, what, "masking advertise", self._h0, name, keys)
            if is_small_order(keys[:32]) or is_small_order(keys[32:64]):
                raise Refused(RefusalReason.OUT_OF_RANGE, f"a key in {what} is of small order")
            return message
        cohort, position = self._known, self._positions[member]
        signed: tuple[str, *tuple[bytes, ...]]
        if isinstance(message, Shares):
            if len(message.commitments) != COMMITMENTS_BYTES * cohort.k:
                raise Refused(RefusalReason.WRONG_SIZE, f"{what} needs commitments for {cohort.k} neighbours")
            if len(message.boxes) != BOX_BYTES * cohort.k:
                raise Refused(RefusalReason.WRONG_SIZE, f"{what} needs boxes for {cohort.k} neighbours")
            signed = ("masking share", cohort.h1, name, message.commitments, message.boxes)
        elif isinstance(message, SealedUpload):
            signed = ("masking upload", cohort.h1, name, message.digest)
        elif isinstance(message, BoxComplaint):
            if message.accused not in self._table[position][self._sharing[self._table[position]]]:
                raise Refused(RefusalReason.OUT_OF_RANGE, f"{what} accuses someone who sent it nothing")
            signed = ("masking complaint", cohort.h1, name, cohort.id(message.accused).encode())
        elif isinstance(message, Confirmation):
            signed = ("masking confirm", cohort.h1, self._root)
        else:
            assert isinstance(message, Revealed)
            if len(message.shares) != OPENED_BYTES * int(self._sharing[self._table[position]].sum()):
                raise Refused(RefusalReason.WRONG_SIZE, f"{what} needs one share for each live neighbour")
            signed = ("masking reveal", cohort.h1, name, self._root, message.shares)
        require_signature(identity, message.signature, what, *signed)
        return message

    def _check_room(self, entry: bytes) -> None:
        if len(self._entries) >= self._terms.bound.header.n_max:
            raise Refused(RefusalReason.LIMIT, "the cohort is full")
        keys = {entry[:32], entry[32:64]}
        if len(keys) < 2 or keys & self._public_keys:
            raise Refused(RefusalReason.CONFLICT, "a key of this advertisement was advertised before")

    def _record(self, member: str, message: Message) -> None:
        if isinstance(message, Advertisement):
            self._entries[self._roster.position[member]] = message.entry
            self._public_keys |= {message.entry[:32], message.entry[32:64]}
            return
        position = self._positions[member]
        if isinstance(message, Shares):
            self._shares[position] = message
        elif isinstance(message, BoxComplaint):
            accused = self._known.id(message.accused)
            self._named[accused] = f"{member} says that the box from {accused} is bad"
            self._named[member] = f"{member} complained about the box from {accused}"
            self._give_up(f"{member} complained about the box from {accused}", (member, accused))
        elif isinstance(message, Confirmation):
            self._confirmations[position] = message.signature
        elif isinstance(message, Revealed):
            self._revealed[position] = message.shares

    # -- closing steps -------------------------------------------------------------------------------

    def _give_up(self, reason: str, exclude: Iterable[str] = ()) -> None:
        self._abort = Abort(reason, tuple(sorted(exclude)))
        self._forget_shares()
        self._open(None, ())

    def _forget_shares(self) -> None:
        self._shares = {}
        self._commitments = {}
        self._revealed = {}

    def _open(self, step: StepName | None, participants: tuple[str, ...]) -> None:
        self._step = step
        self._participants = participants
        self._asked = frozenset(participants)
        self._replied = set()

    def _flags(self, members: Iterable[str]) -> Flags:
        flags: Flags = np.zeros(self._known.n, dtype=np.bool_)
        flags[[self._positions[member] for member in members]] = True
        return flags

    def _close_advertise(self) -> None:
        indices = sorted(self._entries)
        members = np.array(indices, dtype="<u4").tobytes()
        leaves = b"".join(leaf_hash(self._h0, index, self._entries[index]) for index in indices)
        try:
            cohort = Cohort(self._terms, members, leaves)
        except ParameterRefused as error:
            self._give_up(str(error))
            return
        self._cohort = cohort
        self._table = cohort.graph.table()
        self._by_position = [self._entries[index] for index in indices]
        self._entries = {}
        names = tuple(self._roster.members[index].id for index in indices)
        self._positions = {name: position for position, name in enumerate(names)}
        self._open("share", names)

    def _close_share(self) -> None:
        cohort = self._known
        sharing = self._flags(self._replied)
        # A member with fewer than t live neighbours would refuse to upload, and its secrets couldn't be
        # rebuilt: it is left out of U2, which may leave others with too few.
        while True:
            lonely = sharing & (sharing[self._table].sum(axis=1) < cohort.t)
            if not lonely.any():
                break
            sharing &= ~lonely
        self._sharing = sharing
        if int(sharing.sum()) < self.quorum:
            self._give_up(f"too few members have {cohort.t} live neighbours after the share step")
            return
        self._open("upload", cohort.ids(sharing))

    def _close_upload(self) -> None:
        cohort = self._known
        self._alive = self._flags(self._replied)
        if self._too_few(self._alive):
            self._give_up(f"some member has fewer than {cohort.t} neighbours among the survivors")
            return
        # The boxes are delivered; only the commitments are needed from here on.
        self._commitments = {position: shares.commitments for position, shares in self._shares.items()}
        self._shares = {}
        sharers, survivors = to_bitmap(self._sharing), to_bitmap(self._alive)
        self._confirm_request = encode_message(ConfirmRequest(sharers, survivors))
        self._root = confirm_root(cohort.h1, sharers, survivors)
        self._open("confirm", cohort.ids(self._alive))

    def _close_confirm(self) -> None:
        cohort = self._known
        self._confirmed = self._flags(self._replied)
        asked = self._confirmed & (self._confirmed[self._table].sum(axis=1) >= cohort.t)
        if self._too_few(asked):
            self._give_up(f"some member has fewer than {cohort.t} neighbours that can reveal")
            return
        self._open("reveal", cohort.ids(asked))

    def _too_few(self, able: Flags) -> bool:
        """Whether some member of U2 has fewer than t neighbours among `able`."""
        return bool((able[self._table[self._sharing]].sum(axis=1) < self._known.t).any())

    def _upload_request(self, position: int) -> bytes:
        live = self._sharing[self._table[position]]
        dealers = self._table[position][live]
        slots = (self._table[dealers] < position).sum(axis=1)
        pledges, boxes = [], []
        for dealer, slot in zip(dealers.tolist(), slots.tolist(), strict=True):
            shares = self._shares[dealer]
            pledges.append(shares.commitments[COMMITMENTS_BYTES * slot : COMMITMENTS_BYTES * (slot + 1)])
            boxes.append(shares.boxes[BOX_BYTES * slot : BOX_BYTES * (slot + 1)])
        return encode_message(UploadRequest(to_bitmap(live), b"".join(pledges), b"".join(boxes)))

    def _reveal_request(self, position: int) -> bytes:
        row = self._table[position]
        chosen = np.flatnonzero(self._confirmed[row])[: self._known.t]
        signers = np.zeros(self._known.k, dtype=np.bool_)
        signers[chosen] = True
        signatures = b"".join(self._confirmations[other] for other in row[chosen].tolist())
        return encode_message(RevealRequest(to_bitmap(signers), signatures))

    # -- the end -------------------------------------------------------------------------------------

    def _close_reveal(self) -> None:
        cohort = self._known
        good = self._good_shares()
        short = [dealer for dealer, shares in good.items() if len(shares) < cohort.t]
        if short:
            self._give_up(f"{len(short)} secrets have fewer than {cohort.t} good shares", tuple(self._named))
            return
        secrets = self._rebuilt(good)
        added, subtracted = self._remaining_masks(secrets)
        if self._abort is not None:
            return
        signers = np.zeros(cohort.n, dtype=np.bool_)
        signers[np.flatnonzero(self._confirmed)[: cohort.t]] = True
        signatures = b"".join(self._confirmations[who] for who in np.flatnonzero(signers).tolist())
        self._result = encode_message(
            Result(to_bitmap(self._sharing), to_bitmap(self._alive), to_bitmap(signers), signatures)
        )
        self._masks = MaskSet(added, subtracted)
        self._forget_shares()
        self._open(None, ())

    def _good_shares(self) -> dict[int, list[tuple[int, int]]]:
        """For each dealer in U2 the (point, share) pairs that match its commitments, by position.

        Whoever sent another share is named, and its share left out.
        """
        cohort = self._known
        good: dict[int, list[tuple[int, int]]] = {}
        revealing = np.zeros(cohort.n, dtype=np.bool_)
        revealing[list(self._revealed)] = True
        slots = self._sharing[self._table].cumsum(axis=1) - 1
        for dealer in np.flatnonzero(self._sharing).tolist():
            kind, offset = (SELF, 0) if self._alive[dealer] else (ROOT, 32)
            row = self._table[dealer]
            mine = np.flatnonzero(revealing[row])
            receivers = row[mine]
            # A receiver's shares are in the order of its own live neighbours.
            theirs = slots[receivers, (self._table[receivers] < dealer).sum(axis=1)]
            pledges = self._commitments[dealer]
            shares = good.setdefault(dealer, [])
            for slot, receiver, place in zip(mine.tolist(), receivers.tolist(), theirs.tolist(), strict=True):
                opened = self._revealed[receiver][OPENED_BYTES * place : OPENED_BYTES * (place + 1)]
                start = COMMITMENTS_BYTES * slot + offset
                value = share_value(opened[:SHARE_BYTES])
                pledge = share_commitment(cohort.h1, dealer, receiver, kind, opened)
                if value is None or pledge != pledges[start : start + 32]:
                    name = cohort.id(receiver)
                    self._named[name] = f"{name} revealed a share that {cohort.id(dealer)} didn't give it"
                else:
                    shares.append((receiver + 1, value))
        return good

    def _rebuilt(self, good: dict[int, list[tuple[int, int]]]) -> dict[int, bytes | None]:
        """The secret of each dealer from its first t good shares; one Lagrange basis a set of points."""
        by_points: dict[tuple[int, ...], list[int]] = {}
        for dealer, shares in good.items():
            points = tuple(point for point, _ in shares[: self._known.t])
            by_points.setdefault(points, []).append(dealer)
        secrets: dict[int, bytes | None] = {}
        for points, dealers in by_points.items():
            basis = LagrangeBasis(points)
            for dealer in dealers:
                secrets[dealer] = basis.combine([share for _, share in good[dealer][: self._known.t]])
        return secrets

    def _remaining_masks(self, secrets: dict[int, bytes | None]) -> tuple[list[bytes], list[bytes]]:
        """Keys of the mask streams to add to and subtract from the sum; aborts on a wrong secret."""
        cohort = self._known
        added: list[bytes] = []
        subtracted: list[bytes] = []
        for dealer, secret in sorted(secrets.items()):
            entry = self._by_position[dealer]
            if self._alive[dealer]:
                if secret is None or self_commitment(self._h0, secret) != entry[64:96]:
                    self._wrong_secret(dealer)
                    return [], []
                subtracted.append(self_mask_key(secret, cohort.h1))
                continue
            pair = mask_pair(secret, self._h0) if secret is not None else None
            if pair is None or pair.public != entry[32:64]:
                self._wrong_secret(dealer)
                return [], []
            self._dropped_masks(dealer, pair, added, subtracted)
        return added, subtracted

    def _dropped_masks(
        self, dealer: int, pair: AgreementKey, added: list[bytes], subtracted: list[bytes]
    ) -> None:
        row = self._table[dealer]
        for survivor in row[self._alive[row]].tolist():
            low, high = min(dealer, survivor), max(dealer, survivor)
            key = pair_mask_key(pair, self._by_position[survivor][32:64], self._known.h1, low, high)
            # The survivor added the mask if it stands below; it is taken back.
            (subtracted if survivor < dealer else added).append(key)

    def _wrong_secret(self, dealer: int) -> None:
        name = self._known.id(dealer)
        self._named[name] = f"{name} shared a secret that isn't the one it advertised"
        self._give_up(self._named[name], (name,))
