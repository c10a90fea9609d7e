"""A member's part in a masking round (protocols.md 3; Bonawitz et al., CCS 2017, figure 4)."""

import hashlib
from typing import Annotated, Literal, NoReturn

import msgspec
import numpy as np
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.errors import ParameterRefused, RefusalReason, Refused, ServerViolation
from blindsum.crypto.primitives.derivation import Random, derive_key
from blindsum.crypto.primitives.key_agreement import AgreementKey
from blindsum.crypto.primitives.mask_expansion import MaskSet, mask_key
from blindsum.crypto.primitives.one_time_box import open_box, seal_once
from blindsum.crypto.primitives.secret_sharing import (
    COEFFICIENT_BYTES,
    SHARE_BYTES,
    share_value,
    split,
)
from blindsum.crypto.primitives.signing import verify
from blindsum.crypto.schemes.base import Complaint, MemberKeys, RoundTerms, StepName
from blindsum.crypto.schemes.masking.bitmaps import Flags, from_bitmap
from blindsum.crypto.schemes.masking.cohort import Cohort
from blindsum.crypto.schemes.masking.frames import MaskingOpener, MaskingProtector, group_mask_key
from blindsum.crypto.schemes.masking.messages import (
    BOX_BYTES,
    COMMITMENTS_BYTES,
    CONTENT_BYTES,
    ENTRY_BYTES,
    KEYS_BYTES,
    OPENED_BYTES,
    ROOT,
    SALT_BYTES,
    SELF,
    SIGNATURE_BYTES,
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
    decode_request,
    leaf_hash,
    records,
    self_commitment,
    share_commitment,
    u32,
)
from blindsum.crypto.trust.documents import Digest

Phase = Literal[
    "advertise", "share", "upload", "confirm", "reveal", "done", "complained", "stopped", "erased"
]
"""The step it answers next, or why it answers none: it revealed, complained, saw a lie, was erased."""

_STEPS: tuple[StepName, ...] = ("advertise", "share", "upload", "confirm", "reveal")


class KeptReply(Message, frozen=True):
    """What was answered in a step, and the SHA-256 of the request that it answered."""

    request: Digest
    reply: bytes


class MemberSnapshot(Message, frozen=True):
    """Everything a member's machine knows; holds secrets."""

    version: Literal[1]
    h0: Digest
    member: str
    phase: Phase
    violation: str
    secrets: bytes
    entry: bytes
    members: bytes
    leaves: bytes
    mask_keys: bytes
    box_keys: bytes
    live: bytes
    received: bytes
    upload_request: bytes
    sharers: bytes
    survivors: bytes
    accused: str
    replies: Annotated[dict[StepName, KeptReply], msgspec.Meta(max_length=len(_STEPS))]


def round_secrets(random: Random) -> bytes:
    """Channel secret, mask root rho, self seed b and dealer seed: 4 x 32 fresh bytes."""
    return b"".join(random(32) for _ in range(4))


def mask_pair(root: bytes, h0: bytes) -> AgreementKey:
    """The mask key pair S that follows from the mask root rho."""
    return AgreementKey(derive_key(root, "masking mask key", h0))


def pair_mask_key(own: AgreementKey, public: bytes, h1: bytes, low: int, high: int) -> bytes:
    """The AES key of the pairwise mask of the members at two positions, low < high."""
    seed = derive_key(own.exchange(public), "masking pair seed", h1, u32(low), u32(high))
    return mask_key(seed, "masking pair", h1)


def self_mask_key(seed: bytes, h1: bytes) -> bytes:
    """The AES key of a member's self mask."""
    return mask_key(seed, "masking self", h1)


