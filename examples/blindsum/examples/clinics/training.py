"""One site's part of the training: a fixed number of gradient steps on its own images.

A round starts with a fresh optimiser and draws everything from (seed, site, way, round). So it is a function
of the state it starts from, and a member that was killed in the middle repeats the round and ends at the same
state. The random streams here order batches and vary images; they come nowhere near a key or a mask.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from blindsum.examples.clinics.model import RadiographNet
from blindsum.examples.clinics.sites import Images, SiteData
from torch import Tensor, nn


@dataclass(frozen=True)
class TrainingPlan:
    """What is the same for every way; chosen on validation images (docs/decisions/0005-clinics-training.md).

    A site makes `rounds * steps` gradient steps of `batch` images each, half of them from each class. `shift`
    is in pixels, `degrees` in degrees, `magnification` a part of 1: an image is moved by up to that much. The
    learning rate falls along a cosine over the rounds, down to the part `final_rate` of its first value.
    """

    rounds: int = 25
    steps: int = 24
    batch: int = 16
    momentum: float = 0.9
    weight_decay: float = 5e-3
    final_rate: float = 0.05
    shift: float = 1.0
    degrees: float = 4.0
    magnification: float = 0.05

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.steps < 1:
            raise ValueError(
                f"a plan needs at least one round and one step, not {self.rounds} and {self.steps}"
            )
        if self.batch < 2 or self.batch % 2:
            raise ValueError(
                f"a batch holds both classes in equal parts, so its size is even, not {self.batch}"
            )


@dataclass(frozen=True)
class RoundLog:
    """What a round of local training did: gradient steps made, images seen, mean loss over the steps."""

    steps: int
    images: int
    loss: float


def train_round(
    model: RadiographNet,
    site: SiteData,
    *,
    way: str,
    seed: int,
    round_number: int,
    learning_rate: float,
    plan: TrainingPlan,
    head_only: bool = False,
) -> RoundLog:
    """Trains `model` in place for `plan.steps` steps on the site's training images.

    `round_number` counts from 1. With `head_only` the body stays as it is: a newcomer with few images fits
    its own head to a body that the others trained. Raises ValueError for a round outside the plan, and for a
    site without training images of both classes.
    """
    if not 1 <= round_number <= plan.rounds:
        raise ValueError(f"round {round_number} is outside the plan of {plan.rounds} rounds")
    stream = _stream(seed, site.spec.name, way, round_number)
    pixels = torch.from_numpy(site.train.pixels)
    labels = torch.from_numpy(site.train.labels)
    trained = list((model.head if head_only else model).parameters())
    optimiser = torch.optim.SGD(
        trained,
        lr=learning_rate * _part_of_rate(round_number, plan),
        momentum=plan.momentum,
        nesterov=True,
        weight_decay=plan.weight_decay,
        foreach=True,
    )
    losses = []
    model.train()
    for rows in _balanced_batches(labels, plan, stream):
        images = augment(pixels[rows], plan, stream)
        if head_only:
            with torch.no_grad():
                features = model.features(images)
            logits = model.head(features).squeeze(1)
        else:
            logits = model(images)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[rows].float())
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.item())
    return RoundLog(plan.steps, plan.steps * plan.batch, sum(losses) / plan.steps)


def augment(images: Tensor, plan: TrainingPlan, stream: torch.Generator) -> Tensor:
    """The images, each turned, magnified and shifted a little, the border continued: float32 (n, 28, 28)."""
    count, side = len(images), images.shape[-1]
    turn, size, *shift = torch.rand((4, count), generator=stream) * 2 - 1
    angle = turn * math.radians(plan.degrees)
    factor = 1 + size * plan.magnification
    cosine, sine = factor * torch.cos(angle), factor * torch.sin(angle)
    # affine_grid measures in half sides, so one pixel is 2 / side.
    right, down = (part * (2 * plan.shift / side) for part in shift)
    affine = torch.stack((cosine, -sine, right, sine, cosine, down), dim=1).view(count, 2, 3)
    grid = nn.functional.affine_grid(affine, [count, 1, side, side], align_corners=False)
    moved = nn.functional.grid_sample(images.unsqueeze(1), grid, padding_mode="border", align_corners=False)
    return moved.squeeze(1)


def balanced_accuracy(model: RadiographNet, images: Images) -> float:
    """Mean of the two recalls, a fraction of 1, so that prevalence doesn't distort it.

    Raises ValueError if a class is missing.
    """
    labels = torch.from_numpy(images.labels)
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(part) > 0 for part in torch.split(torch.from_numpy(images.pixels), 128)])
    recalls = []
    for label in (0, 1):
        of_class = answers[labels == label]
        if not len(of_class):
            raise ValueError(f"balanced accuracy needs images of both classes; none has label {label}")
        recalls.append((of_class == bool(label)).double().mean().item())
    return sum(recalls) / 2


def _part_of_rate(round_number: int, plan: TrainingPlan) -> float:
    progress = (round_number - 1) / max(plan.rounds - 1, 1)
    return plan.final_rate + (1 - plan.final_rate) * (1 + math.cos(math.pi * progress)) / 2


def _balanced_batches(labels: Tensor, plan: TrainingPlan, stream: torch.Generator) -> Tensor:
    """Rows of each batch, int64 (steps, batch): half from each class, so that the loss weighs both equally.

    Each class runs through all its images before one comes again.
    """
    halves = []
    for label in (0, 1):
        rows = torch.nonzero(labels == label).squeeze(1)
        if not len(rows):
            raise ValueError(f"training needs images of both classes; none has label {label}")
        needed = plan.steps * plan.batch // 2
        passes = [rows[torch.randperm(len(rows), generator=stream)] for _ in range(-(-needed // len(rows)))]
        halves.append(torch.cat(passes)[:needed].view(plan.steps, plan.batch // 2))
    return torch.cat(halves, dim=1)


def _stream(seed: int, site: str, way: str, round_number: int) -> torch.Generator:
    """Batch order and augmentation of one round."""
    digest = hashlib.sha256(f"{seed}/{site}/{way}/{round_number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
