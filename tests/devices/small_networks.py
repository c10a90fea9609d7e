"""Networks small enough to be exported in a test, and data that they can be right about."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


def network(width: float = 1.0) -> nn.Module:
    """Fixed convolutions and a fitted last layer: says whether an image is brighter on the left."""
    channels = round(48 * width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels * 64, 1),
        )
        made.requires_grad_(False)
    features = made[:-1](torch.from_numpy(data(0)[0]))
    wanted = torch.from_numpy(data(0)[1]).float() * 2 - 1
    solved = torch.linalg.lstsq(features, wanted.unsqueeze(1), driver="gelsd").solution
    made[-1].weight.copy_(solved.T)
    made[-1].bias.zero_()
    return made


def data(seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """200 images (200, 8, 8) float32 and labels: brighter on the left."""
    draws = np.random.default_rng(seed)
    labels = draws.integers(0, 2, 200)
    images = draws.random((200, 8, 8), dtype=np.float32)
    images[labels == 1, :, :4] += 0.3
    images[labels == 0, :, 4:] += 0.3
    return images, labels


def of_weights(weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """What `blindsum optimize --network` calls."""
    made = network()
    made.load_state_dict(dict(weights))
    return made
