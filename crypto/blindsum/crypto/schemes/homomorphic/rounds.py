"""The round of a shared-key homomorphic scheme: one step, `upload` (protocols.md section 4).

Members encrypt frames under the public key and sign the digest of what they send; the aggregator adds
ciphertexts and returns the sum with the signed upload list; any key holder opens it. Ciphertexts are
malleable, so the member's name is in what it signs: a copy of someone else's upload doesn't count.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NoReturn

import msgspec
import numpy as np
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.errors import (
    EncodingError,
    OpeningFailed,
    ParameterRefused,
    RefusalReason,
    Refused,
    ServerViolation,
)
from blindsum.crypto.primitives.derivation import Random, same
from blindsum.crypto.primitives.signing import SIGNATURE_BYTES, SigningKey, require_signature, verify
from blindsum.crypto.schemes.base import (
    Abort,
    AggregatorRound,
    BulkLayout,
    Fields,
    FrameArithmetic,
    FrameProtector,
    MemberKeys,
    MemberRound,
    RoundTerms,
    Scheme,
    StepName,
    SummedFields,
    SumOpener,
)
from blindsum.crypto.schemes.homomorphic.cipher import (
    AggregatorCipher,
    CipherParameters,
    MemberCipher,
    aggregator_cipher,
    member_cipher,
    restore_parameters,
)
from blindsum.crypto.schemes.homomorphic.worker_cipher import PieceWork, opened
from blindsum.crypto.trust.documents import Digest, MemberId

SNAPSHOT_VERSION: Literal[1] = 1

SECURITY_FLOOR = 112
"""Bits of security below which no parameter set is taken; the member's policy may ask for more."""

_NAMES = ("bfv", "ckks", "paillier")

Signature = Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class UploadRequest(Message, frozen=True):
    """Asks a member for its upload in the round of `h0`."""

    h0: Digest


class SignedUpload(Message, frozen=True):
    """A member's upload by its digest, signed over ("he upload", h1, member, digest)."""

    member: MemberId
    h1: Digest
    digest: Digest
    signature: Signature


class UploadList(Message, frozen=True):
    """The result message: every upload in the sum, in roster order."""

    h1: Digest
    uploads: tuple[SignedUpload, ...]


class _Snapshot(Message, frozen=True):
    """A member's progress. There are no secrets of the round in it."""

    version: Literal[1]
    scheme: str
    h0: Digest
    member: MemberId
    begun: bool
    violation: str
    digest: bytes
    reply: bytes


def scheme(name: str) -> Scheme:
    """The scheme bfv, ckks or paillier. Raises `ParameterRefused` for another name."""
    if name not in _NAMES:
        raise ParameterRefused(f"there is no homomorphic scheme {name!r}; choose one of {', '.join(_NAMES)}")
    return HomomorphicScheme(name)


