"""The masking scheme: SecAgg up to 200 members, SecAgg+ above, for a server that may be malicious."""

from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.primitives.derivation import Random
from blindsum.crypto.schemes.base import BulkLayout, MemberKeys, RoundTerms, StepName
from blindsum.crypto.schemes.masking.aggregator import MaskingAggregator
from blindsum.crypto.schemes.masking.frames import bulk_layout, lane_layout
from blindsum.crypto.schemes.masking.member import MaskingMember, round_secrets
from blindsum.crypto.schemes.masking.messages import MAX_MEMBERS
from blindsum.crypto.schemes.masking.thresholds import COMPLETE_UP_TO, colluders, thresholds


class Masking:
    """`Scheme` for masking: five steps, exact integer sums, no key that opens everyone."""

    name = "masking"
    steps: tuple[StepName, ...] = ("advertise", "share", "upload", "confirm", "reveal")

    def trust_line(self, terms: RoundTerms) -> str:
        """Who would have to collude to learn an update, with this round's numbers."""
        header = terms.bound.header
        corrupt = colluders(header.n_min, header.gamma)
        return (
            f"No server and no key opens a single update: the aggregator would need more than {corrupt} of "
            f"{header.n_min} members (gamma = {header.gamma} per mille of the cohort) to collude with it; "
            f"short of that it learns at most, and only if one member gives it the group key, sums over at "
            f"least {header.n_min - corrupt} honest members. Traffic recorded today isn't protected "
            f"from a future quantum computer."
        )

    def check_terms(self, terms: RoundTerms) -> None:
        """Prove that lanes can't overflow and that k and t exist. Raises `ParameterRefused`."""
        header = terms.bound.header
        if header.scheme != self.name:
            raise ParameterRefused(f"the round's scheme is {header.scheme}, not {self.name}")
        if not header.n_min <= header.n_max <= MAX_MEMBERS:
            raise ParameterRefused(
                f"needs n_min <= n_max <= {MAX_MEMBERS}, got {header.n_min} and {header.n_max}"
            )
        lane_layout(header)
        sizes = {header.n_min, header.n_max}
        if header.n_min <= COMPLETE_UP_TO < header.n_max:
            sizes.add(COMPLETE_UP_TO + 1)
        for n in sorted(sizes):
            thresholds(n, header.gamma, header.delta, header.security)

    def bulk_layout(self, terms: RoundTerms) -> BulkLayout:
        """Exact sizes of the bulk step: 8 / m bytes a field."""
        return bulk_layout(terms.bound.header)

    def member(self, terms: RoundTerms, keys: MemberKeys, random: Random) -> MaskingMember:
        """A member's machine; draws the round's secrets. Raises `ParameterRefused`, `DocumentError`."""
        self._check_keys(terms, keys)
        return MaskingMember(terms, keys, round_secrets(random))

    def restore_member(
        self, terms: RoundTerms, keys: MemberKeys, snapshot: bytes, random: Random
    ) -> MaskingMember:
        """A member's machine from a snapshot; it draws nothing. Raises `Refused`."""
        del random
        self._check_keys(terms, keys)
        return MaskingMember.restored(terms, keys, snapshot)

    def aggregator(self, terms: RoundTerms, exclude: frozenset[str] = frozenset()) -> MaskingAggregator:
        """The aggregator's machine at the start of a round. Raises `ParameterRefused`."""
        self.check_terms(terms)
        return MaskingAggregator(terms, exclude)

    def _check_keys(self, terms: RoundTerms, keys: MemberKeys) -> None:
        self.check_terms(terms)
        if terms.roster.entry(keys.member).identity != keys.identity.public:
            raise ParameterRefused(f"the roster has another identity key for {keys.member} than was given")
        if keys.group_key.key_id != terms.bound.header.group_key:
            raise ParameterRefused("the round is sealed under another group key; fetch this epoch's envelope")
