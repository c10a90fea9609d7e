"""The split of the example federation and its simulated scanners."""

from __future__ import annotations

import numpy as np
import pytest
from blindsum.examples.clinics import sites
from blindsum.examples.clinics.sites import FEDERATION, Images, load_site, load_test, load_tuning, site_spec

EXPECTED = {
    "hospital": (1600, 0.74),
    "clinic-1": (120, 0.50),
    "clinic-2": (80, 0.25),
    "clinic-3": (60, 0.85),
    "clinic-4": (100, 0.50),
    "clinic-5": (50, 0.70),
    "clinic-6": (40, 0.35),
    "late-clinic": (16, 0.50),
}


def _through(name: str, pixels: np.ndarray, seed: int = 0) -> np.ndarray:
    return site_spec(name).scanner(pixels, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def plain_test() -> np.ndarray:
    return load_test("hospital", 0).pixels


def test_sites_have_the_announced_sizes_and_prevalence() -> None:
    assert [spec.name for spec in FEDERATION] == list(EXPECTED)
    for name, (examples, prevalence) in EXPECTED.items():
        site = load_site(name, 0)
        assert len(site.train) == examples
        assert site.train.labels.mean() == pytest.approx(prevalence, abs=0.5 / examples)
        assert site.validation.labels.mean() == 0.5
    assert tuple(EXPECTED)[:7] == sites.COHORT
    assert len(sites.CLINICS) == 6


@pytest.mark.parametrize("split", ["train", "validation"])
def test_no_image_is_at_two_sites(split: str) -> None:
    parts: list[Images] = [getattr(load_site(spec.name, 5), split) for spec in FEDERATION]
    rows = np.concatenate([part.rows for part in parts])
    assert len(set(rows.tolist())) == len(rows)


def test_no_image_content_occurs_twice_in_training_validation_and_test() -> None:
    contents: set[bytes] = set()
    count = 0
    for split, key in (("train", "train"), ("validation", "val")):
        originals, _ = sites._official(key)  # type: ignore[arg-type]
        for spec in FEDERATION:
            rows = getattr(load_site(spec.name, 2), split).rows
            contents.update(image.tobytes() for image in originals[rows])
            count += len(rows)
    assert len(contents) == count
    tests, _ = sites._official("test")
    assert not contents & {image.tobytes() for image in tests}


def test_tuning_images_are_distinct_validation_images() -> None:
    tuning = load_tuning("hospital", 0)
    assert len({image.tobytes() for image in tuning.pixels}) == len(tuning) == 516
    training, _ = sites._official("train")
    assert not {image.tobytes() for image in tuning.pixels} & {image.tobytes() for image in training}


def test_split_depends_on_the_seed_alone() -> None:
    for name in ("clinic-5", "hospital"):
        first, again, other = load_site(name, 3), load_site(name, 3), load_site(name, 4)
        for split in ("train", "validation"):
            a, b, c = (getattr(site, split) for site in (first, again, other))
            assert np.array_equal(a.rows, b.rows)
            assert np.array_equal(a.pixels, b.pixels)
            assert np.array_equal(a.labels, b.labels)
            assert not np.array_equal(a.rows, c.rows)


@pytest.mark.parametrize("name", list(EXPECTED))
def test_every_site_is_tested_on_all_test_images(name: str, plain_test: np.ndarray) -> None:
    test = load_test(name, 0)
    assert np.bincount(test.labels).tolist() == [234, 390]
    assert test.pixels.shape == (624, 28, 28)
    assert test.pixels.dtype == np.float32
    assert test.pixels.min() >= 0
    assert test.pixels.max() <= 1
    assert np.array_equal(test.pixels, load_test(name, 0).pixels)
    same = np.array_equal(test.pixels, plain_test)
    assert same == (name in ("hospital", "clinic-1"))


def test_point_scanners_follow_their_curves() -> None:
    ramp = np.linspace(0, 1, 28 * 28, dtype=np.float32).reshape(1, 28, 28)
    assert np.allclose(_through("clinic-2", ramp), np.clip(ramp**0.45 * 1.05, 0, 1), atol=1e-6)
    assert np.allclose(_through("clinic-3", ramp), 0.25 + 0.35 * ramp**1.6, atol=1e-6)
    assert np.allclose(_through("clinic-4", ramp), 1 - ramp, atol=1e-6)
    assert np.allclose(_through("late-clinic", ramp), 0.15 + 0.8 * ramp**1.4, atol=1e-6)


def test_portable_scanner_blurs_and_adds_grain() -> None:
    grey = np.full((200, 28, 28), 0.5, dtype=np.float32)
    grain = _through("clinic-5", grey) - grey
    assert abs(grain.mean()) < 1e-3
    assert grain.std() == pytest.approx(0.06, rel=0.02)
    assert not np.array_equal(grain, _through("clinic-5", grey, seed=1) - grey)

    point = np.zeros((2000, 28, 28), dtype=np.float32)
    point[:, 14, 14] = 1
    spread = sites._blur(point[:1], 0.8)[0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    offsets = np.arange(28) - 14
    assert (spread.sum(axis=0) * offsets**2).sum() == pytest.approx(0.8**2, rel=0.05)


def test_tilted_scanner_turns_by_14_degrees_and_magnifies() -> None:
    """A dot off the centre moves out by 1.2 and around by 14 degrees."""
    y, x = np.mgrid[:28, :28] - 13.5
    dot = np.exp(-((x - 6) ** 2 + y**2) / 4).astype(np.float32)[None]
    seen = _through("clinic-6", dot)[0]
    mass = seen.sum()
    centre_x, centre_y = (seen * x).sum() / mass, (seen * y).sum() / mass
    assert np.hypot(centre_x, centre_y) == pytest.approx(6 * 1.2, rel=0.02)
    assert abs(np.rad2deg(np.arctan2(centre_y, centre_x))) == pytest.approx(14, abs=0.5)


def test_unknown_site_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"clinic-9.*hospital.*late-clinic"):
        load_site("clinic-9", 0)
