"""Who is in the federation and which images each site holds, seen through its own simulated scanner.

Eight sites share the images of PneumoniaMNIST (see `data/ATTRIBUTION.md`): a hospital, six clinics, and a
clinic that joins late. No image is at two sites. Training images come from the official training split, a
site's own validation images from the official validation split, and every site is tested on all official test
images through its scanner. Tuning and training call `load_site`; only the final table calls `load_test`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Scanner = Callable[[Pixels, np.random.Generator], Pixels]
Split = Literal["train", "val", "test"]

_SIDE: Final = 28


@dataclass(frozen=True)
class Images:
    """Images as one site sees them.

    `pixels` is float32 (n, 28, 28) in [0, 1], `labels` uint8 (n,) with 1 for pneumonia, `rows` int64 (n,) the
    rows of the official split that they were made from.
    """

    pixels: Pixels
    labels: NDArray[np.uint8]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class SiteSpec:
    """A site: its number of training images, the share of pneumonia among them, and its scanner."""

    name: str
    examples: int
    prevalence: float
    validation: int
    scanner: Scanner
    scanner_text: str

    @property
    def class_counts(self) -> tuple[int, int]:
        """Training images without and with pneumonia."""
        positive = round(self.examples * self.prevalence)
        return self.examples - positive, positive


@dataclass(frozen=True)
class SiteData:
    """What a site holds for its own training: training images and a small, balanced validation set."""

    spec: SiteSpec
    train: Images
    validation: Images


def _as_is(pixels: Pixels, _noise: np.random.Generator) -> Pixels:
    return pixels


def _over_exposed(pixels: Pixels, _noise: np.random.Generator) -> Pixels:
    return np.asarray(np.clip(pixels**0.45 * 1.05, 0, 1), dtype=np.float32)


def _low_contrast(pixels: Pixels, _noise: np.random.Generator) -> Pixels:
    return 0.25 + 0.35 * pixels**1.6


def _inverted(pixels: Pixels, _noise: np.random.Generator) -> Pixels:
    return 1 - pixels


def _portable(pixels: Pixels, noise: np.random.Generator) -> Pixels:
    grain = noise.normal(0, 0.06, pixels.shape).astype(np.float32)
    return np.asarray(np.clip(_blur(pixels, 0.8) + grain, 0, 1), dtype=np.float32)


def _tilted(pixels: Pixels, _noise: np.random.Generator) -> Pixels:
    return _turn_and_magnify(pixels, degrees=14, factor=1.2)


def _darker(pixels: Pixels, _noise: np.random.Generator) -> Pixels:
    return 0.15 + 0.8 * pixels**1.4


FEDERATION: Final[tuple[SiteSpec, ...]] = (
    SiteSpec("hospital", 1600, 0.74, 80, _as_is, "as it is"),
    SiteSpec("clinic-1", 120, 0.50, 24, _as_is, "as it is"),
    SiteSpec("clinic-2", 80, 0.25, 24, _over_exposed, "over-exposed"),
    SiteSpec("clinic-3", 60, 0.85, 24, _low_contrast, "low contrast"),
    SiteSpec("clinic-4", 100, 0.50, 24, _inverted, "inverted polarity"),
    SiteSpec("clinic-5", 50, 0.70, 24, _portable, "portable: blurred and noisy"),
    SiteSpec("clinic-6", 40, 0.35, 24, _tilted, "tilted by 14 degrees, magnified 1.2 times"),
    SiteSpec("late-clinic", 16, 0.50, 16, _darker, "mildly darker"),
)
"""All sites, in the order of the table: the hospital, the clinics, and last the late clinic."""

HOSPITAL: Final = "hospital"
LATE_CLINIC: Final = "late-clinic"
CLINICS: Final = tuple(spec.name for spec in FEDERATION if spec.name.startswith("clinic-"))
COHORT: Final = (HOSPITAL, *CLINICS)
"""The seven sites that train together from the first round."""


def site_spec(name: str) -> SiteSpec:
    """The site called `name`. Raises ValueError with the known names otherwise."""
    for spec in FEDERATION:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in FEDERATION)
    raise ValueError(f"no site is called {name!r}; the sites are {known}")


def load_site(name: str, seed: int) -> SiteData:
    """Training and validation images of one site.

    The same seed gives every site its part of one split, so that separate processes agree on it without
    talking. Raises ValueError for an unknown site.
    """
    spec = site_spec(name)
    train = _share(spec, "train", seed)
    validation = _share(spec, "val", seed)
    return SiteData(spec, train, validation)


def load_test(name: str, seed: int) -> Images:
    """All 624 official test images through the site's scanner; for the final table only.

    The seed reaches nothing but the grain of a noisy scanner. Raises ValueError for an unknown site.
    """
    spec = site_spec(name)
    pixels, labels = _official("test")
    rows = np.arange(len(labels), dtype=np.int64)
    return _scan(spec, "test", seed, pixels, labels, rows)


def load_tuning(name: str, seed: int) -> Images:
    """All distinct official validation images through the site's scanner.

    Hyperparameters were chosen on these (docs/decisions/0005-clinics-training.md); no site owns as many.
    Raises ValueError for an unknown site.
    """
    spec = site_spec(name)
    pixels, labels = _official("val")
    rows = _distinct_rows("val")
    return _scan(spec, "tuning", seed, pixels[rows], labels[rows], rows)


def _official(split: Split) -> tuple[Pixels, NDArray[np.uint8]]:
    """Pixels in [0, 1] and labels of one official split. The archive is lazy: other splits are never read."""
    archive = resources.files("blindsum.examples.clinics").joinpath("data/pneumoniamnist_28.npz")
    with archive.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        pixels = arrays[f"{split}_images"].astype(np.float32) / 255
        labels = arrays[f"{split}_labels"].reshape(-1).astype(np.uint8)
    return pixels, labels


@cache
def _distinct_rows(split: Literal["train", "val"]) -> NDArray[np.int64]:
    """Rows without repeats; for validation also without images that equal a training image."""
    seen: set[bytes] = set()
    if split == "val":
        seen.update(image.tobytes() for image in _official("train")[0])
    rows = []
    for row, image in enumerate(_official(split)[0]):
        content = image.tobytes()
        if content not in seen:
            seen.add(content)
            rows.append(row)
    distinct = np.array(rows, dtype=np.int64)
    distinct.flags.writeable = False
    return distinct


def _share(spec: SiteSpec, split: Literal["train", "val"], seed: int) -> Images:
    """The site's part: one seeded order of each class is dealt to the sites in the order of `FEDERATION`."""
    pixels, labels = _official(split)
    distinct = _distinct_rows(split)
    dealer = _generator(seed, "split", split)
    parts = []
    for label in (0, 1):
        order = dealer.permutation(distinct[labels[distinct] == label])
        start = 0
        for other in FEDERATION:
            count = other.class_counts[label] if split == "train" else other.validation // 2
            if other is spec:
                parts.append(order[start : start + count])
                break
            start += count
    rows = _generator(seed, "order", split, spec.name).permutation(np.concatenate(parts))
    return _scan(spec, split, seed, pixels[rows], labels[rows], rows)


