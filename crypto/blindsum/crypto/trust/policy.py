"""The policy: floors that every member pins, signed by the owner (protocols.md 1.2)."""

from typing import Annotated, Literal

import msgspec
from blindsum.crypto.canonical import Document
from blindsum.crypto.trust.documents import Digest, PerMille, UnixTime

KIND = "policy"

SchemeName = Literal["masking", "bfv", "ckks", "paillier"]
Weighting = Literal["size", "sqrt", "equal"]


class Policy(Document, frozen=True, kw_only=True):
    """What no plan, round or server may undercut.

    `gamma` and `delta` are per mille: members that may collude with the server, members that may drop
    out. `max_weight_ratio` caps how much more one member may weigh than another. `reveal` is to whom a
    sum may be opened. `seeded_uploads` lets HE members, who share the key, send half-size ciphertexts.
    `split_cohorts` allows rounds of no more than half of the roster: a lying server can then run two at
    once, each with a true sum of its own. `open_models` lets members publish models that aren't sealed.
    """

    federation: Digest
    version: Annotated[int, msgspec.Meta(ge=1)]
    valid_until: UnixTime
    schemes: tuple[SchemeName, ...]
    n_min: Annotated[int, msgspec.Meta(ge=3, le=100_000)]
    n_max: Annotated[int, msgspec.Meta(ge=3, le=100_000)]
    gamma: PerMille = 333
    delta: PerMille = 333
    security: Literal[40, 80] = 80
    bits_min: Annotated[int, msgspec.Meta(ge=2, le=32)] = 8
    bits_max: Annotated[int, msgspec.Meta(ge=2, le=32)] = 24
    weightings: tuple[Weighting, ...] = ("sqrt", "size", "equal")
    max_weight_ratio: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 16
    max_range_exponent: Annotated[int, msgspec.Meta(ge=-20, le=20)] = 4
    reveal: Literal["members"] = "members"
    seeded_uploads: bool = True
    paillier_bits: Literal[2048, 3072] = 3072
    split_cohorts: bool = False
    open_models: bool = False

    def __post_init__(self) -> None:
        if not self.schemes or len(set(self.schemes)) != len(self.schemes):
            raise ValueError("a policy names at least one scheme, each once")
        if self.n_min > self.n_max:
            raise ValueError(f"n_min = {self.n_min} is above n_max = {self.n_max}")
        if self.bits_min > self.bits_max:
            raise ValueError(f"bits_min = {self.bits_min} is above bits_max = {self.bits_max}")

    def cohort_floor(self, members: int) -> int:
        """Fewest members whose sum may be opened, with so many in the roster.

        Two cohorts of more than half of the roster always share a member, who takes part in one round
        at a time: no server can run both.
        """
        return self.n_min if self.split_cohorts else max(self.n_min, members // 2 + 1)

    def honest_floor(self) -> int:
        """Honest members among which the smallest allowed cohort hides one: n_min - floor(gamma n_min)."""
        return self.n_min - self.gamma * self.n_min // 1000


_FLOORS = ("n_min", "gamma", "security", "bits_min", "paillier_bits")
_CEILINGS = ("n_max", "bits_max", "max_weight_ratio", "max_range_exponent", "seeded_uploads", "split_cohorts")
_CHOICES = ("schemes", "weightings")


def loosened(old: Policy, new: Policy) -> tuple[str, ...]:
    """Settings by which `new` protects members less than `old`, or allows more: for the owner to see."""
    weaker = [name for name in _FLOORS if getattr(new, name) < getattr(old, name)]
    weaker += [name for name in _CEILINGS if getattr(new, name) > getattr(old, name)]
    weaker += [name for name in _CHOICES if set(getattr(new, name)) - set(getattr(old, name))]
    return tuple(weaker)