class HomomorphicScheme:
    """bfv, ckks or paillier under one key that all members share."""

    steps: tuple[StepName, ...] = ("upload",)

    def __init__(self, name: str) -> None:
        self.name = name

    def trust_line(self, terms: RoundTerms) -> str:
        """Who would have to collude to learn an update."""
        return (
            f"{self.name} under a key that all {len(terms.roster.members)} members share: the aggregator "
            "alone opens nothing, but together with any one holder of the key (a member, the owner, or a "
            "removed member until the key changes) it, or whoever else obtains an upload, opens every upload "
            "under that key; that members see only sums rests on the aggregator adding honestly."
        )

    def check_terms(self, terms: RoundTerms) -> None:
        """Prove the key's parameter set for the round's bits and n_max. Raises `ParameterRefused`."""
        self._parameters(terms)

    def bulk_layout(self, terms: RoundTerms) -> BulkLayout:
        """Exact sizes of the bulk step; every frame is padded to the same size."""
        return _layout(self._parameters(terms), terms.bound.header.fields)

    def member(self, terms: RoundTerms, keys: MemberKeys, random: Random) -> MemberRound:  # noqa: ARG002
        """A member's machine. Encryption draws from the operating system's generator, not `random`."""
        return self._member(terms, keys)

    def restore_member(
        self,
        terms: RoundTerms,
        keys: MemberKeys,
        snapshot: bytes,
        random: Random,  # noqa: ARG002
    ) -> MemberRound:
        """A member's machine from a snapshot. Raises `Refused` (malformed)."""
        machine = self._member(terms, keys)
        machine.restore(snapshot)
        return machine

    def aggregator(self, terms: RoundTerms, exclude: frozenset[str] = frozenset()) -> AggregatorRound:
        """The aggregator's machine. Whoever the roster names may upload, until n_max have."""
        return HomomorphicAggregator(terms, self._parameters(terms), exclude)

    def _member(self, terms: RoundTerms, keys: MemberKeys) -> "HomomorphicMember":
        parameters = self._parameters(terms)
        if terms.roster.entry(keys.member).identity != keys.identity.public:
            raise ParameterRefused(
                f"the identity key given isn't the one that the roster has for {keys.member}"
            )
        if not keys.he_secret:
            raise ParameterRefused(
                f"this member holds no {self.name} key; open the owner's key envelope first"
            )
        return HomomorphicMember(self.name, terms, keys, parameters)

    def _parameters(self, terms: RoundTerms) -> CipherParameters:
        header = terms.bound.header
        key = terms.roster.he_key(self.name)
        if header.scheme != self.name:
            raise ParameterRefused(f"the round is for {header.scheme}, not {self.name}")
        if key is None or key.parameters != terms.he_parameters:
            raise ParameterRefused(f"the roster names no {self.name} key with these parameters")
        if not same(key.digest, header.he_key) or not same(
            hashlib.sha256(terms.he_public).digest(), header.he_key
        ):
            raise ParameterRefused(f"this isn't the {self.name} public key that the round is under")
        if header.bits > key.bits or header.n_max > key.n_max:
            raise ParameterRefused(
                f"the {self.name} key is proved for {key.bits} bits and {key.n_max} members, not for "
                f"{header.bits} bits and {header.n_max}; ask the owner for a key with room"
            )
        return restore_parameters(key.parameters, key.bits, key.n_max, minimum_security=SECURITY_FLOOR)