def _scan(
    spec: SiteSpec,
    purpose: str,
    seed: int,
    pixels: Pixels,
    labels: NDArray[np.uint8],
    rows: NDArray[np.int64],
) -> Images:
    scanned = spec.scanner(pixels, _generator(seed, "scanner", purpose, spec.name))
    return Images(scanned.astype(np.float32, copy=False), labels, rows)


def _generator(seed: int, *purpose: str) -> np.random.Generator:
    """A stream for one purpose. It deals images and grain, never anything that protects them."""
    text = "/".join((str(seed), *purpose))
    return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))


def _blur(pixels: Pixels, sigma: float) -> Pixels:
    """Gaussian blur with `sigma` in pixels; the border is continued."""
    reach = int(np.ceil(3 * sigma))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)), mode="edge")
    lines = sum(weight * padded[:, i : i + _SIDE, :] for i, weight in enumerate(kernel))
    blurred = sum(weight * lines[:, :, i : i + _SIDE] for i, weight in enumerate(kernel))
    return np.asarray(blurred, dtype=np.float32)


def _turn_and_magnify(pixels: Pixels, degrees: float, factor: float) -> Pixels:
    """Turns about the centre and magnifies, with bilinear sampling; the border is continued."""
    centre = (_SIDE - 1) / 2
    y, x = np.mgrid[:_SIDE, :_SIDE] - centre
    angle = np.deg2rad(degrees)
    source_x = np.clip((np.cos(angle) * x + np.sin(angle) * y) / factor + centre, 0, _SIDE - 1)
    source_y = np.clip((np.cos(angle) * y - np.sin(angle) * x) / factor + centre, 0, _SIDE - 1)
    left = np.minimum(source_x.astype(np.int64), _SIDE - 2)
    top = np.minimum(source_y.astype(np.int64), _SIDE - 2)
    right_part = (source_x - left).astype(np.float32)
    lower_part = (source_y - top).astype(np.float32)
    upper = pixels[:, top, left] * (1 - right_part) + pixels[:, top, left + 1] * right_part
    lower = pixels[:, top + 1, left] * (1 - right_part) + pixels[:, top + 1, left + 1] * right_part
    return np.asarray(upper * (1 - lower_part) + lower * lower_part, dtype=np.float32)
