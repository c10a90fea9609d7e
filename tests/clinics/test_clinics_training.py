"""Local training: the same steps in every way, repeatable, and blind to the test images."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from blindsum.bench import clinics_reference
from blindsum.examples.clinics import sites
from blindsum.examples.clinics.model import RadiographNet, initial_model, standardise
from blindsum.examples.clinics.sites import COHORT, FEDERATION, HOSPITAL, LATE_CLINIC, Images, load_site
from blindsum.examples.clinics.training import (
    TrainingPlan,
    _balanced_batches,
    augment,
    balanced_accuracy,
    train_round,
)

pytestmark = pytest.mark.torch
PLAN = TrainingPlan(rounds=3, steps=2, batch=4)


def _round(
    seed: int = 0, site: str = "clinic-6", way: str = "edge_only", round_number: int = 1
) -> RadiographNet:
    model = initial_model(0)
    train_round(
        model,
        load_site(site, 0),
        way=way,
        seed=seed,
        round_number=round_number,
        learning_rate=0.05,
        plan=PLAN,
    )
    return model


def _equal(a: RadiographNet, b: RadiographNet) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_network_is_small_and_its_names_tell_body_from_head() -> None:
    model = initial_model(0)
    assert 23_000 <= sum(value.numel() for value in model.parameters()) <= 25_000
    assert {name.split(".")[0] for name in model.state_dict()} == {"body", "head"}
    assert list(model.buffers()) == []
    images = torch.rand(3, 28, 28)
    assert model.features(images).shape == (3, 128)
    assert model(images).shape == (3,)


def test_initial_model_depends_on_the_seed_alone_and_leaves_the_global_stream() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = initial_model(7)
    assert torch.equal(torch.rand(1), expected)
    assert _equal(first, initial_model(7))
    assert not _equal(first, initial_model(8))


def test_standardisation_takes_out_exposure() -> None:
    images = torch.rand(4, 28, 28)
    once = standardise(images)
    assert torch.allclose(once.mean(dim=(1, 2)), torch.zeros(4), atol=1e-5)
    assert torch.allclose(once.std(dim=(1, 2), correction=0), torch.ones(4), atol=0.01)
    assert torch.allclose(standardise(0.25 + 0.5 * images), once, atol=0.02)
    assert torch.isfinite(standardise(torch.ones(1, 28, 28))).all()


def test_a_round_is_a_function_of_seed_site_way_and_round() -> None:
    first = _round()
    torch.rand(5)
    assert _equal(first, _round())
    assert not _equal(first, _round(seed=1))
    assert not _equal(first, _round(site="clinic-5"))
    assert not _equal(first, _round(way="personalised"))
    assert not _equal(first, _round(round_number=2))


def test_head_only_leaves_the_body_as_it_is() -> None:
    model, before = initial_model(0), initial_model(0).state_dict()
    train = partial(
        train_round,
        model,
        load_site(LATE_CLINIC, 0),
        way="personalised",
        seed=0,
        round_number=1,
        learning_rate=0.05,
        plan=PLAN,
    )
    log = train(head_only=True)
    assert log.steps == PLAN.steps
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("body.")
    train(head_only=False)
    assert not torch.equal(model.state_dict()["body.0.weight"], before["body.0.weight"])


@pytest.mark.parametrize("site", [spec.name for spec in FEDERATION])
def test_batches_hold_both_classes_in_equal_parts_and_use_every_image(site: str) -> None:
    labels = torch.from_numpy(load_site(site, 0).train.labels)
    plan = TrainingPlan(steps=150)
    batches = _balanced_batches(labels, plan, torch.Generator().manual_seed(0))
    assert batches.shape == (150, plan.batch)
    assert (labels[batches].sum(dim=1) == plan.batch // 2).all()
    counts = torch.bincount(batches.flatten(), minlength=len(labels))
    for label in (0, 1):
        of_class = counts[labels == label]
        assert of_class.min() >= 1
        assert of_class.max() - of_class.min() <= 1


def test_augmentation_moves_within_its_bounds_and_repeats() -> None:
    images = torch.zeros(500, 28, 28)
    images[:, 13:15, 13:15] = 0.25
    moved = augment(images, TrainingPlan(), torch.Generator().manual_seed(0))
    assert moved.shape == images.shape
    assert torch.equal(moved, augment(images, TrainingPlan(), torch.Generator().manual_seed(0)))
    place = torch.arange(28) - 13.5
    for axis in (1, 2):
        centre = (moved.sum(dim=3 - axis) * place).sum(dim=1) / moved.sum(dim=(1, 2))
        assert centre.abs().max() <= 1.2
        assert centre.abs().mean() == pytest.approx(0.5, abs=0.1)
    still = replace(TrainingPlan(), shift=0, degrees=0, magnification=0)
    assert torch.allclose(augment(images, still, torch.Generator()), images, atol=1e-5)


def test_balanced_accuracy_is_the_mean_of_the_recalls() -> None:
    class Brightness(RadiographNet):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0] - 0.5

    pixels = np.zeros((5, 28, 28), dtype=np.float32)
    pixels[[0, 3, 4], 0, 0] = 1
    labels = np.array([0, 0, 0, 1, 1], dtype=np.uint8)
    rows = np.arange(5)
    assert balanced_accuracy(Brightness(), Images(pixels, labels, rows)) == pytest.approx((2 / 3 + 1) / 2)
    with pytest.raises(ValueError, match="label 0"):
        balanced_accuracy(Brightness(), Images(pixels[3:], labels[3:], rows[3:]))


def test_a_round_outside_the_plan_and_a_plan_without_both_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="round 4"):
        _round(round_number=4)
    with pytest.raises(ValueError, match="even"):
        TrainingPlan(batch=15)
    with pytest.raises(ValueError, match="at least one"):
        TrainingPlan(rounds=0)
    site = load_site("clinic-6", 0)
    healthy = site.train.labels == 0
    only = Images(site.train.pixels[healthy], site.train.labels[healthy], site.train.rows[healthy])
    with pytest.raises(ValueError, match="label 1"):
        train_round(
            initial_model(0),
            replace(site, train=only),
            way="edge_only",
            seed=0,
            round_number=1,
            learning_rate=0.05,
            plan=PLAN,
        )


def test_tuning_never_reads_the_test_images(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    official = sites._official

    def watched(split: sites.Split) -> object:
        read.append(split)
        return official(split)

    monkeypatch.setattr(sites, "_official", watched)
    monkeypatch.setattr(
        sys,
        "argv",
        ["tune", "--learning-rates", "0.05", "--plan", '{"rounds": 1, "steps": 1}', "--ways", "edge_only"],
    )
    clinics_reference.main()
    assert "val" in read
    assert "test" not in read
    sites.load_test(HOSPITAL, 0)
    assert read[-1] == "test"


@pytest.mark.parametrize("change", [["--learning-rates", "0.1"], ["--plan", '{"steps": 2}']])
def test_tuning_on_test_images_is_refused(
    change: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune", "--images", "test", *change])
    with pytest.raises(SystemExit):
        clinics_reference.main()
    assert "validation images only" in capsys.readouterr().err


def test_cohort_is_everyone_but_the_late_clinic() -> None:
    assert {*COHORT, LATE_CLINIC} == {spec.name for spec in FEDERATION}
