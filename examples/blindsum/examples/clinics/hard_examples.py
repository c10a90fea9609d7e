"""Hard and unknown examples: the clinics forward ten images each, the hospital learns from them, the loop
closes.

Everything goes the way an app would go: review queue, consent, sealing, the real aggregator, intake,
incremental training with replay, a new version of the model, and a new artefact for the clinic's device.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from blindsum.client.federation_view import FederationView
from blindsum.client.hard_examples import (
    Consent,
    Example,
    Intake,
    Letter,
    Novelty,
    Proposal,
    ReviewQueue,
    auroc,
    doubt,
    propose,
    read_dicom,
    replay_batches,
)
from blindsum.examples.clinics.device_models import (
    MODEL,
    DeviceOutcome,
    State,
    device_models,
    network_of,
    publish_hospital_model,
)
from blindsum.examples.clinics.model import RadiographNet, standardise
from blindsum.examples.clinics.scanner_look import ScannerLook
from blindsum.examples.clinics.sites import (
    CLINICS,
    COHORT,
    HOSPITAL,
    Images,
    Pixels,
    SiteData,
    load_site,
    load_test,
)
from blindsum.examples.clinics.training import TrainingPlan, augment, balanced_accuracy
from numpy.typing import NDArray
from torch import Tensor, nn

PURPOSE: Final = "incremental training of the radiograph model"
QUOTA: Final = 10
FOREIGN: Final = tuple(name for name in CLINICS if name != "clinic-1")
"""Clinics whose scanner isn't the hospital's."""
OTHER_MODALITY: Final = ("CT_small.dcm", "MR_small.dcm")
"""The CT and the MR slice that pydicom ships; crops of them are the images of another modality."""
CROPS: Final = 300


@dataclass(frozen=True)
class IncrementalPlan:
    """How the hospital learns from what was forwarded; chosen on validation images with seeds that aren't
    reported.

    `steps` gradient steps of `batch` images, half of them replay. `looks` is how many of its own images the
    hospital adds in the look of each flagged clinic's scanner; together they count as much as the images that
    the clinic forwarded.
    """

    steps: int = 600
    batch: int = 32
    learning_rate: float = 0.01
    final_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-3
    looks: int = 200


@dataclass(frozen=True)
class HardOutcome:
    """What was found and what it bought. Accuracies are balanced, fractions of 1, on the test images.

    `scanners` is the AUROC of novelty for each foreign scanner, `before` and `after` the hospital's model at
    each site, `forwarded` the images that each clinic sent, `held` how many a person at the hospital had to
    decide on, `device` what the new model became on a device.
    """

    errors_auroc: float
    modality_auroc: float
    scanners: Mapping[str, float]
    before: Mapping[str, float]
    after: Mapping[str, float]
    forwarded: Mapping[str, int]
    flagged: tuple[str, ...]
    held: int
    state: State
    device: DeviceOutcome

    @property
    def scanners_auroc(self) -> float:
        """Mean over the foreign scanners."""
        return sum(self.scanners.values()) / len(self.scanners)

    @property
    def gain(self) -> float:
        """What the clinics gain in the mean at the hospital's model, a fraction of 1."""
        return sum(self.after[name] - self.before[name] for name in CLINICS) / len(CLINICS)

    def as_json(self) -> dict[str, float]:
        """The report's `hard`."""
        return {
            "errors_auroc": self.errors_auroc,
            "modality_auroc": self.modality_auroc,
            "scanners_auroc": self.scanners_auroc,
            "gain": self.gain,
        }


def hard_examples(
    hospital: State,
    folders: Mapping[str, Path],
    *,
    seed: int,
    work: Path,
    number: int = 1,
    plan: IncrementalPlan | None = None,
    evaluation: Callable[[str, int], Images] = load_test,
    on_step: Callable[[str], None] = lambda _: None,
) -> HardOutcome:
    """The whole loop, from the hospital's published model version `number` to the artefact of the next
    version.

    `folders` are the member folders of the cohort by site, connected to a running aggregator. `on_step` is
    told what happens. Takes about half a minute a seed on one core, exports included.
    """
    model = network_of(hospital)
    site = load_site(HOSPITAL, seed)
    novelty = Novelty.fit(
        scanner_features(model, site.train.pixels),
        site.train.labels,
        scanner_features(model, site.validation.pixels),
    )
    tested = {name: evaluation(name, seed) for name in COHORT}
    found = _detection(model, novelty, tested)
    before = {name: balanced_accuracy(model, images) for name, images in tested.items()}
    forwarded, flagged = {}, []
    for name in CLINICS:
        on_step(f"{name} looks for hard and unknown examples")
        sent, proposal = _forward(model, novelty, name, seed, number, folders[name])
        forwarded[name] = sent
        if proposal.flagged:
            flagged.append(name)
    on_step("the hospital takes in what was forwarded")
    letters, held = _take_in(model, novelty, site, folders[HOSPITAL])
    on_step(f"the hospital learns from {len(letters)} examples, with replay")
    learnt = learn(model, site, letters, flagged, seed=seed, plan=plan or IncrementalPlan())
    on_step(f"version {number + 1} is published and made to fit the device again")
    with FederationView.open(folders[HOSPITAL]) as view:
        publish_hospital_model(
            learnt.state_dict(), number + 1, view, f"version {number} and {len(letters)} forwarded examples"
        )
    device = device_models(folders, seed=seed, work=work, number=number + 1)
    after = {name: balanced_accuracy(learnt, images) for name, images in tested.items()}
    return HardOutcome(*found, before, after, forwarded, tuple(flagged), held, learnt.state_dict(), device)


