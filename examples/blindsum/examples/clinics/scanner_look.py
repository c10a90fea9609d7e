"""How another site's scanner would have shown one's own images, guessed from a few of that site's images.

The hospital has many labelled images and ten from a clinic. What differs in a scanner is found in two steps:
the tilt, size and polarity at which the hospital's mean image looks most like the clinic's (a template
registration), and the grey values (a histogram match, rank by rank; Nyúl and Udupa 1999). Its own images,
shown that way, are more training images for that scanner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from blindsum.examples.clinics.model import standardise
from torch import Tensor, nn

_DEGREES: Final = range(-20, 21, 2)
_SIZES: Final = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25)
_GREYS: Final = 33
_TEMPLATE: Final = 400


@dataclass(frozen=True)
class ScannerLook:
    """A turn in degrees, a magnification, whether black and white are exchanged, and grey values by rank."""

    degrees: float
    magnification: float
    inverted: bool
    greys_here: Tensor
    greys_there: Tensor

    @classmethod
    def of(cls, own: Tensor, theirs: Tensor) -> ScannerLook:
        """From images (n, 28, 28) of both sites; labels aren't needed."""
        template = standardise(own[:_TEMPLATE]).mean(dim=0, keepdim=True)
        aim = standardise(theirs).mean(dim=0, keepdim=True)
        best: tuple[float, float, float] = (-1.0, 0.0, 1.0)
        sign = 1.0
        for degrees in _DEGREES:
            for size in _SIZES:
                likeness = _correlation(_moved(template, degrees, size), aim)
                if abs(likeness) > best[0]:
                    best, sign = (abs(likeness), degrees, size), math.copysign(1.0, likeness)
        ranks = torch.linspace(0, 1, _GREYS)
        there = torch.quantile(theirs.flatten(), ranks)
        # A quantile takes at most 16 million values, and a few thousand say enough.
        here = torch.quantile(own[:_TEMPLATE].flatten(), ranks)
        return cls(best[1], best[2], sign < 0, here, there if sign > 0 else there.flip(0))

    def show(self, images: Tensor) -> Tensor:
        """The images as that scanner would have shown them: float32 (n, 28, 28) in [0, 1]."""
        flat = images.flatten().contiguous()
        above = torch.searchsorted(self.greys_here.contiguous(), flat).clamp(1, _GREYS - 1)
        low, high = self.greys_here[above - 1], self.greys_here[above]
        part = ((flat - low) / (high - low + 1e-6)).clamp(0, 1)
        greys = torch.lerp(self.greys_there[above - 1], self.greys_there[above], part)
        return _moved(greys.reshape(images.shape), self.degrees, self.magnification).clamp(0, 1)


def _moved(images: Tensor, degrees: float, magnification: float) -> Tensor:
    """Turned about the centre and magnified, the border continued."""
    angle, factor = math.radians(degrees), 1 / magnification
    cosine, sine = factor * math.cos(angle), factor * math.sin(angle)
    affine = torch.tensor([[cosine, -sine, 0.0], [sine, cosine, 0.0]]).expand(len(images), 2, 3)
    grid = nn.functional.affine_grid(affine, [len(images), 1, *images.shape[1:]], align_corners=False)
    moved = nn.functional.grid_sample(images.unsqueeze(1), grid, padding_mode="border", align_corners=False)
    return moved.squeeze(1)


def _correlation(left: Tensor, right: Tensor) -> float:
    a, b = left.flatten() - left.mean(), right.flatten() - right.mean()
    return float(a @ b / (a.norm() * b.norm()))
