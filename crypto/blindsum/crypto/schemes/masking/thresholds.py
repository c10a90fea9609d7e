"""How many neighbours (k) and how many shares (t) a cohort of n needs (protocols.md 3, "k and t").

Complete graph: any set of server and c = floor(gamma n) colluders that asks two disjoint halves of the
honest members for both shares of one victim needs 2 t > k + c to fail (Bonawitz et al., CCS 2017,
section 6.2). Ring: the tails of the hypergeometric distribution (Bell et al., CCS 2020, section 3.4).

Both sides compute k and t for themselves, so the arithmetic is float64 * and / and + in one fixed order,
which IEEE 754 makes the same everywhere; no logarithms, no gamma function.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from blindsum.crypto.errors import ParameterRefused

COMPLETE_UP_TO = 200
"""Cohorts up to this size use the complete graph, larger ones a Harary ring."""

_ONE_THIRD = 333
_WINDOW = math.sqrt(2.0**-59)
_DROPOUT = 2.0**-20


@dataclass(frozen=True)
class Thresholds:
    """`neighbours` k of each member; `shares` t that rebuild a secret and that live neighbours must reach."""

    neighbours: int
    shares: int

    @property
    def dropouts(self) -> int:
        """Neighbours of one member that may drop out."""
        return self.neighbours - self.shares


def colluders(n: int, gamma: int) -> int:
    """floor(gamma n), gamma in per mille; 333 stands for one third exactly."""
    return n // 3 if gamma == _ONE_THIRD else gamma * n // 1000


def thresholds(n: int, gamma: int, delta: int, security: int) -> Thresholds:
    """(k, t) for a cohort of n. Raises `ParameterRefused` if none exist.

    In the complete graph t is the least that is safe against floor(gamma n) colluders, so the cohort
    bears as many dropouts as it can, k - t, whatever delta says. Above `COMPLETE_UP_TO` members k and t
    come from gamma, delta and the security level.
    """
    return complete_graph(n, gamma) if n <= COMPLETE_UP_TO else ring(n, gamma, delta, security)


def complete_graph(n: int, gamma: int) -> Thresholds:
    """k = n - 1 and t = floor((k + c) / 2) + 1. Raises `ParameterRefused` if t > k."""
    k = n - 1
    t = (k + colluders(n, gamma)) // 2 + 1
    if n < 3 or t > k:
        raise ParameterRefused(
            f"{n} members of whom {colluders(n, gamma)} may collude can't share secrets safely; "
            "masking needs at least 3 members, and gamma below 1"
        )
    return Thresholds(k, t)


@lru_cache(maxsize=4096)
def ring(n: int, gamma: int, delta: int, security: int, window: bool = True) -> Thresholds:
    """The smallest even k, and its least t, that pass every tail and the window check.

    `window=False` leaves the window check out: for comparison with published figures only.
    Raises `ParameterRefused` if no k below n passes.
    """
    corrupt = colluders(n, gamma)
    dropped = n // 3 if delta == _ONE_THIRD else delta * n // 1000
    if 2 * (n - dropped) > n + corrupt:  # else survivors can't outnumber half of neighbours and colluders
        for k in range(2, n, 2):
            t = ring_shares(n, k, corrupt, dropped, security, window)
            if t is not None:
                return Thresholds(k, t)
    raise ParameterRefused(
        f"no neighbour graph for {n} members bears {gamma} per mille colluding and {delta} per mille "
        f"dropping out; use smaller gamma and delta, or cohorts of at most {COMPLETE_UP_TO}"
    )


def ring_shares(n: int, k: int, corrupt: int, dropped: int, security: int, window: bool) -> int | None:
    """The least t for a ring of k neighbours, or None if k is too small.

    t1' + 1 (protocols.md) is the least t that two halves of the neighbours with their colluders can't
    both reach; the window check may ask for more, and t2, what survivors reach, bounds t from above.
    """
    rare = 2.0 ** -(security + 1)
    # Some set of members is cut off from the rest once all of its neighbours are corrupt or gone.
    cut = n * (n - k - 1) / 2.0
    for i in range(k):
        cut *= max(corrupt + dropped - i, 0) / (n - i)
        if cut < rare:
            break
    else:
        return None
    # Pr[survivors < x] = Pr[dropped neighbours > k - x].
    alive = k - _least_upper(n, dropped, k, _DROPOUT / n)
    most_corrupt = _least_upper(n, corrupt, k, rare / n)
    least = -(-(4 * (most_corrupt + k) - 5) // 8) + 1  # ceil((t1 + k - 1.25) / 2) + 1 in integers
    if window:
        # The server chooses who drops: no two windows of k/2 neighbours may hold t - k/2 colluders each.
        # With P = Pr[Hyp(n, A, k/2) >= t - k/2] that is: n^2 / 2 times P^2 is at most 2^-60.
        least = max(least, k // 2 + _least_upper(n, corrupt, k // 2, _WINDOW / n) + 1)
    return least if least <= alive else None


def _probabilities(n: int, marked: int, draws: int) -> list[float]:
    """Pr[Hyp(n, marked, draws) = i] for i = 0, 1, ... draws.

    From the likeliest i outwards: far away terms may be impossible or too small for a float, and a product
    that starts with one of them would be zero everywhere. `fsum` rounds the same in every Python.
    """
    mode = (draws + 1) * (marked + 1) // (n + 2)
    unmarked = n - marked
    weights = [0.0] * (draws + 1)
    weights[mode] = 1.0
    for i in range(mode, min(draws, marked)):
        weights[i + 1] = weights[i] * ((marked - i) * (draws - i)) / ((i + 1) * (unmarked - draws + i + 1))
    for i in range(mode, max(0, draws - unmarked), -1):
        weights[i - 1] = weights[i] * (i * (unmarked - draws + i)) / ((marked - i + 1) * (draws - i + 1))
    whole = math.fsum(weights)
    return [weight / whole for weight in weights]


def _least_upper(n: int, marked: int, draws: int, bound: float) -> int:
    """Least x with Pr[Hyp(n, marked, draws) > x] <= bound."""
    tail = 0.0
    x = draws
    for p in reversed(_probabilities(n, marked, draws)):
        tail += p
        if tail > bound:
            return x
        x -= 1
    return 0
