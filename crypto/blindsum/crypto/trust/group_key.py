"""The group key: known to the members and the owner, never to the aggregator (protocols.md 1.6)."""

from typing import NoReturn, Self

from blindsum.crypto.primitives.derivation import Random, derive_key, system_random


class GroupKey:
    """32 bytes made by the owner for an epoch, used only through one derivation a purpose.

    `key_id` stands in the roster and in H. It doesn't print, pickle or compare.
    """

    __slots__ = ("_secret", "epoch", "key_id")

    def __init__(self, secret: bytes, epoch: int) -> None:
        if len(secret) != 32:
            raise ValueError("a group key has 32 bytes")
        self._secret = secret
        self.epoch = epoch
        self.key_id = derive_key(secret, "group key id", epoch.to_bytes(8, "little"))

    @classmethod
    def generate(cls, epoch: int, random: Random = system_random) -> Self:
        """A fresh key for an epoch."""
        return cls(random(32), epoch)

    def sum_key(self, h1: bytes) -> bytes:
        """Seed of K, the mask that seals a sum to the members."""
        return derive_key(self._secret, "group key sum", h1)

    def check_key(self, h1: bytes) -> bytes:
        """Seed of the sum check's coefficients and member offsets."""
        return derive_key(self._secret, "group key check", h1)

    def model_key(self, h1: bytes) -> bytes:
        """Key that seals a training state after the round of h1 (or of a plan's digest, for S_0)."""
        return derive_key(self._secret, "group key model", h1)

    def state_key(self) -> bytes:
        """Key of the digests of training states and layouts."""
        return derive_key(self._secret, "group key state")

    def receipt_key(self) -> bytes:
        """Key of the receipts' digest of the sum."""
        return derive_key(self._secret, "group key receipt")

    def secret_bytes(self) -> bytes:
        """The 32 secret bytes, for sealing to a member or a key file with mode 0600."""
        return self._secret

    def __repr__(self) -> str:
        return f"<GroupKey epoch {self.epoch} id {self.key_id.hex()[:16]}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a group key can't be pickled")
