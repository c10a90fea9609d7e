"""The network of the clinics example: a shared body and a small head.

The parameter names start with `body.` or `head.`, so that a name pattern selects what a way shares.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

BODY: Final = "body."
HEAD: Final = "head."
FEATURES: Final = 128
_CHANNELS: Final = 64


class MeanAndMaximum(nn.Module):
    """Mean and maximum of each channel over the image: (n, c, h, w) to (n, 2 c).

    The mean says how much of a pattern there is, the maximum that there is any.
    """

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat((maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))), dim=1)


class RadiographNet(nn.Module):
    """About 24,000 parameters: three convolutions with GroupNorm, then one linear unit.

    GroupNorm keeps no running statistics, so that every tensor of the state is a trained parameter and a
    weighted mean of states is again a state. Takes float32 (n, 28, 28) in any range, returns n logits, above
    0 for pneumonia.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2, bias=False),
            nn.GroupNorm(4, 16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, _CHANNELS, 3, padding=1, bias=False),
            nn.GroupNorm(4, _CHANNELS),
            nn.ReLU(),
            MeanAndMaximum(),
        )
        self.head = nn.Linear(FEATURES, 1)

    def features(self, images: Tensor) -> Tensor:
        """What the body makes of the images: float32 (n, 128)."""
        features: Tensor = self.body(standardise(images).unsqueeze(1))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits of pneumonia: float32 (n,)."""
        logits: Tensor = self.head(self.features(images))
        return logits.squeeze(1)


def standardise(images: Tensor) -> Tensor:
    """Each image with mean 0 and variance 1: float32 (n, 28, 28). It takes out exposure, which differs by
    scanner.
    """
    mean = images.mean(dim=(1, 2), keepdim=True)
    deviation = images.std(dim=(1, 2), keepdim=True, correction=0)
    return (images - mean) / (deviation + 1e-3)


def initial_model(seed: int) -> RadiographNet:
    """The network that every way and every site starts from; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RadiographNet()
    # Channels last: a training step takes about a fifth less time on a CPU.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