def scanner_features(model: RadiographNet, pixels: Pixels) -> dict[str, NDArray[np.float64]]:
    """Features in which a foreign scanner shows, by group: the image's mean and deviation, which the
    network's standardisation takes out; mean and deviation of every channel of the first and the last
    convolution; and what the head gets.
    """
    model.eval()
    layers = list(model.body.children())
    parts: list[dict[str, Tensor]] = []
    with torch.inference_mode():
        for images in torch.split(torch.from_numpy(pixels), 128):
            maps: dict[str, Tensor] = {}
            maps["image"] = torch.stack((images.mean(dim=(1, 2)), images.std(dim=(1, 2))), dim=1)
            values = layers[0](standardise(images).unsqueeze(1))
            maps["first"] = _statistics(values)
            for layer in layers[1:4]:
                values = layer(values)
            maps["middle"] = _statistics(values)
            for layer in layers[4:]:
                values = layer(values)
            maps["last"] = values
            parts.append(maps)
    return {name: torch.cat([one[name] for one in parts]).double().numpy() for name in parts[0]}


def learn(
    model: RadiographNet,
    site: SiteData,
    letters: Sequence[Letter],
    flagged: Sequence[str],
    *,
    seed: int,
    plan: IncrementalPlan,
) -> RadiographNet:
    """A copy of the hospital's model, trained on the forwarded examples with replay of its own images.

    A site's examples are drawn as often as the model is wrong about them (its mean loss). For each flagged
    site the hospital adds its own images in the look of that site's scanner.
    """
    learnt = network_of(model.state_dict())
    own = torch.from_numpy(site.train.pixels)
    images, labels, weights = [], [], []
    for sender in sorted({letter.sender for letter in letters}):
        of_site = [letter.example for letter in letters if letter.sender == sender]
        theirs = torch.from_numpy(np.stack([one.array() for one in of_site]))
        answers = torch.tensor([one.label for one in of_site])
        with torch.inference_mode():
            loss = nn.functional.binary_cross_entropy_with_logits(model(theirs), answers.float()).item()
        images.append(theirs)
        labels.append(answers)
        weights.append(np.full(len(of_site), loss + 1e-3))
        if sender in flagged and plan.looks:
            stream = torch.Generator().manual_seed(seed)
            rows = torch.randperm(len(own), generator=stream)[: plan.looks]
            images.append(ScannerLook.of(own, theirs).show(own[rows]))
            labels.append(torch.from_numpy(site.train.labels[rows.numpy()]).long())
            weights.append(np.full(len(rows), (loss + 1e-3) * len(of_site) / len(rows)))
    new, new_labels = torch.cat(images), torch.cat(labels)
    old_labels = torch.from_numpy(site.train.labels).long()
    optimiser = torch.optim.SGD(
        learnt.parameters(),
        lr=plan.learning_rate,
        momentum=plan.momentum,
        nesterov=True,
        weight_decay=plan.weight_decay,
    )
    batches = replay_batches(
        site.train.labels,
        new_labels.numpy(),
        steps=plan.steps,
        batch=plan.batch,
        seed=seed,
        weights=np.concatenate(weights),
    )
    stream = torch.Generator().manual_seed(seed)
    learnt.train()
    for step, batch in enumerate(batches):
        for group in optimiser.param_groups:
            group["lr"] = plan.learning_rate * _part_of_rate(step, plan)
        rows_old, rows_new = torch.from_numpy(batch.old), torch.from_numpy(batch.new)
        seen = augment(torch.cat((own[rows_old], new[rows_new])), TrainingPlan(), stream)
        wanted = torch.cat((old_labels[rows_old], new_labels[rows_new])).float()
        loss_now = nn.functional.binary_cross_entropy_with_logits(learnt(seen), wanted)
        optimiser.zero_grad()
        torch.autograd.backward(loss_now)
        optimiser.step()
    return learnt