class HomomorphicMember:
    """One member's part in one round."""

    def __init__(self, name: str, terms: RoundTerms, keys: MemberKeys, parameters: CipherParameters) -> None:
        if not keys.he_secret:
            raise OpeningFailed(
                f"this member holds no {name} secret key; open the owner's key envelope first"
            )
        self._name = name
        self._terms = terms
        self._member = keys.member
        self._identity: SigningKey | None = keys.identity
        self._secret = keys.he_secret
        self._parameters = parameters
        self._cipher: MemberCipher | None = None
        self._begun = False
        self._violation = ""
        self._protector: HomomorphicProtector | None = None
        self._digest = b""
        self._reply = b""

    @property
    def waiting_for(self) -> StepName | None:
        """The upload, until it is sealed."""
        return None if self._reply or self._violation or self._identity is None else "upload"

    def answer(self, step: StepName, request: bytes) -> bytes:  # noqa: ARG002
        """Always refuses: there are no message steps."""
        raise Refused(RefusalReason.WRONG_STEP, f"{self._name} has no message step {step!r}")

    def begin_upload(self, request: bytes) -> FrameProtector:
        """The protector of this upload; the same one until it is sealed.

        A restored machine starts a new one: each frame is encrypted with fresh randomness, so frames that
        were sent before the restart must be sent again, or sealed as they were stored.
        """
        asked = decode_message(request, UploadRequest, "an upload request")
        self._require_answering()
        if self._reply:
            raise Refused(RefusalReason.WRONG_STEP, "this upload was sealed; resend the stored bytes")
        if not same(asked.h0, self._terms.bound.h0):
            raise self._stop("h0", "the upload request is for another round")
        if self._protector is None:
            self._protector = HomomorphicProtector(self._opened_cipher(), self._terms, self._secret)
        self._begun = True
        return self._protector

    def seal_upload(self, digest: bytes) -> bytes:
        """The signed reply for the upload of that digest; afterwards another digest is refused."""
        if len(digest) != 32:
            raise Refused(RefusalReason.WRONG_SIZE, "an upload digest has 32 bytes")
        if self._reply and not self._violation:
            if same(digest, self._digest):
                return self._reply
            raise Refused(RefusalReason.CONFLICT, "another upload was sealed in this round")
        if self._identity is None or self._violation or not self._begun:
            raise Refused(RefusalReason.WRONG_STEP, "there is no upload to seal")
        if self._protector is not None and not self._protector.complete:
            raise Refused(RefusalReason.WRONG_STEP, "some frames haven't been protected yet")
        self._protector = None
        h1 = self._terms.bound.h0
        signature = self._identity.sign("he upload", h1, self._member.encode(), digest)
        self._digest = digest
        self._reply = encode_message(SignedUpload(self._member, h1, digest, signature))
        return self._reply

    def open_sum(self, result: bytes) -> SumOpener:
        """Check the signed upload list and return the opener. A dropout may open too.

        Raises `ServerViolation` for a list below n_min or above n_max, out of roster order, with a
        stranger, a repetition, a bad signature, or another upload of this member than it sealed.
        """
        self._require_answering()
        listed = decode_message(result, UploadList, "an upload list")
        header, roster, h1 = self._terms.bound.header, self._terms.roster, self._terms.bound.h0
        members = tuple(upload.member for upload in listed.uploads)
        positions = [roster.position.get(member, -1) for member in members]
        if not same(listed.h1, h1):
            raise self._stop("result_round", "the upload list is another round's")
        if not header.n_min <= len(members) <= header.n_max:
            raise self._stop(
                "result_cohort", f"a sum of {len(members)} isn't within {header.n_min}..{header.n_max}"
            )
        if -1 in positions or positions != sorted(set(positions)):
            raise self._stop(
                "result_members", "the upload list has a stranger, a repetition or another order"
            )
        for upload, position in zip(listed.uploads, positions, strict=True):
            key = roster.members[position].identity
            fields = (h1, upload.member.encode(), upload.digest)
            if not same(upload.h1, h1) or not verify(key, upload.signature, "he upload", *fields):
                raise self._stop("result_signature", f"{upload.member}'s upload isn't signed by it")
            if upload.member == self._member and not same(upload.digest, self._digest):
                raise self._stop("result_own_upload", "the list has an upload that this member didn't send")
        return HomomorphicOpener(self._opened_cipher(), self._terms, members, self._secret)

    def snapshot(self) -> bytes:
        """Versioned bytes that `restore` takes."""
        return encode_message(
            _Snapshot(
                SNAPSHOT_VERSION,
                self._name,
                self._terms.bound.h0,
                self._member,
                self._begun,
                self._violation,
                self._digest,
                self._reply,
            )
        )

    def restore(self, snapshot: bytes) -> None:
        """Take over a snapshot of this member and round. Raises `Refused` (malformed)."""
        held = decode_message(snapshot, _Snapshot, "a member's snapshot")
        if (held.scheme, held.member) != (self._name, self._member) or not same(
            held.h0, self._terms.bound.h0
        ):
            raise Refused(RefusalReason.WRONG_ROUND, "the snapshot is another round's or another member's")
        self._begun, self._violation = held.begun, held.violation
        self._digest, self._reply = held.digest, held.reply

    def erase(self) -> None:
        """Forget the keys; nothing can be sealed or opened afterwards."""
        self._identity = None
        self._secret = b""
        self._cipher = None
        self._protector = None

    def _require_answering(self) -> None:
        if self._identity is None:
            raise Refused(RefusalReason.CLOSED, "this round was erased")
        if self._violation:
            raise ServerViolation(self._violation, "this round failed a check")

    def _stop(self, check: str, text: str) -> ServerViolation:
        self._violation = check
        return ServerViolation(check, text)

    def _opened_cipher(self) -> MemberCipher:
        if self._cipher is None:
            self._cipher = member_cipher(self._parameters, self._terms.he_public, self._secret)
        return self._cipher

    def __repr__(self) -> str:
        return f"<HomomorphicMember {self._member} of round {self._terms.bound.header.round}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a member's round can't be pickled; use its snapshot")


