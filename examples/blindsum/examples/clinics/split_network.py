"""A network in three parts for collaborative inference: a stem and a tiny exit at the edge, a tail in the
cloud.

All three are trained in the cloud, on the hospital's images: the stem with a linear head (which becomes
the good edge model of the comparison), then the tail and the tiny exit on the stem's features. Whatever is
random here orders batches, varies images and starts weights; it comes nowhere near a key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from blindsum.client.inference.tail_export import EncryptableTail, export_tail
from blindsum.crypto.inference.tail_model import TailModel
from blindsum.examples.clinics.model import standardise
from blindsum.examples.clinics.sites import Pixels, SiteData
from blindsum.examples.clinics.training import TrainingPlan, augment
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]
EdgeBody = Callable[[Pixels], tuple[Floats, Floats]]

EXIT_FILTERS: Final = 2
_CHANNELS: Final = 14
_POSITIONS: Final = 9
FEATURES: Final = _CHANNELS * _POSITIONS
HIDDEN: Final = 64


@dataclass(frozen=True)
class SplitPlan:
    """How the parts are trained; chosen on the official validation images, seeds 100 and 101."""

    rounds: int = 25
    steps: int = 24
    batch: int = 16
    learning_rate: float = 0.025
    weight_decay: float = 5e-3
    tail_epochs: int = 3
    tail_rate: float = 2e-3
    tail_decay: float = 0.05
    exit_epochs: int = 5
    exit_rate: float = 1e-2
    exit_decay: float = 0.01


class Stem(nn.Module):
    """Images to features: float32 (n, 28, 28) to (n, 126), 14 channels at 3 x 3 positions. 7,000
    parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False), nn.GroupNorm(4, 16), nn.ReLU()
        )
        self.rest = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1, bias=False),
            nn.GroupNorm(4, 24),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(24, _CHANNELS, 3, padding=1, bias=False),
            nn.GroupNorm(2, _CHANNELS),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (n, 126)."""
        features: Tensor = self.rest(self.first(standardise(images).unsqueeze(1)))
        return features

    def early(self, images: Tensor) -> Tensor:
        """What the tiny exit looks at: the means of the first two filters, (n, 2).

        A group of GroupNorm has four filters, so a device computes those and no more: 111 parameters in all.
        """
        maps: Tensor = self.first(standardise(images).unsqueeze(1))
        return maps[:, :EXIT_FILTERS].mean(dim=(2, 3))


@dataclass(frozen=True)
class SplitNetwork:
    """The trained parts. `tail` is what the cloud holds."""

    stem: Stem
    head: nn.Linear
    exit: EncryptableTail
    tail: TailModel

    def tiny_edge(self, images: Pixels) -> tuple[Floats, Floats]:
        """The tiny edge model: logits of the early exit (111 parameters in all), and features."""
        with torch.inference_mode():
            pixels = torch.from_numpy(images)
            return _double(self.exit(self.stem.early(pixels))), _double(self.stem(pixels))

    def good_edge(self, images: Pixels) -> tuple[Floats, Floats]:
        """A good edge model: the stem and its linear head."""
        return _with_head(self.stem, self.head, images)

    def features(self, images: Pixels) -> Floats:
        """Features (n, 126) of images (n, 28, 28)."""
        with torch.inference_mode():
            return _double(self.stem(torch.from_numpy(images)))

    def own_head(self, site: SiteData, seed: int, plan: SplitPlan) -> EdgeBody:
        """An edge model with a head that the site fitted on its own images, the stem as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = EncryptableTail(FEATURES, 0)
        batches = [(self.stem(images), labels) for images, labels in _batches(site, plan, _stream(seed, 9))]
        _fit(head, batches, plan.tail_epochs, plan.tail_rate, plan.tail_decay, seed)

        def body(images: Pixels) -> tuple[Floats, Floats]:
            with torch.inference_mode():
                features = self.stem(torch.from_numpy(images))
                return _double(head(features)), _double(features)

        return body


def train_split(site: SiteData, seed: int, plan: SplitPlan) -> SplitNetwork:
    """Train all parts on one site's training images, and export the tail (checked against its torch form)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem, head = Stem(), nn.Linear(FEATURES, 1)
        exit_, tail = EncryptableTail(EXIT_FILTERS, 0), EncryptableTail(FEATURES, HIDDEN)
    optimiser = torch.optim.SGD(
        [*stem.parameters(), *head.parameters()],
        lr=plan.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=plan.weight_decay,
    )
    for number in range(plan.rounds):
        fall = (1 + math.cos(math.pi * number / max(plan.rounds - 1, 1))) / 2
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * (0.05 + 0.95 * fall)
        for images, labels in _batches(site, plan, _stream(seed, 1000 + number)):
            _step(head(stem(images)).squeeze(1), labels, optimiser)
    stem.eval()
    full, early = [], []
    with torch.no_grad():
        for number in range(plan.rounds):
            for images, labels in _batches(site, plan, _stream(seed, 2000 + number)):
                full.append((stem(images), labels))
                early.append((stem.early(images), labels))
    _fit(tail, full, plan.tail_epochs, plan.tail_rate, plan.tail_decay, seed)
    _fit(exit_, early, plan.exit_epochs, plan.exit_rate, plan.exit_decay, seed)
    check = torch.cat([features for features, _ in full[:16]])
    return SplitNetwork(stem, head, exit_, export_tail(tail, check, f"hospital-{seed}"))


def _with_head(stem: Stem, head: nn.Module, images: Pixels) -> tuple[Floats, Floats]:
    with torch.inference_mode():
        features = stem(torch.from_numpy(images))
        return _double(head(features).squeeze(1)), _double(features)


def _double(values: Tensor) -> Floats:
    return values.double().numpy()


def _stream(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 10_000 + number)


def _batches(site: SiteData, plan: SplitPlan, stream: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One round's batches of varied images and labels, half from each class."""
    pixels, labels = torch.from_numpy(site.train.pixels), torch.from_numpy(site.train.labels)
    halves = []
    for label in (0, 1):
        rows = torch.nonzero(labels == label).squeeze(1)
        needed = plan.steps * plan.batch // 2
        passes = [rows[torch.randperm(len(rows), generator=stream)] for _ in range(-(-needed // len(rows)))]
        halves.append(torch.cat(passes)[:needed].view(plan.steps, -1))
    varied = TrainingPlan()
    for rows in torch.cat(halves, dim=1):
        yield augment(pixels[rows], varied, stream), labels[rows].float()


def _fit(
    part: EncryptableTail,
    batches: list[tuple[Tensor, Tensor]],
    epochs: int,
    rate: float,
    decay: float,
    seed: int,
) -> None:
    features = torch.cat([one for one, _ in batches]).detach()
    labels = torch.cat([one for _, one in batches])
    part.standardise_by(features)
    optimiser = torch.optim.AdamW(part.parameters(), lr=rate, weight_decay=decay)
    stream = _stream(seed, 3000)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(features), generator=stream), 64):
            _step(part(features[rows]), labels[rows], optimiser)


def _step(logits: Tensor, labels: Tensor, optimiser: torch.optim.Optimizer) -> None:
    loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()
