"""The ways to train and infer that the demo compares, in the pieces that a member process calls.

Training together, at each member of the cohort:

    model = start_model(way, seed)
    for round_number in 1..plan.rounds:
        take_shared(model, way, state)          # what the last round gave; nothing before the first
        local_round(model, site, way, seed=seed, round_number=round_number, plan=plan)
        submit shared_state(model, way) with the weight member_weight(way, len(site.train))
    take_shared(model, way, state)

A round gives the mean of the submitted states by weight, made from a secure sum. The ways in which nobody
shares are the same loop without taking and submitting: `train_alone`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final, Literal

from blindsum.examples.clinics.model import RadiographNet, initial_model
from blindsum.examples.clinics.sites import COHORT, HOSPITAL, SiteData, site_spec
from blindsum.examples.clinics.training import RoundLog, TrainingPlan, train_round
from torch import Tensor

State = Mapping[str, Tensor]
Part = Literal["trains", "fits head", "receives"]
"""What a site does in a way: trains the whole network, only its head, or receives a model and makes no step.
"""


@dataclass(frozen=True)
class Way:
    """One way to come to a model for each site.

    `shared` is the name pattern of the parameters that the cohort trains together, or None where nobody
    shares. `weight` is how much a member counts in their mean. `from_hospital`: it starts from the model that
    the hospital trained alone. `cohort` and `newcomer` are what the sites of the cohort and a late one do.
    `learning_rate` is that of the first round, chosen for this way on validation images.
    """

    name: str
    title: str
    learning_rate: float
    shared: str | None = None
    weight: Literal["size", "sqrt"] = "size"
    from_hospital: bool = False
    cohort: Part = "trains"
    newcomer: Part = "trains"


CLOUD_ONLY: Final = Way(
    "cloud_only", "cloud only", 0.025, from_hospital=True, cohort="receives", newcomer="receives"
)
CLOUD_FINETUNED: Final = Way("cloud_finetuned", "cloud + fine-tuned", 0.0008, from_hospital=True)
EDGE_ONLY: Final = Way("edge_only", "edge only", 0.025)
FEDAVG: Final = Way("fedavg", "plain FedAvg", 0.0125, shared="*", weight="size", newcomer="receives")
PERSONALISED: Final = Way(
    "personalised", "collaborative, local head", 0.025, shared="body.*", weight="sqrt", newcomer="fits head"
)

WAYS: Final = (CLOUD_ONLY, CLOUD_FINETUNED, EDGE_ONLY, FEDAVG, PERSONALISED)
"""All ways in the order of the table."""


def way_named(name: str) -> Way:
    """The way called `name`. Raises ValueError with the known names otherwise."""
    for way in WAYS:
        if way.name == name:
            return way
    known = ", ".join(way.name for way in WAYS)
    raise ValueError(f"no way is called {name!r}; the ways are {known}")


def part_of(way: Way, site: str) -> Part:
    """What a site does in a way. Training and fitting a head take `plan.rounds * plan.steps` gradient steps.

    The hospital doesn't fine-tune its own model: its steps are spent, and it has no other scanner to adapt
    to. Raises ValueError for an unknown site.
    """
    site_spec(site)
    if way.from_hospital and site == HOSPITAL:
        return "receives"
    return way.cohort if site in COHORT else way.newcomer


def start_model(way: Way, seed: int, hospital: State | None = None) -> RadiographNet:
    """The model that every site starts from in this way.

    `hospital` is the whole state that the hospital has after `train_alone` in the way `edge_only`; needed
    where `way.from_hospital`. Raises ValueError if it is missing there.
    """
    model = initial_model(seed)
    if way.from_hospital:
        if hospital is None:
            raise ValueError(
                f"{way.name} starts from the hospital's model: train it first, then pass its state"
            )
        model.load_state_dict(hospital)
    return model


def local_round(
    model: RadiographNet, site: SiteData, way: Way, *, seed: int, round_number: int, plan: TrainingPlan
) -> RoundLog:
    """One round of training at one site, in place; `round_number` counts from 1.

    Raises ValueError for a site that makes no steps in this way and for a round outside the plan.
    """
    part = part_of(way, site.spec.name)
    if part == "receives":
        raise ValueError(f"{site.spec.name} receives its model in {way.name} and trains nothing")
    return train_round(
        model,
        site,
        way=way.name,
        seed=seed,
        round_number=round_number,
        learning_rate=way.learning_rate,
        plan=plan,
        head_only=part == "fits head",
    )


def train_alone(
    model: RadiographNet,
    site: SiteData,
    way: Way,
    *,
    seed: int,
    plan: TrainingPlan,
    on_round: Callable[[int, RoundLog], None] | None = None,
) -> int:
    """All rounds of a site that submits nothing: local training, fine-tuning, or a newcomer's head.

    Calls `on_round(round_number, log)` after each round. Returns the gradient steps made: none where the site
    only receives its model.
    """
    if part_of(way, site.spec.name) == "receives":
        return 0
    steps = 0
    for round_number in range(1, plan.rounds + 1):
        log = local_round(model, site, way, seed=seed, round_number=round_number, plan=plan)
        steps += log.steps
        if on_round is not None:
            on_round(round_number, log)
    return steps


def shared_state(model: RadiographNet, way: Way) -> dict[str, Tensor]:
    """The parameters that a member submits in this way, by name; copies, float32.

    Raises ValueError for a way in which nobody shares.
    """
    pattern = _shared_pattern(way)
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if fnmatchcase(name, pattern)
    }


def take_shared(model: RadiographNet, way: Way, state: State) -> None:
    """Puts the parameters that the cohort trained into the model; the others stay the site's own.

    Raises ValueError if `state` doesn't hold exactly the parameters that the way shares.
    """
    expected = shared_state(model, way)
    if set(state) != set(expected):
        wrong = ", ".join(sorted(set(state) ^ set(expected)))
        raise ValueError(f"{way.name} shares {way.shared!r}; missing or not among them: {wrong}")
    model.load_state_dict(dict(state), strict=False)


def member_weight(way: Way, examples: int) -> float:
    """How much a member with so many training images counts in the mean.

    Raises ValueError for a way in which nobody shares.
    """
    _shared_pattern(way)
    return float(examples) if way.weight == "size" else math.sqrt(examples)


def _shared_pattern(way: Way) -> str:
    if way.shared is None:
        raise ValueError(f"in {way.name} nobody shares parameters")
    return way.shared