class HomomorphicAggregator:
    """The aggregator's part in one round; its accepted replies and close are its state."""

    def __init__(self, terms: RoundTerms, parameters: CipherParameters, exclude: Iterable[str]) -> None:
        left_out = frozenset(exclude)
        self.layout = _layout(parameters, terms.bound.header.fields)
        self._terms = terms
        self._cipher = aggregator_cipher(parameters, terms.he_public)
        self._asked = tuple(entry.id for entry in terms.roster.members if entry.id not in left_out)
        self._replies: dict[str, bytes] = {}
        self._survivors: tuple[str, ...] = ()
        self._abort: Abort | None = None

    @property
    def step(self) -> StepName | None:
        """The upload, until it closes."""
        return None if self._survivors or self._abort is not None else "upload"

    @property
    def participants(self) -> tuple[str, ...]:
        """The whole roster but those excluded."""
        return self._asked if self.step is not None else ()

    @property
    def replied(self) -> frozenset[str]:
        """Whose upload was accepted."""
        return frozenset(self._replies)

    @property
    def quorum(self) -> int:
        """n_min."""
        return self._terms.bound.header.n_min

    @property
    def abort(self) -> Abort | None:
        """Set when the round ended below n_min."""
        return self._abort

    @property
    def named(self) -> Mapping[str, str]:
        """Nobody: faults show in the members' sum check only."""
        return {}

    @property
    def h1(self) -> bytes:
        """h0: there is no other agreement."""
        return self._terms.bound.h0

    @property
    def survivors(self) -> tuple[str, ...]:
        """Whose upload is in the sum, in roster order; empty before the close."""
        return self._survivors

    def request(self, member: str) -> bytes:
        """The upload request: the same for everyone."""
        self._require_open()
        self._require_asked(member)
        return encode_message(UploadRequest(self._terms.bound.h0))

    def check_reply(self, member: str, reply: bytes) -> bool:
        """What `accept` checks, changing nothing; True when bulk must follow, False for a repeated reply."""
        if self._replies.get(member) == reply:
            return False
        self._require_open()
        self._require_asked(member)
        upload = decode_message(reply, SignedUpload, "an upload reply")
        if upload.member != member:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} sent an upload in another's name")
        if not same(upload.h1, self.h1):
            raise Refused(RefusalReason.WRONG_ROUND, "the upload is another round's")
        require_signature(
            self._terms.roster.entry(member).identity,
            upload.signature,
            f"{member}'s upload",
            "he upload",
            self.h1,
            member.encode(),
            upload.digest,
        )
        if member in self._replies:
            raise Refused(RefusalReason.CONFLICT, f"another upload of {member} was accepted already")
        if len(self._replies) >= self._terms.bound.header.n_max:
            raise Refused(RefusalReason.LIMIT, "the round is full")
        return True

    def accept(self, member: str, reply: bytes) -> bool:
        """Record a checked upload reply; False if the same one was there already."""
        if not self.check_reply(member, reply):
            return False
        self._replies[member] = reply
        return True

    def expected_digest(self, reply: bytes) -> bytes:
        """The upload digest that an upload reply promises."""
        return decode_message(reply, SignedUpload, "an upload reply").digest

    def close(self) -> None:
        """Fix the survivor set, or abort below n_min."""
        self._require_open()
        if len(self._replies) < self.quorum:
            self._abort = Abort(f"{len(self._replies)} uploads, but at least {self.quorum} are needed")
            return
        self._survivors = tuple(member for member in self._asked if member in self._replies)

    def arithmetic(self) -> FrameArithmetic:
        """The frame arithmetic."""
        return HomomorphicArithmetic(self._cipher, self.layout)

    def finish_frame(self, index: int, total: bytes | bytearray) -> bytes:
        """Frame `index` of the published sum."""
        self._require_finished()
        _check_index(self.layout, index)
        _check_size(len(total), self.layout.sum_bytes(index), f"the running sum of frame {index}")
        return self._cipher.finish(total)

    def result(self) -> bytes:
        """The signed upload list."""
        self._require_finished()
        uploads = tuple(
            decode_message(self._replies[member], SignedUpload, "an upload reply")
            for member in self._survivors
        )
        return encode_message(UploadList(self.h1, uploads))

    def _require_open(self) -> None:
        if self.step is None:
            raise Refused(RefusalReason.CLOSED, "the upload step is closed")

    def _require_finished(self) -> None:
        if not self._survivors:
            raise Refused(RefusalReason.WRONG_STEP, "the round isn't finished")

    def _require_asked(self, member: str) -> None:
        if member not in self._terms.roster.position:
            raise Refused(RefusalReason.UNKNOWN_MEMBER, f"{member!r} isn't in the roster")
        if member not in self._asked:
            raise Refused(RefusalReason.NOT_A_PARTICIPANT, f"{member} is left out of this round")


