"""Which training state a newcomer or restarted member accepts (protocols.md 1.8).

Every survivor of a round signs the digest of the state that it computed. A checkpoint is accepted only
with signatures of more than half of that round's survivors and of at least n_min of them; S_0 when its
digest is the one that the owner signed in the plan.
"""

from typing import Annotated

import msgspec
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.errors import RefusalReason, Refused, StateMismatch
from blindsum.crypto.primitives.signing import SIGNATURE_BYTES, SigningKey, verify
from blindsum.crypto.trust.documents import Count, Digest, MemberId
from blindsum.crypto.trust.plan import Plan
from blindsum.crypto.trust.receipt import survivors_digest
from blindsum.crypto.trust.roster import Roster


class StateSignature(Message, frozen=True):
    """One survivor's word for a state."""

    member: MemberId
    signature: Annotated[bytes, msgspec.Meta(min_length=SIGNATURE_BYTES, max_length=SIGNATURE_BYTES)]


class StateClaim(Message, frozen=True):
    """What is said about a checkpoint: its round's h1 and survivors, its index and digest, and by whom.

    For S_0, `h1` is the plan's digest and there are neither survivors nor signatures.
    """

    federation: Digest
    h1: Digest
    index: Count
    digest: Digest
    survivors: tuple[MemberId, ...]
    signatures: tuple[StateSignature, ...]

    def to_bytes(self) -> bytes:
        """The canonical bytes."""
        return encode_message(self)

    @classmethod
    def parse(cls, data: bytes) -> "StateClaim":
        """Decode strictly. Raises `Refused` (malformed)."""
        return decode_message(data, StateClaim, "a checkpoint's claim")


def sign_state(
    identity: SigningKey,
    *,
    federation: bytes,
    h1: bytes,
    index: int,
    digest: bytes,
    survivors: tuple[str, ...],
) -> bytes:
    """A survivor's signature over the state that it computed after the round of `h1`.

    It also covers the survivor set, so that nobody can later claim a smaller one.
    """
    return identity.sign("state", *_statement(federation, h1, index, digest, survivors))


def verify_state_signature(claim: StateClaim, signature: StateSignature, roster: Roster) -> bool:
    """Whether a survivor in the roster signed exactly this claim's state."""
    position = roster.position.get(signature.member)
    if position is None or signature.member not in claim.survivors:
        return False
    statement = _statement(claim.federation, claim.h1, claim.index, claim.digest, claim.survivors)
    return verify(roster.members[position].identity, signature.signature, "state", *statement)


def accept_state(
    claim: StateClaim, *, roster: Roster, plan: Plan, plan_digest: bytes, n_min: int, index: int
) -> None:
    """Raises unless the claim's state is proven to be the federation's state `index`.

    `n_min` is the policy's floor; `index` what the open round's header continues from. `Refused` for a
    claim that no honest party makes (repeated survivors or signers, a bad signature), `StateMismatch`
    for one that proves too little.
    """
    if claim.federation != plan.federation:
        raise StateMismatch(
            "the checkpoint is another federation's; get it from this federation's aggregator"
        )
    if claim.index != index:
        raise StateMismatch(f"the checkpoint is state {claim.index}, but the round continues from {index}")
    if index == 0:
        if claim.h1 != plan_digest or claim.survivors or claim.signatures:
            raise Refused(RefusalReason.MALFORMED, "the claim of a first state names no round")
        if claim.digest != plan.initial_state:
            raise StateMismatch("the first state isn't the one that the owner signed in the plan")
        return
    signers = [signature.member for signature in claim.signatures]
    if len(set(claim.survivors)) != len(claim.survivors) or len(set(signers)) != len(signers):
        raise Refused(RefusalReason.MALFORMED, "a checkpoint's claim names a member twice")
    for signature in claim.signatures:
        if not verify_state_signature(claim, signature, roster):
            raise Refused(
                RefusalReason.SIGNATURE, f"{signature.member}'s signature of the checkpoint doesn't verify"
            )
    if 2 * len(signers) <= len(claim.survivors) or len(signers) < n_min:
        raise StateMismatch(
            f"{len(signers)} of {len(claim.survivors)} survivors signed this checkpoint; more than half and "
            f"at least {n_min} are needed. Wait for more members to sign, or ask them for theirs"
        )


def _statement(
    federation: bytes, h1: bytes, index: int, digest: bytes, survivors: tuple[str, ...]
) -> tuple[bytes, ...]:
    return federation, h1, index.to_bytes(8, "little"), digest, survivors_digest(h1, survivors)