def other_modality(seed: int = 0) -> Pixels:
    """Images of another modality: random crops, turned, of a CT and an MR slice; float32 (600, 28, 28)."""
    from pydicom.data import get_testdata_file  # noqa: PLC0415  (the extra `dicom`)

    made = []
    for place, name in enumerate(OTHER_MODALITY):
        slice_ = torch.from_numpy(read_dicom(str(get_testdata_file(name))).pixels)[None, None]
        draws = torch.rand((4, CROPS), generator=torch.Generator().manual_seed(2 * seed + place))
        size, angle = 0.35 + 0.65 * draws[0], (draws[1] * 2 - 1) * math.pi
        right, down = ((draw * 2 - 1) * (1 - size) for draw in draws[2:])
        cosine, sine = size * torch.cos(angle), size * torch.sin(angle)
        affine = torch.stack((cosine, -sine, right, sine, cosine, down), dim=1).view(CROPS, 2, 3)
        grid = nn.functional.affine_grid(affine, [CROPS, 1, 28, 28], align_corners=False)
        crops = nn.functional.grid_sample(
            slice_.expand(CROPS, -1, -1, -1), grid, padding_mode="border", align_corners=False
        )
        made.append(crops.squeeze(1))
    return torch.cat(made).numpy()


def _detection(
    model: RadiographNet, novelty: Novelty, tested: Mapping[str, Images]
) -> tuple[float, float, dict[str, float]]:
    """AUROCs on held-out images: doubt for the model's own errors at home, novelty for what it never saw."""
    home = tested[HOSPITAL]
    logits = _logits(model, home.pixels)
    wrong = (logits > 0) != home.labels.astype(bool)
    doubts = doubt(logits)
    familiar = novelty.score(scanner_features(model, home.pixels))
    modality = auroc(familiar, novelty.score(scanner_features(model, other_modality())))
    scanners = {
        name: auroc(familiar, novelty.score(scanner_features(model, tested[name].pixels))) for name in FOREIGN
    }
    return auroc(doubts[~wrong], doubts[wrong]), modality, scanners


def _forward(
    model: RadiographNet, novelty: Novelty, name: str, seed: int, number: int, folder: Path
) -> tuple[int, Proposal]:
    """One clinic: propose, review, consent, send."""
    images = load_site(name, seed).train
    proposal = propose(
        _logits(model, images.pixels),
        scanner_features(model, images.pixels),
        images.labels,
        novelty,
        quota=QUOTA,
        # The same sample for the same seed, so that figures can be repeated; an app leaves this out.
        random=lambda length: hashlib.shake_256(f"{seed}/{name}".encode()).digest(length),
    )
    now = int(time.time())
    with ReviewQueue(folder) as queue, FederationView.open(folder) as view:
        queue.enable(HOSPITAL, PURPOSE, quota=QUOTA)
        for row, why, uncertain, strange in zip(
            proposal.rows, proposal.reasons, proposal.doubts, proposal.novelties, strict=True
        ):
            example = Example.of(images.pixels[row].clip(0, 1), int(images.labels[row]))
            identifier = queue.propose(
                example, doubt=uncertain, novelty=strange, reason=why, model=MODEL, model_version=number
            )
            consent = Consent(
                content=example.digest(),
                recipient=HOSPITAL,
                purpose=PURPOSE,
                reference=f"consent form of image {row}",
                given=now,
                until=now + 86_400,
            )
            queue.approve(identifier, consent, reviewer=f"{name}'s radiologist")
        return len(queue.forward(view)), proposal


def _take_in(
    model: RadiographNet, novelty: Novelty, site: SiteData, folder: Path
) -> tuple[list[Letter], int]:
    """The hospital: fetch, check, decide on what was held. The labels of these data are right, so that the
    person who looks accepts them.
    """

    def predict(pixels: Pixels) -> NDArray[Any]:
        chance = 1 / (1 + np.exp(-_logits(model, pixels[None])[0].astype(np.float64)))
        return np.array([1 - chance, chance])

    with (
        Intake(
            folder,
            purpose=PURPOSE,
            shape=(28, 28),
            own=site.train.pixels,
            predict=predict,
            novelty_threshold=novelty.threshold,
        ) as intake,
        FederationView.open(folder) as view,
    ):
        intake.collect(view)
        held = intake.examples("held")
        for one in held:
            intake.decide(one.id, accept=True, reviewer="the hospital's radiologist")
        return intake.accepted(), len(held)


def _logits(model: RadiographNet, pixels: Pixels) -> NDArray[np.float32]:
    model.eval()
    with torch.inference_mode():
        found: NDArray[np.float32] = torch.cat(
            [model(part) for part in torch.split(torch.from_numpy(pixels), 128)]
        ).numpy()
    return found


def _statistics(maps: Tensor) -> Tensor:
    return torch.cat((maps.mean(dim=(2, 3)), maps.std(dim=(2, 3))), dim=1)


def _part_of_rate(step: int, plan: IncrementalPlan) -> float:
    return plan.final_rate + (1 - plan.final_rate) * (1 + math.cos(math.pi * step / plan.steps)) / 2