class HomomorphicArithmetic:
    """The aggregator's arithmetic on ciphertext frames: public material only.

    Frames are parsed by our own strict reader and added in numpy (bfv, ckks) or gmpy2 (paillier); no native
    loader ever sees an upload.
    """

    def __init__(self, cipher: AggregatorCipher, layout: BulkLayout) -> None:
        self.native = cipher.native
        self._cipher = cipher
        self._layout = layout

    def check(self, index: int, frame: bytes | memoryview) -> None:
        """Strict parse of frame `index` of an upload. Raises `Refused`."""
        self._check_frame(index, frame)
        self._cipher.check(frame)

    def add(self, index: int, total: bytearray | None, frame: bytes | memoryview) -> bytearray:
        """The sum of frame `index` with one more contribution. Raises `Refused`, `total` unchanged."""
        self._check_frame(index, frame)
        return self._cipher.add(total, frame)

    def seeds(self, index: int, frame: bytes | memoryview) -> tuple[bytes, ...]:
        """What must never come twice under a key: digests that the service keeps and compares."""
        self._check_frame(index, frame)
        return self._cipher.seeds(frame)

    def _check_frame(self, index: int, frame: bytes | memoryview) -> None:
        _check_index(self._layout, index)
        _check_size(len(frame), self._layout.upload_bytes(index), f"frame {index}")