class MaskingMember:
    """One member's machine. `Scheme.member` and `Scheme.restore_member` make it."""

    def __init__(self, terms: RoundTerms, keys: MemberKeys, secrets: bytes) -> None:
        self._terms = terms
        self._h0 = terms.bound.h0
        self._index = terms.roster.position[keys.member]
        self._keys = keys
        self._phase: Phase = "advertise"
        self._violation = ""
        self._secrets = secrets
        self._entry = b""
        self._cohort: Cohort | None = None
        self._mask_keys = b""
        self._box_keys = b""
        self._live = b""
        self._received = b""
        self._upload_request = b""
        self._protector: MaskingProtector | None = None
        self._sharers = b""
        self._survivors = b""
        self._accused = ""
        self._replies: dict[StepName, KeptReply] = {}

    def __repr__(self) -> str:
        return f"<MaskingMember {self._keys.member} at {self._phase}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a member's machine can't be pickled; use snapshot()")

    # -- the interface of MemberRound ------------------------------------------------------------

    @property
    def waiting_for(self) -> StepName | None:
        """The step whose request it answers next; None once nothing more is asked of it."""
        return next((step for step in _STEPS if step == self._phase), None)

    def answer(self, step: StepName, request: bytes) -> bytes:
        """The reply to advertise, share, confirm or reveal.

        The same request again gets the same bytes. Another one for a step already answered, or one
        that fails a check, raises `ServerViolation`, and the machine has stopped.
        """
        if step == "upload":
            raise Refused(RefusalReason.WRONG_STEP, "the upload step has begin_upload and seal_upload")
        kept = self._answered(step, request)
        if kept is not None:
            return kept
        if step == "advertise":
            reply = self._advertise(request)
        elif step == "share":
            reply = self._share(request)
        elif step == "confirm":
            reply = self._confirm(request)
        else:
            reply = self._reveal(request)
        self._keep(step, request, reply)
        return reply

    def begin_upload(self, request: bytes) -> MaskingProtector | Complaint:
        """Open and check every box; the protector masks each frame once.

        Until `seal_upload` the same request gets the same protector. A machine restored from a snapshot
        that was taken in between refuses: masks are never applied to a second encoding.
        """
        if self._phase == "complained" and self._replies["upload"].request == _digest(request):
            return Complaint(self._replies["upload"].reply, self._accused)
        if self._answered("upload", request) is not None:
            raise Refused(RefusalReason.WRONG_STEP, "this upload was sealed; resend the stored bytes")
        if self._upload_request:
            if self._upload_request != _digest(request):
                raise self._stop("second_request", "the aggregator asked for a second upload")
            if self._protector is None:
                raise Refused(
                    RefusalReason.CONFLICT,
                    "this upload was begun before a restart; seal it if all of its frames were stored",
                )
            return self._protector
        return self._upload(request)

    def seal_upload(self, digest: bytes) -> bytes:
        """The signed reply that promises the bulk stream of `digest`, once every frame was protected."""
        if len(digest) != 32:
            raise Refused(RefusalReason.WRONG_SIZE, "an upload digest has 32 bytes")
        kept = self._replies.get("upload")
        if kept is not None and self._phase not in ("complained", "stopped", "erased"):
            if decode_message(kept.reply, SealedUpload, "the stored upload").digest != digest:
                raise Refused(RefusalReason.CONFLICT, "another upload was sealed in this round")
            return kept.reply
        if self._phase != "upload" or not self._upload_request:
            raise Refused(RefusalReason.WRONG_STEP, "there is no upload to seal")
        if self._protector is not None:
            if not self._protector.complete:
                raise Refused(RefusalReason.WRONG_STEP, "some frames haven't been protected yet")
            self._protector.forget()
            self._protector = None
        signature = self._keys.identity.sign("masking upload", self._h1, self._name, digest)
        reply = encode_message(SealedUpload(digest, signature))
        self._replies["upload"] = KeptReply(self._upload_request, reply)
        self._phase = "confirm"
        return reply

    def open_sum(self, result: bytes) -> MaskingOpener:
        """Check the result's bitmaps and signatures; also for a member that was dropped after sharing."""
        if self._phase == "erased":
            raise Refused(RefusalReason.CLOSED, "this round was erased")
        if self._phase == "stopped":
            raise ServerViolation(self._violation, "this round failed a check")
        if self._cohort is None:
            raise Refused(RefusalReason.WRONG_STEP, "this member left before the cohort was fixed")
        message = decode_message(result, Result, "the result message")
        cohort = self._cohort
        survivors = self._survivor_set(message.sharers, message.survivors)
        signers = from_bitmap(message.signers, cohort.n, "the signers")
        if self._survivors and (message.sharers, message.survivors) != (self._sharers, self._survivors):
            raise self._stop("result_survivors", "the result is of another survivor set than was confirmed")
        if (signers & ~survivors).any() or int(signers.sum()) < cohort.t:
            raise self._stop("result_signers", "too few survivors confirmed the survivor set")
        if "reveal" not in self._replies:  # else t neighbours' signatures over the same root were checked
            root = confirm_root(cohort.h1, message.sharers, message.survivors)
            self._check_confirmations(signers.nonzero()[0], message.signatures, root, "result_signature")
        return MaskingOpener(self._terms.bound.header, cohort.h1, cohort.ids(survivors), self._keys.group_key)

    def snapshot(self) -> bytes:
        """Versioned bytes that hold secrets."""
        cohort = self._cohort
        return encode_message(
            MemberSnapshot(
                version=1,
                h0=self._h0,
                member=self._keys.member,
                phase=self._phase,
                violation=self._violation,
                secrets=self._secrets,
                entry=self._entry,
                members=cohort.members if cohort else b"",
                leaves=cohort.leaves if cohort else b"",
                mask_keys=self._mask_keys,
                box_keys=self._box_keys,
                live=self._live,
                received=self._received,
                upload_request=self._upload_request,
                sharers=self._sharers,
                survivors=self._survivors,
                accused=self._accused,
                replies=dict(sorted(self._replies.items())),
            )
        )

    @classmethod
    def restored(cls, terms: RoundTerms, keys: MemberKeys, snapshot: bytes) -> "MaskingMember":
        """The machine of a snapshot. Raises `Refused`: malformed, or of another round or member."""
        state = decode_message(snapshot, MemberSnapshot, "the snapshot")
        if state.h0 != terms.bound.h0 or state.member != keys.member:
            raise Refused(RefusalReason.WRONG_ROUND, "the snapshot is of another round or member")
        machine = cls(terms, keys, state.secrets)
        machine._phase = state.phase
        machine._violation = state.violation
        machine._entry = state.entry
        if state.members:
            machine._cohort = Cohort(terms, state.members, state.leaves)
        machine._mask_keys = state.mask_keys
        machine._box_keys = state.box_keys
        machine._live = state.live
        machine._received = state.received
        machine._upload_request = state.upload_request
        machine._sharers = state.sharers
        machine._survivors = state.survivors
        machine._accused = state.accused
        machine._replies = state.replies
        return machine

    def erase(self) -> None:
        """Forget every secret of the round; nothing is answered or opened afterwards."""
        self._forget_secrets()
        self._replies = {}
        self._phase = "erased"

    # -- what the methods above share --------------------------------------------------------------

    @property
    def _name(self) -> bytes:
        return self._keys.member.encode()

    @property
    def _known(self) -> Cohort:
        assert self._cohort is not None, "the cohort is fixed when share is answered"
        return self._cohort

    @property
    def _h1(self) -> bytes:
        return self._known.h1

    @property
    def _position(self) -> int:
        return int(np.searchsorted(self._known.indices, self._index))

    def _answered(self, step: StepName, request: bytes) -> bytes | None:
        """The stored reply to this very request, or None if the step is the one being waited for."""
        if self._phase == "erased":
            raise Refused(RefusalReason.CLOSED, "this round was erased")
        if self._phase == "stopped":
            raise ServerViolation(self._violation, "an earlier request of this round failed a check")
        kept = self._replies.get(step)
        if kept is not None:
            if kept.request != _digest(request):
                raise self._stop("second_request", f"the aggregator sent a second {step} request")
            return kept.reply
        if step != self._phase:
            raise Refused(RefusalReason.WRONG_STEP, f"asked for {step} while waiting for {self._phase}")
        return None

    def _keep(self, step: StepName, request: bytes, reply: bytes) -> None:
        self._replies[step] = KeptReply(_digest(request), reply)
        following: tuple[Phase, ...] = (*_STEPS[1:], "done")
        self._phase = following[_STEPS.index(step)]

    def _stop(self, check: str, text: str) -> ServerViolation:
        self._forget_secrets()
        self._phase = "stopped"
        self._violation = check
        return ServerViolation(check, text)

    def _forget_secrets(self) -> None:
        self._secrets = b""
        self._mask_keys = b""
        self._box_keys = b""
        self._received = b""
        if self._protector is not None:
            self._protector.forget()
            self._protector = None

    # -- advertise -----------------------------------------------------------------------------------

    def _advertise(self, request: bytes) -> bytes:
        message = decode_request(request, AdvertiseRequest, "the advertise request")
        if message.h0 != self._h0:
            raise Refused(RefusalReason.WRONG_ROUND, "the advertise request is of another round")
        channel, root, seed, _ = records(self._secrets, 32)
        keys = (
            AgreementKey(channel).public + mask_pair(root, self._h0).public + self_commitment(self._h0, seed)
        )
        self._entry = keys + self._keys.identity.sign("masking advertise", self._h0, self._name, keys)
        return encode_message(Advertisement(self._entry))

    # -- share ---------------------------------------------------------------------------------------

    def _share(self, request: bytes) -> bytes:
        message = decode_request(request, ShareRequest, "the share request")
        if len(message.members) % 4 or len(message.leaves) != 8 * len(message.members):
            raise Refused(RefusalReason.WRONG_SIZE, "the cohort's indices and leaves don't match")
        cohort = self._check_cohort(message.members, message.leaves)
        position = int(np.searchsorted(cohort.indices, self._index))
        neighbours = cohort.graph.neighbours(position).tolist()
        entries = self._check_entries(cohort, neighbours, message.entries)

        h1 = cohort.h1
        channel, root, seed, dealer = records(self._secrets, 32)
        pair = AgreementKey(channel)
        points = [neighbour + 1 for neighbour in neighbours]
        # Polynomials and salts follow from a seed, so a member set back to an earlier snapshot would
        # deal the very same shares and never a second set under one h1.
        coefficients = (cohort.t - 1) * COEFFICIENT_BYTES
        uniform = _uniform(dealer, h1, 2 * (coefficients + len(points) * SALT_BYTES))
        seed_shares = split(seed, cohort.t, points, uniform[:coefficients])
        root_shares = split(root, cohort.t, points, uniform[coefficients : 2 * coefficients])
        salts = records(uniform[2 * coefficients :], SALT_BYTES)
        commitments, boxes, box_keys = [], [], []
        for slot, (neighbour, entry) in enumerate(zip(neighbours, entries, strict=True)):
            opened_seed = seed_shares[slot] + salts[2 * slot]
            opened_root = root_shares[slot] + salts[2 * slot + 1]
            commitments.append(share_commitment(h1, position, neighbour, SELF, opened_seed))
            commitments.append(share_commitment(h1, position, neighbour, ROOT, opened_root))
            try:
                shared = pair.exchange(entry[:32])
            except ValueError:
                raise self._stop("neighbour_keys", "a neighbour's channel key is of small order") from None
            outgoing = derive_key(shared, "masking box", h1, u32(position), u32(neighbour))
            boxes.append(seal_once(outgoing, opened_seed + opened_root))
            box_keys.append(derive_key(shared, "masking box", h1, u32(neighbour), u32(position)))

        all_commitments, all_boxes = b"".join(commitments), b"".join(boxes)
        signature = self._keys.identity.sign("masking share", h1, self._name, all_commitments, all_boxes)
        self._cohort = cohort
        self._mask_keys = b"".join(entry[32:64] for entry in entries)
        self._box_keys = b"".join(box_keys)
        # The channel secret and the dealer seed have done their work.
        self._secrets = root + seed
        return encode_message(Shares(all_commitments, all_boxes, signature))

    def _check_cohort(self, members: bytes, leaves: bytes) -> Cohort:
        header = self._terms.bound.header
        indices = np.frombuffer(members, dtype="<u4")
        n = len(indices)
        if not header.n_min <= n <= header.n_max:
            raise self._stop("cohort_size", f"a cohort of {n} is outside {header.n_min}..{header.n_max}")
        if (indices[1:] <= indices[:-1]).any() or int(indices[-1]) >= len(self._terms.roster.members):
            raise self._stop("cohort_list", "the cohort isn't a sorted list of members of the roster")
        position = int(np.searchsorted(indices, self._index))
        if position == n or int(indices[position]) != self._index:
            raise self._stop("own_leaf", "the cohort doesn't have this member")
        if leaves[32 * position : 32 * position + 32] != leaf_hash(self._h0, self._index, self._entry):
            raise self._stop("own_leaf", "the cohort has another entry of this member than it sent")
        try:
            return Cohort(self._terms, members, leaves)
        except ParameterRefused as error:
            raise self._stop("thresholds", str(error)) from None

    def _check_entries(self, cohort: Cohort, neighbours: list[int], data: bytes) -> list[bytes]:
        if len(data) != ENTRY_BYTES * cohort.k:
            raise self._stop("degree", f"a member of this cohort has {cohort.k} neighbours")
        entries = records(data, ENTRY_BYTES)
        for neighbour, entry in zip(neighbours, entries, strict=True):
            if leaf_hash(self._h0, int(cohort.indices[neighbour]), entry) != cohort.leaf(neighbour):
                raise self._stop("neighbour_leaf", f"{cohort.id(neighbour)}'s entry isn't the cohort's")
            keys, signature = entry[:KEYS_BYTES], entry[KEYS_BYTES:]
            name = cohort.id(neighbour)
            if not verify(
                cohort.identity(neighbour), signature, "masking advertise", self._h0, name.encode(), keys
            ):
                raise self._stop("neighbour_signature", f"{name} didn't sign the keys given for it")
        every = [self._entry, *entries]
        public = {entry[:32] for entry in every} | {entry[32:64] for entry in every}
        if len(public) != 2 * len(every):
            raise self._stop("neighbour_keys", "two members of the neighbourhood share a key")
        return entries

    # -- upload --------------------------------------------------------------------------------------

    def _upload(self, request: bytes) -> MaskingProtector | Complaint:
        message = decode_request(request, UploadRequest, "the upload request")
        cohort, position = self._known, self._position
        live = from_bitmap(message.live, cohort.k, "the live neighbours")
        count = int(live.sum())
        if len(message.commitments) != COMMITMENTS_BYTES * count or len(message.boxes) != BOX_BYTES * count:
            raise Refused(RefusalReason.WRONG_SIZE, "the boxes don't match the live neighbours")
        if count < cohort.t:
            raise self._stop("live_neighbours", f"{count} neighbours are live, {cohort.t} are needed")
        neighbours = cohort.graph.neighbours(position)[live].tolist()
        box_keys = [key for key, is_live in zip(records(self._box_keys, 32), live, strict=True) if is_live]
        received = []
        for neighbour, key, box, pledges in zip(
            neighbours,
            box_keys,
            records(message.boxes, BOX_BYTES),
            records(message.commitments, COMMITMENTS_BYTES),
            strict=True,
        ):
            content = open_box(key, box)
            if content is None or not _matches(cohort.h1, neighbour, position, content, pledges):
                return self._complain(request, neighbour)
            received.append(content)

        root, seed = records(self._secrets, 32)
        own = mask_pair(root, self._h0)
        added = [group_mask_key(self._keys.group_key, cohort.h1), self_mask_key(seed, cohort.h1)]
        subtracted: list[bytes] = []
        mask_keys = records(self._mask_keys, 32)
        for slot, neighbour in zip(np.flatnonzero(live).tolist(), neighbours, strict=True):
            low, high = min(position, neighbour), max(position, neighbour)
            try:
                key = pair_mask_key(own, mask_keys[slot], cohort.h1, low, high)
            except ValueError:
                raise self._stop("neighbour_keys", "a neighbour's mask key is of small order") from None
            (added if position < neighbour else subtracted).append(key)
        self._live = message.live
        self._received = b"".join(received)
        self._upload_request = _digest(request)
        self._protector = MaskingProtector(self._terms.bound.header, cohort.h1, MaskSet(added, subtracted))
        return self._protector

    def _complain(self, request: bytes, accused: int) -> Complaint:
        cohort = self._known
        name = cohort.id(accused)
        signature = self._keys.identity.sign("masking complaint", cohort.h1, self._name, name.encode())
        reply = encode_message(BoxComplaint(accused, signature))
        self._replies["upload"] = KeptReply(_digest(request), reply)
        self._accused = name
        self._forget_secrets()
        self._phase = "complained"
        return Complaint(reply, name)

    # -- confirm -------------------------------------------------------------------------------------

    def _confirm(self, request: bytes) -> bytes:
        message = decode_request(request, ConfirmRequest, "the confirm request")
        cohort, position = self._known, self._position
        survivors = self._survivor_set(message.sharers, message.survivors)
        sharers = from_bitmap(message.sharers, cohort.n, "the sharers")
        if not survivors[position]:
            raise self._stop("own_survival", "this member uploaded, but isn't in the survivor set")
        neighbours = cohort.graph.neighbours(position)
        if (sharers[neighbours] != from_bitmap(self._live, cohort.k, "the live neighbours")).any():
            raise self._stop("sharers", "the sharers aren't those that were given for the upload")
        if int(survivors[neighbours].sum()) < cohort.t:
            raise self._stop("live_neighbours", f"fewer than {cohort.t} neighbours survive")
        self._sharers, self._survivors = message.sharers, message.survivors
        root = confirm_root(cohort.h1, message.sharers, message.survivors)
        return encode_message(Confirmation(self._keys.identity.sign("masking confirm", cohort.h1, root)))

    def _survivor_set(self, sharers: bytes, survivors: bytes) -> Flags:
        """U3 as flags: a subset of U2, of an allowed size."""
        header, cohort = self._terms.bound.header, self._known
        shared = from_bitmap(sharers, cohort.n, "the sharers")
        alive = from_bitmap(survivors, cohort.n, "the survivors")
        if (alive & ~shared).any():
            raise self._stop("survivors", "a survivor hadn't shared its secrets")
        count = int(alive.sum())
        if not header.n_min <= count <= header.n_max:
            raise self._stop(
                "survivor_count", f"{count} survivors are outside {header.n_min}..{header.n_max}"
            )
        return alive

    # -- reveal --------------------------------------------------------------------------------------

    def _reveal(self, request: bytes) -> bytes:
        message = decode_request(request, RevealRequest, "the reveal request")
        cohort, position = self._known, self._position
        neighbours = cohort.graph.neighbours(position)
        survivors = from_bitmap(self._survivors, cohort.n, "the survivors")
        signers = from_bitmap(message.signers, cohort.k, "the signers")
        if int(signers.sum()) < cohort.t or not survivors[neighbours[signers]].all():
            raise self._stop("confirmations", f"fewer than {cohort.t} neighbours confirmed the survivors")
        root = confirm_root(cohort.h1, self._sharers, self._survivors)
        self._check_confirmations(neighbours[signers], message.signatures, root, "confirm_signature")

        live = from_bitmap(self._live, cohort.k, "the live neighbours")
        alive = survivors[neighbours[live]].tolist()
        shares = b"".join(
            content[:OPENED_BYTES] if survives else content[OPENED_BYTES:]
            for content, survives in zip(records(self._received, CONTENT_BYTES), alive, strict=True)
        )
        signature = self._keys.identity.sign("masking reveal", cohort.h1, self._name, root, shares)
        self._forget_secrets()
        return encode_message(Revealed(shares, signature))

    def _check_confirmations(
        self, positions: np.ndarray[tuple[int], np.dtype[np.int64]], data: bytes, root: bytes, check: str
    ) -> None:
        cohort = self._known
        if len(data) != SIGNATURE_BYTES * len(positions):
            raise Refused(RefusalReason.WRONG_SIZE, "the signatures don't match the signers")
        for signer, signature in zip(positions.tolist(), records(data, SIGNATURE_BYTES), strict=True):
            if not verify(cohort.identity(signer), signature, "masking confirm", cohort.h1, root):
                raise self._stop(check, f"{cohort.id(signer)} didn't confirm these survivors")


def _digest(request: bytes) -> bytes:
    return hashlib.sha256(request).digest()


def _uniform(seed: bytes, h1: bytes, length: int) -> bytes:
    """`length` bytes for one member's polynomials and salts in one round: SHAKE-256 of a derived key."""
    return hashlib.shake_256(derive_key(seed, "masking dealer", h1)).digest(length)


def _matches(h1: bytes, dealer: int, receiver: int, content: bytes, pledges: bytes) -> bool:
    """Whether a box's content is two field elements with their salts, as committed to."""
    if len(content) != CONTENT_BYTES:
        return False
    seed, root = content[:OPENED_BYTES], content[OPENED_BYTES:]
    return (
        share_value(seed[:SHARE_BYTES]) is not None
        and share_value(root[:SHARE_BYTES]) is not None
        and share_commitment(h1, dealer, receiver, SELF, seed) == pledges[:32]
        and share_commitment(h1, dealer, receiver, ROOT, root) == pledges[32:]
    )
