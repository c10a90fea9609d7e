"""The roster: who may take part, signed by the owner (protocols.md 1.1, 1.2, 1.6)."""

from functools import cached_property
from typing import Annotated

import msgspec
from blindsum.crypto.canonical import Document
from blindsum.crypto.errors import DocumentError
from blindsum.crypto.trust.documents import Count, Digest, MemberId, PublicKey, UnixTime

KIND = "roster"


class RosterEntry(Document, frozen=True, kw_only=True):
    """One member: its name, organisation, Ed25519 identity key and hybrid HPKE public key."""

    id: MemberId
    organisation: Annotated[str, msgspec.Meta(max_length=200)]
    identity: PublicKey
    hpke: Annotated[bytes, msgspec.Meta(min_length=1216, max_length=1216)]


class HeKey(Document, frozen=True, kw_only=True):
    """An HE public key in use: its parameter set and the digest that addresses its bytes."""

    scheme: str
    parameters: str
    bits: Annotated[int, msgspec.Meta(ge=2, le=32)]
    n_max: Annotated[int, msgspec.Meta(ge=2, le=100_000)]
    digest: Digest


class Roster(Document, frozen=True, kw_only=True, dict=True):
    """Members sorted by id, the group key's epoch and id, the HE keys, and the roster's validity.

    `version` grows with every roster; members refuse an older one. A removal changes `group_key`.
    """

    federation: Digest
    version: Annotated[int, msgspec.Meta(ge=1)]
    valid_until: UnixTime
    epoch: Count
    group_key: Digest
    he_keys: tuple[HeKey, ...]
    members: tuple[RosterEntry, ...]

    def __post_init__(self) -> None:
        ids = [entry.id for entry in self.members]
        if ids != sorted(set(ids)):
            raise ValueError("roster members must be sorted by id, each once")
        if len({entry.identity for entry in self.members}) != len(ids):
            raise ValueError("two roster members share an identity key")

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of each member in `members`."""
        return {entry.id: index for index, entry in enumerate(self.members)}

    def entry(self, member: str) -> RosterEntry:
        """The member's entry. Raises `DocumentError` when it has none."""
        index = self.position.get(member)
        if index is None:
            raise DocumentError(
                f"{member!r} isn't in roster version {self.version}; ask the owner to admit it"
            )
        return self.members[index]

    def he_key(self, scheme: str) -> HeKey | None:
        """The key for an HE scheme, or None."""
        return next((key for key in self.he_keys if key.scheme == scheme), None)
