"""The clinics example in one process with plain float sums: to choose hyperparameters, and to compare with.

    python -m blindsum.bench.clinics_reference --seeds 0 1 2 --images test --out clinics.json
    python -m blindsum.bench.clinics_reference --seeds 100 101 --learning-rates 0.025 0.05 0.1

The second form tunes: it looks at validation images only, at seeds that the table doesn't use.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from blindsum.examples.clinics.model import RadiographNet
from blindsum.examples.clinics.sites import (
    CLINICS,
    COHORT,
    FEDERATION,
    HOSPITAL,
    Images,
    SiteData,
    load_site,
    load_test,
    load_tuning,
)
from blindsum.examples.clinics.training import TrainingPlan, balanced_accuracy
from blindsum.examples.clinics.ways import (
    EDGE_ONLY,
    WAYS,
    Way,
    local_round,
    member_weight,
    shared_state,
    start_model,
    take_shared,
    train_alone,
)
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a way gives each site: its model, the gradient steps the site made, and the CPU seconds of all."""

    models: dict[str, RadiographNet]
    steps: dict[str, int]
    cpu_seconds: float


def weighted_mean(states: Mapping[str, State], weights: Mapping[str, float]) -> State:
    """The mean of the sites' states by weight, in plain floats."""
    total = sum(weights.values())
    names = next(iter(states.values()))
    return {
        name: torch.stack([states[site][name] * (weights[site] / total) for site in states]).sum(dim=0)
        for name in names
    }


def train_way(
    way: Way, sites: Mapping[str, SiteData], seed: int, plan: TrainingPlan, hospital: State | None
) -> Outcome:
    """Every site's model in one way. `hospital` is the state of the hospital's own model, where the way needs
    it.
    """
    started = time.process_time()
    models = {name: start_model(way, seed, hospital) for name in sites}
    steps = dict.fromkeys(sites, 0)
    if way.shared is not None:
        members = [name for name in sites if name in COHORT]
        weights = {name: member_weight(way, len(sites[name].train)) for name in members}
        mean: State = {}
        for round_number in range(1, plan.rounds + 1):
            states = {}
            for name in members:
                log = local_round(
                    models[name], sites[name], way, seed=seed, round_number=round_number, plan=plan
                )
                steps[name] += log.steps
                states[name] = shared_state(models[name], way)
            mean = weighted_mean(states, weights)
            for name in members:
                take_shared(models[name], way, mean)
        for name in sites:
            take_shared(models[name], way, mean)
    for name, site in sites.items():
        if way.shared is None or name not in COHORT:
            steps[name] += train_alone(models[name], site, way, seed=seed, plan=plan)
    return Outcome(models, steps, time.process_time() - started)


def train_all(seed: int, plan: TrainingPlan, ways: Sequence[Way] = WAYS) -> dict[str, Outcome]:
    """Every way, by name. The hospital's own model is trained once, for all ways that need it."""
    sites = {spec.name: load_site(spec.name, seed) for spec in FEDERATION}
    outcomes: dict[str, Outcome] = {}
    hospital: State | None = None
    for way in sorted(ways, key=lambda way: way.from_hospital):
        if way.from_hospital and hospital is None:
            own = outcomes.get(EDGE_ONLY.name)
            if own is None:
                only = {HOSPITAL: sites[HOSPITAL]}
                own = train_way(EDGE_ONLY, only, seed, plan, None)
            hospital = own.models[HOSPITAL].state_dict()
        outcomes[way.name] = train_way(way, sites, seed, plan, hospital)
    return outcomes


def accuracies(outcome: Outcome, images: Callable[[str, int], Images], seed: int) -> dict[str, float]:
    """Balanced accuracy of each site on `images(site, seed)`, with `clinic mean` and `worst clinic`."""
    found = {name: balanced_accuracy(model, images(name, seed)) for name, model in outcome.models.items()}
    clinics = [found[name] for name in CLINICS]
    return found | {"clinic mean": sum(clinics) / len(clinics), "worst clinic": min(clinics)}


def main() -> None:
    """Trains and prints a line for each seed, way and learning rate."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", choices=("validation", "test"), default="validation")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="tune: try these for every way")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], help="default: all")
    parser.add_argument("--plan", type=json.loads, default={}, help='changes to the plan, as {"steps": 10}')
    parser.add_argument("--out", type=Path, help="write the lines as JSON here too")
    options = parser.parse_args()
    if options.images == "test" and (options.learning_rates or options.plan):
        parser.error("tuning looks at validation images only: leave out --images test")

    torch.set_num_threads(1)
    plan = replace(TrainingPlan(), **options.plan)
    images = load_test if options.images == "test" else load_tuning
    lines = []
    for rate in options.learning_rates or [None]:
        ways = [way for way in WAYS if options.ways is None or way.name in options.ways]
        if rate is not None:
            ways = [replace(way, learning_rate=rate) for way in ways]
        for seed in options.seeds:
            for name, outcome in train_all(seed, plan, ways).items():
                found = accuracies(outcome, images, seed)
                line = {"seed": seed, "way": name, "learning_rate": rate, "cpu_seconds": outcome.cpu_seconds}
                lines.append(line | {"accuracy": found})
                row = "  ".join(f"{site} {100 * value:.1f}" for site, value in found.items())
                print(
                    f"seed {seed}  {name:16}  rate {rate or 'own'}  {row}  cpu {outcome.cpu_seconds:.0f} s",
                    flush=True,
                )
    if options.out is not None:
        options.out.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
