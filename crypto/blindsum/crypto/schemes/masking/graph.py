"""Who is whose neighbour (protocols.md 3; Bell et al., CCS 2020, section 3.2).

Up to `COMPLETE_UP_TO` members everyone is everyone's neighbour. Above, members stand on a ring in an
order that hashes the signed list of members, and each has the k/2 before it and the k/2 after it.
Positions are indices into U1; every row of neighbours is ascending.
"""

import hashlib

import numpy as np
from blindsum.crypto.primitives.derivation import labelled
from numpy.typing import NDArray

Positions = NDArray[np.int64]

_WORD = 2**32


class Graph:
    """The neighbour graph of a cohort of n with k neighbours each: complete for k = n - 1, else a ring.

    `seed` binds the ring's order: it must name the round and the whole signed list of members.
    """

    def __init__(self, n: int, k: int, seed: bytes) -> None:
        if not 0 < k < n or (k < n - 1 and k % 2):
            raise ValueError(f"no graph of {n} members with {k} neighbours each")
        self.n = n
        self.k = k
        if k < n - 1:
            self._order: Positions = np.array(permutation(n, seed), dtype=np.int64)
            self._place: Positions = np.empty(n, dtype=np.int64)
            self._place[self._order] = np.arange(n)
            self._steps: Positions = np.array([step for step in range(-(k // 2), k // 2 + 1) if step])

    def neighbours(self, position: int) -> Positions:
        """The k neighbours of one member, ascending."""
        if self.k == self.n - 1:
            return np.delete(np.arange(self.n), position)
        return np.sort(self._order[(self._place[position] + self._steps) % self.n])

    def table(self) -> Positions:
        """The neighbours of every member: shape (n, k), rows ascending."""
        if self.k == self.n - 1:
            everyone = np.broadcast_to(np.arange(self.n), (self.n, self.n))
            return everyone[~np.eye(self.n, dtype=np.bool_)].reshape(self.n, self.k)
        rows: Positions = self._order[(self._place[:, None] + self._steps) % self.n]
        rows.sort(axis=1)
        return rows


def permutation(n: int, seed: bytes) -> list[int]:
    """Fisher-Yates over 0..n-1, unbiased, from SHAKE-256 of the seed (FIPS 202).

    From the last place down, place i is swapped with word mod (i + 1); words are 32 bits,
    little-endian, in order; a word at or above the largest multiple of i + 1 is skipped.
    """
    order = list(range(n))
    shake = hashlib.shake_256(labelled("masking graph", seed))
    words: list[int] = []
    used = 0
    for place in range(n - 1, 0, -1):
        choices = place + 1
        limit = _WORD - _WORD % choices
        while True:
            if used == len(words):
                # A longer output of SHAKE starts with the shorter one.
                words = np.frombuffer(shake.digest(4 * (2 * used + n)), dtype="<u4").tolist()
            word = words[used]
            used += 1
            if word < limit:
                break
        other = word % choices
        order[place], order[other] = order[other], order[place]
    return order
