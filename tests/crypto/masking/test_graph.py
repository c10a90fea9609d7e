"""The neighbour graph: symmetric, regular, connected, and decided by its seed alone."""

import hashlib

import numpy as np
import pytest
from blindsum.crypto.primitives.derivation import labelled
from blindsum.crypto.schemes.masking.graph import Graph, permutation


@pytest.mark.parametrize(("n", "k"), [(3, 2), (7, 6), (200, 199), (201, 42), (1000, 66), (9, 4), (5, 4)])
def test_neighbourhood_is_symmetric_and_regular(n: int, k: int) -> None:
    graph = Graph(n, k, b"seed")
    table = graph.table()
    assert table.shape == (n, k)
    rows = [set(row) for row in table.tolist()]
    for position, row in enumerate(rows):
        assert graph.neighbours(position).tolist() == sorted(row) == table[position].tolist()
        assert len(row) == k
        assert position not in row
        assert all(position in rows[other] for other in row)
    reached, frontier = {0}, {0}
    while frontier:
        frontier = set().union(*(rows[p] for p in frontier)) - reached
        reached |= frontier
    assert len(reached) == n


def test_the_permutation_is_fisher_yates_over_shake_256() -> None:
    n, seed = 500, b"another"
    words = hashlib.shake_256(labelled("masking graph", seed)).digest(8 * n)
    order, used = list(range(n)), 0
    for place in reversed(range(1, n)):
        while True:
            word = int.from_bytes(words[4 * used : 4 * used + 4], "little")
            used += 1
            if word < 2**32 // (place + 1) * (place + 1):
                break
        other = word % (place + 1)
        order[place], order[other] = order[other], order[place]
    assert permutation(n, seed) == order
    assert sorted(order) == list(range(n))


def test_words_that_would_bias_the_order_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    high, low = b"\xff" * 4, (5).to_bytes(4, "little")

    class Shake:
        def __init__(self, data: bytes) -> None:
            pass

        def digest(self, count: int) -> bytes:
            return (high * 20 + low * 1000)[:count]

    monkeypatch.setattr("blindsum.crypto.schemes.masking.graph.hashlib.shake_256", Shake)
    # 2^32 - 1 is refused for 3 choices, and 5 mod 3 = 2, 5 mod 2 = 1 leave all in place.
    assert permutation(3, b"") == [0, 1, 2]


def test_another_list_gives_another_ring() -> None:
    one, other = Graph(300, 20, b"one"), Graph(300, 20, b"other")
    assert (one.table() != other.table()).any()
    assert (one.table() == Graph(300, 20, b"one").table()).all()


def test_every_place_is_equally_likely() -> None:
    counts = np.zeros((5, 5))
    for trial in range(4000):
        for place, member in enumerate(permutation(5, trial.to_bytes(4, "little"))):
            counts[place, member] += 1
    # 20 degrees of freedom at most; 60 is far in the tail.
    assert float(((counts - 800) ** 2 / 800).sum()) < 60


@pytest.mark.parametrize(("n", "k"), [(5, 0), (5, 5), (6, 3)])
def test_impossible_graphs_are_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match="no graph"):
        Graph(n, k, b"")
