"""k and t: the table of the specification, and the tails in exact integers."""

from fractions import Fraction
from math import comb

import pytest
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.masking.thresholds import Thresholds, complete_graph, ring, thresholds

TABLE = {
    (50, 50): {
        100: (16, 11, 16, 11), 1000: (52, 37, 66, 49), 10_000: (62, 44, 82, 61),
        100_000: (68, 48, 88, 65),
    },
    (100, 100): {
        100: (32, 22, 32, 22), 1000: (96, 67, 120, 87), 10_000: (122, 85, 156, 113),
        100_000: (134, 93, 172, 124),
    },
    (50, 300): {
        100: (66, 36, 66, 36), 1000: (314, 179, 336, 194), 10_000: (522, 299, 620, 362),
        100_000: (602, 344, 722, 421),
    },
    (200, 200): {
        100: (62, 42, 62, 42), 1000: (302, 206, 356, 248), 10_000: (482, 328, 610, 424),
        100_000: (552, 375, 698, 484),
    },
}  # fmt: skip
ROWS = [(n, *rates, *values) for rates, row in TABLE.items() for n, values in row.items()]


@pytest.mark.parametrize(("n", "gamma", "delta", "k40", "t40", "k80", "t80"), ROWS)
def test_the_published_table(n: int, gamma: int, delta: int, k40: int, t40: int, k80: int, t80: int) -> None:
    assert ring(n, gamma, delta, 40, window=False) == Thresholds(k40, t40)
    assert ring(n, gamma, delta, 80, window=False) == Thresholds(k80, t80)


@pytest.mark.parametrize(("n", "t"), [(3, 2), (4, 3), (5, 3), (6, 4), (7, 5), (8, 5), (10, 7)])
def test_the_complete_graph(n: int, t: int) -> None:
    assert thresholds(n, 333, 333, 80) == Thresholds(n - 1, t)


@pytest.mark.parametrize("gamma", [0, 100, 333, 500, 900])
def test_two_halves_of_a_complete_graph_never_both_reach_the_threshold(gamma: int) -> None:
    for n in range(3, 201):
        corrupt = n // 3 if gamma == 333 else n * gamma // 1000
        try:
            limits = complete_graph(n, gamma)
        except ParameterRefused:
            assert (n - 1 + corrupt) // 2 + 1 > n - 1
            continue
        # Each half has its honest members, and every colluder answers both.
        assert 2 * limits.shares > limits.neighbours + corrupt
        assert corrupt < limits.shares <= limits.neighbours


def hypergeometric(n: int, marked: int, draws: int, i: int) -> Fraction:
    return Fraction(comb(marked, i) * comb(n - marked, draws - i), comb(n, draws))


@pytest.mark.parametrize(
    ("n", "gamma", "delta", "security"),
    [(201, 50, 50, 80), (300, 50, 300, 80), (300, 100, 100, 40), (1000, 50, 50, 80), (1000, 50, 300, 80)],
)
def test_the_tails_in_exact_arithmetic(n: int, gamma: int, delta: int, security: int) -> None:
    limits = ring(n, gamma, delta, security)
    k, t = limits.neighbours, limits.shares
    corrupt, dropped = n * gamma // 1000, n * delta // 1000
    rare = Fraction(1, 2 ** (security + 1))
    assert k % 2 == 0
    assert Fraction(n * (n - k - 1), 2) * Fraction(comb(corrupt + dropped, k), comb(n, k)) < rare
    t1 = next(
        x
        for x in range(k + 1)
        if sum(hypergeometric(n, corrupt, k, i) for i in range(x + 1, min(k, corrupt) + 1)) <= rare / n
    )
    assert t > -((5 - 4 * (t1 + k)) // 8)  # ceil((t1 + k - 1.25) / 2)
    few_alive = sum(hypergeometric(n, n - dropped, k, i) for i in range(max(0, k - dropped), t))
    assert few_alive <= Fraction(1, 2**20 * n)
    window = sum(hypergeometric(n, corrupt, k // 2, i) for i in range(t - k // 2, min(k // 2, corrupt) + 1))
    assert Fraction(n * n, 2) * window * window <= Fraction(1, 2**60)


@pytest.mark.parametrize(
    ("n", "gamma", "delta"), [(201, 333, 333), (1000, 200, 450), (1000, 800, 150), (100_000, 0, 500)]
)
def test_where_no_graph_exists_it_is_said(n: int, gamma: int, delta: int) -> None:
    with pytest.raises(ParameterRefused, match="smaller gamma and delta"):
        thresholds(n, gamma, delta, 80)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_members_are_refused(n: int) -> None:
    with pytest.raises(ParameterRefused, match="at least 3"):
        thresholds(n, 333, 333, 80)
