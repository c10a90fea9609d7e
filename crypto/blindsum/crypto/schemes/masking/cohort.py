"""U1, the cohort of a round, and what both sides derive from it: h1, thresholds, graph."""

import numpy as np
from blindsum.crypto.primitives.derivation import labelled_hash
from blindsum.crypto.schemes.base import RoundTerms
from blindsum.crypto.schemes.masking.graph import Graph
from blindsum.crypto.schemes.masking.thresholds import thresholds
from numpy.typing import NDArray


class Cohort:
    """The members of a round by position, fixed when the advertise step closes.

    `members` and `leaves` are the bytes of `ShareRequest`. Their hash is root(U1): everyone gets the
    whole list, so a flat hash binds it as well as a tree would, and nobody needs a path into it.

    Raises `ParameterRefused` if no (k, t) exists for this many members.
    """

    def __init__(self, terms: RoundTerms, members: bytes, leaves: bytes) -> None:
        header = terms.bound.header
        self.members = members
        self.leaves = leaves
        self.indices: NDArray[np.uint32] = np.frombuffer(members, dtype="<u4")
        self.n = len(self.indices)
        self.limits = thresholds(self.n, header.gamma, header.delta, header.security)
        self.k = self.limits.neighbours
        self.t = self.limits.shares
        h0 = terms.bound.h0
        self.root = labelled_hash("masking cohort", h0, members, leaves)
        self.h1 = labelled_hash("u1", h0, self.root)
        self.graph = Graph(self.n, self.k, labelled_hash("masking graph seed", h0, self.root))
        self._roster = terms.roster.members

    def id(self, position: int) -> str:
        """The name of the member at a position."""
        return self._roster[int(self.indices[position])].id

    def identity(self, position: int) -> bytes:
        """The identity key, from the roster, of the member at a position."""
        return self._roster[int(self.indices[position])].identity

    def ids(self, flags: NDArray[np.bool_]) -> tuple[str, ...]:
        """The names of the members whose flag is set, in roster order."""
        return tuple(self._roster[index].id for index in self.indices[flags].tolist())

    def leaf(self, position: int) -> bytes:
        """The leaf hash of the member at a position."""
        return self.leaves[32 * position : 32 * position + 32]