class HomomorphicProtector:
    """A member's bulk step. `work` is for the caller's worker processes, where it has them."""

    def __init__(self, cipher: MemberCipher, terms: RoundTerms, secret: bytes) -> None:
        self._cipher = cipher
        self._maximum = (1 << terms.bound.header.bits) - 1
        self.layout = _layout(cipher.parameters, terms.bound.header.fields)
        self.h1 = terms.bound.h0
        self.work = PieceWork(cipher.parameters, terms.he_public, secret)
        self._pending = set(range(self.layout.frames))

    @property
    def complete(self) -> bool:
        """Whether every frame was protected or handed over."""
        return not self._pending

    def protect(self, index: int, fields: Fields) -> bytes:
        """Frame `index`, freshly encrypted; each frame once. Raises `Refused` the second time."""
        self.hand_over(index, fields)
        return self._cipher.encrypt(fields)

    def hand_over(self, index: int, fields: Fields) -> None:
        """Check frame `index` and leave its encryption to the caller's workers (`work`); each frame once.

        Raises `EncodingError`, `Refused` the second time.
        """
        if not 0 <= index < self.layout.frames:
            raise EncodingError(f"frame {index}", f"there are {self.layout.frames} frames")
        start, stop = self.layout.field_range(index)
        if fields.shape != (stop - start,):
            raise EncodingError(f"frame {index}", f"expected {stop - start} fields, got shape {fields.shape}")
        if fields.dtype not in (np.uint32, np.uint64) or int(fields.max()) > self._maximum:
            raise EncodingError(f"frame {index}", f"fields are unsigned integers up to {self._maximum}")
        try:
            self._pending.remove(index)
        except KeyError:
            raise Refused(RefusalReason.CONFLICT, f"frame {index} was encrypted already") from None

    def __repr__(self) -> str:
        return f"<Protector of {self.layout.frames} frames>"


class HomomorphicOpener:
    """Opens the published sum. `work` is for the caller's worker processes, where it has them."""

    def __init__(
        self, cipher: MemberCipher, terms: RoundTerms, survivors: tuple[str, ...], secret: bytes
    ) -> None:
        self._cipher = cipher
        self._maximum = len(survivors) * ((1 << terms.bound.header.bits) - 1)
        self.survivors = survivors
        self.layout = _layout(cipher.parameters, terms.bound.header.fields)
        self.h1 = terms.bound.h0
        self.max_error = 0.0
        self.work = PieceWork(cipher.parameters, terms.he_public, secret)

    def open(self, index: int, frame: bytes | memoryview) -> SummedFields:
        """The summed fields of frame `index`. Raises `OpeningFailed`."""
        count = self.hand_over(index, frame)
        try:
            summed = opened(self._cipher, frame, count, len(self.survivors))
        finally:
            self.max_error = max(self.max_error, self._cipher.max_error)
        return self.take_back(index, summed)

    def hand_over(self, index: int, frame: bytes | memoryview) -> int:
        """Check the size of frame `index` and leave its decryption to the caller's workers (`work`).

        Returns how many fields it holds. Raises `OpeningFailed`.
        """
        if not 0 <= index < self.layout.frames:
            raise OpeningFailed(f"there is no frame {index} in this sum")
        size = self.layout.result_bytes(index)
        if len(frame) != size:
            raise OpeningFailed(
                f"the sum doesn't open: frame {index} of the sum has {len(frame)} bytes, {size} expected; "
                "nothing was output"
            )
        start, stop = self.layout.field_range(index)
        return stop - start

    def take_back(self, index: int, summed: SummedFields) -> SummedFields:
        """The same fields, once they are known to be a possible sum. Raises `OpeningFailed`."""
        if int(summed.max()) > self._maximum:
            raise OpeningFailed(
                f"a field of frame {index} is above what {len(self.survivors)} members can send"
            )
        return summed

    def __repr__(self) -> str:
        return f"<SumOpener of {self.layout.frames} frames>"


def _layout(parameters: CipherParameters, fields: int) -> BulkLayout:
    return BulkLayout(
        fields=fields,
        fields_per_frame=parameters.fields_per_frame,
        upload_frame=parameters.upload_frame_bytes,
        upload_last=parameters.upload_frame_bytes,
        sum_frame=parameters.sum_frame_bytes,
        sum_last=parameters.sum_frame_bytes,
        result_frame=parameters.result_frame_bytes,
        result_last=parameters.result_frame_bytes,
    )


def _check_index(layout: BulkLayout, index: int) -> None:
    if not 0 <= index < layout.frames:
        raise Refused(RefusalReason.WRONG_OFFSET, f"there is no frame {index}")


def _check_size(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise Refused(RefusalReason.WRONG_SIZE, f"{what} has {found} bytes, {wanted} expected")
