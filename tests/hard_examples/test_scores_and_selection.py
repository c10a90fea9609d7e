"""Doubt, novelty, what is proposed, and how old and new examples are mixed."""

import numpy as np
import pytest
from blindsum.client.hard_examples import Novelty, auroc, doubt, propose, replay_batches
from blindsum.crypto.errors import Refused

DRAWS = np.random.default_rng(5)
LABELS = np.arange(300) % 2


def features(shift: float = 0.0, count: int = 300) -> dict[str, np.ndarray]:
    """Two groups; the first shows a scanner's shift, the second shows the class."""
    of_class = (np.arange(count) % 2)[:, None] * 2.0
    return {
        "first": DRAWS.normal(shift, 1, (count, 3)),
        "last": DRAWS.normal(0, 1, (count, 4)) + of_class,
    }


@pytest.fixture(scope="module")
def novelty() -> Novelty:
    return Novelty.fit(features(), LABELS, features(count=100))


def test_doubt_is_entropy() -> None:
    assert np.allclose(doubt([0.0, 100.0, -100.0]), [1, 0, 0])
    assert np.allclose(doubt([[1, 1, 1], [50, 0, 0]]), [1, 0])
    assert np.allclose(doubt([2.0]), doubt([[0.0, 2.0]]))
    chance = 1 / (1 + np.exp(-2.0))
    expected = -(chance * np.log(chance) + (1 - chance) * np.log(1 - chance)) / np.log(2)
    assert np.allclose(doubt([2.0]), expected)


def test_auroc_counts_pairs() -> None:
    assert auroc([1, 2], [3, 4]) == 1
    assert auroc([1, 2, 3], [2]) == 0.5
    low, high = DRAWS.integers(0, 9, 40), DRAWS.integers(3, 12, 30)
    pairs = np.mean([(b > a) + (b == a) / 2 for a in low for b in high])
    assert auroc(low, high) == pytest.approx(pairs)


def test_novelty_finds_a_shift_and_nothing_where_there_is_none(novelty: Novelty) -> None:
    familiar = novelty.score(features())
    assert auroc(familiar, novelty.score(features())) == pytest.approx(0.5, abs=0.07)
    assert auroc(familiar, novelty.score(features(3.0))) > 0.95
    assert novelty.is_flagged(features(1.5, 40))
    assert not novelty.is_flagged(features(0.0, 40))
    assert not novelty.is_flagged(features(9.0, 4)), "a handful proves nothing"


def test_novelty_travels(novelty: Novelty) -> None:
    again, seen = Novelty.from_bytes(novelty.to_bytes()), features(1.0)
    assert np.array_equal(again.score(seen), novelty.score(seen))
    assert again.threshold == novelty.threshold
    for data in (b"", b"PK\x03\x04 no archive", novelty.to_bytes()[:200]):
        with pytest.raises(Refused):
            Novelty.from_bytes(data)
    with pytest.raises(ValueError, match="groups"):
        novelty.score({"first": seen["first"]})


def test_a_flagged_site_proposes_a_spread_sample_and_the_most_doubtful(novelty: Novelty) -> None:
    logits, seen = DRAWS.normal(0, 3, 60), features(3.0, 60)
    labels = (np.arange(60) < 6).astype(int)  # few of class 1
    found = propose(logits, seen, labels, novelty, quota=10, random=lambda n: b"\1" * n)
    assert found.flagged
    assert len(set(found.rows)) == 10
    sample = [row for row, why in zip(found.rows, found.reasons, strict=True) if why.startswith("random")]
    assert len(sample) == 8
    assert labels[sample].sum() == 4, "even over the classes"
    rest = np.argsort(-doubt(logits), kind="stable")
    assert list(found.rows[8:]) == [row for row in rest if row not in sample][:2]
    other = propose(logits, seen, labels, novelty, quota=10, random=lambda n: b"\2" * n)
    assert set(other.rows) != set(found.rows), "the sample hangs on the seed"


def test_a_familiar_site_proposes_only_the_most_doubtful(novelty: Novelty) -> None:
    logits = DRAWS.normal(0, 3, 60)
    found = propose(logits, features(0.0, 60), np.arange(60) % 2, novelty, quota=10)
    assert not found.flagged
    assert list(found.rows) == list(np.argsort(-doubt(logits), kind="stable")[:2])


def test_one_class_may_be_flagged_alone(novelty: Novelty) -> None:
    seen, labels = features(0.0, 80), np.arange(80) % 2
    seen["first"][labels == 1] += 4
    found = propose(np.zeros(80), seen, labels, novelty, quota=10)
    assert 1 in found.flagged
    assert found.site_flagged or found.flagged == (1,)


def test_replay_mixes_old_and_new_with_classes_even() -> None:
    old, new = np.array([0] * 90 + [1] * 10), np.array([0, 1, 1])
    batches = list(replay_batches(old, new, steps=50, batch=16, seed=1, weights=[1, 1, 9]))
    assert len(batches) == 50
    for batch in batches:
        assert (len(batch.old), len(batch.new)) == (8, 8)
        assert (old[batch.old].sum(), new[batch.new].sum()) == (4, 4)
    drawn = np.bincount(np.concatenate([batch.new for batch in batches]), minlength=3)
    assert drawn[2] > 4 * drawn[1], "by weight"
    again = list(replay_batches(old, new, steps=50, batch=16, seed=1, weights=[1, 1, 9]))
    assert all(np.array_equal(a.old, b.old) for a, b in zip(batches, again, strict=True))
    with pytest.raises(ValueError, match="class 1"):
        next(replay_batches(old, [0, 0], steps=1, batch=16, seed=1))
    with pytest.raises(ValueError, match="equal parts"):
        next(replay_batches(old, new, steps=1, batch=6, seed=1))
