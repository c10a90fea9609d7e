"""The ways of the clinics example: who trains what, what is shared, and how a round goes in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from blindsum.bench.clinics_reference import Outcome, accuracies, train_all, weighted_mean
from blindsum.examples.clinics.model import initial_model
from blindsum.examples.clinics.sites import COHORT, FEDERATION, HOSPITAL, LATE_CLINIC, load_site, load_tuning
from blindsum.examples.clinics.training import TrainingPlan
from blindsum.examples.clinics.ways import (
    CLOUD_FINETUNED,
    CLOUD_ONLY,
    EDGE_ONLY,
    FEDAVG,
    PERSONALISED,
    WAYS,
    Way,
    local_round,
    member_weight,
    part_of,
    shared_state,
    start_model,
    take_shared,
    train_alone,
    way_named,
)

pytestmark = pytest.mark.torch
PLAN = TrainingPlan(rounds=2, steps=2, batch=4)
SITES = [spec.name for spec in FEDERATION]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return train_all(0, PLAN)


def _same(outcome: Outcome, a: str, b: str, prefix: str) -> bool:
    first, second = outcome.models[a].state_dict(), outcome.models[b].state_dict()
    return all(torch.equal(first[name], second[name]) for name in first if name.startswith(prefix))


def test_every_site_that_trains_makes_the_same_number_of_steps(outcomes: dict[str, Outcome]) -> None:
    assert list(outcomes) == [way.name for way in sorted(WAYS, key=lambda way: way.from_hospital)]
    for way in WAYS:
        for site in SITES:
            expected = 0 if part_of(way, site) == "receives" else PLAN.rounds * PLAN.steps
            assert outcomes[way.name].steps[site] == expected, (way.name, site)


def test_who_receives_a_model_without_a_step() -> None:
    receives = {way.name: {site for site in SITES if part_of(way, site) == "receives"} for way in WAYS}
    assert receives == {
        "cloud_only": set(SITES),
        "cloud_finetuned": {HOSPITAL},
        "edge_only": set(),
        "fedavg": {LATE_CLINIC},
        "personalised": set(),
    }
    assert part_of(PERSONALISED, LATE_CLINIC) == "fits head"


def test_each_way_gives_the_models_it_announces(outcomes: dict[str, Outcome]) -> None:
    own = outcomes["edge_only"]
    for site in SITES:
        cloud = outcomes["cloud_only"].models[site].state_dict()
        assert all(
            torch.equal(cloud[name], value) for name, value in own.models[HOSPITAL].state_dict().items()
        )
        assert _same(outcomes["fedavg"], HOSPITAL, site, "")
        assert _same(outcomes["personalised"], HOSPITAL, site, "body.")
        if site != HOSPITAL:
            assert not _same(outcomes["personalised"], HOSPITAL, site, "head.")
            assert not _same(own, HOSPITAL, site, "body.")
            assert not _same(outcomes["cloud_finetuned"], HOSPITAL, site, "body.")
    assert _same(
        Outcome({"a": own.models[HOSPITAL], "b": outcomes["cloud_finetuned"].models[HOSPITAL]}, {}, 0),
        "a",
        "b",
        "",
    )


def test_everything_repeats_from_the_seed(outcomes: dict[str, Outcome]) -> None:
    again = train_all(0, PLAN, [PERSONALISED])["personalised"]
    for site, model in again.models.items():
        first = outcomes["personalised"].models[site].state_dict()
        assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())


def test_accuracies_hold_every_site_and_the_summaries(outcomes: dict[str, Outcome]) -> None:
    found = accuracies(outcomes["edge_only"], load_tuning, 0)
    assert list(found) == [*SITES, "clinic mean", "worst clinic"]
    assert all(0 <= value <= 1 for value in found.values())
    assert found["worst clinic"] <= found["clinic mean"]


def test_shared_names_follow_the_pattern() -> None:
    model = initial_model(0)
    names = list(model.state_dict())
    assert list(shared_state(model, FEDAVG)) == names
    assert list(shared_state(model, PERSONALISED)) == [name for name in names if name.startswith("body.")]
    for way in (CLOUD_ONLY, CLOUD_FINETUNED, EDGE_ONLY):
        with pytest.raises(ValueError, match="nobody shares"):
            shared_state(model, way)
        with pytest.raises(ValueError, match="nobody shares"):
            member_weight(way, 10)


def test_shared_state_is_a_copy() -> None:
    model = initial_model(0)
    state = shared_state(model, PERSONALISED)
    for value in state.values():
        value.fill_(9)
    assert torch.equal(model.state_dict()["body.0.weight"], initial_model(0).state_dict()["body.0.weight"])


def test_taking_a_state_replaces_what_is_shared_and_nothing_else() -> None:
    model, other = initial_model(0), initial_model(1)
    take_shared(model, PERSONALISED, shared_state(other, PERSONALISED))
    assert torch.equal(model.state_dict()["body.3.weight"], other.state_dict()["body.3.weight"])
    assert torch.equal(model.state_dict()["head.weight"], initial_model(0).state_dict()["head.weight"])


def test_a_state_with_other_parameters_is_refused_before_anything_changes() -> None:
    model = initial_model(0)
    whole = shared_state(initial_model(1), FEDAVG)
    with pytest.raises(ValueError, match=r"head\.weight"):
        take_shared(model, PERSONALISED, whole)
    body = shared_state(initial_model(1), PERSONALISED)
    missing = body.pop("body.0.weight")
    with pytest.raises(ValueError, match=r"body\.0\.weight"):
        take_shared(model, PERSONALISED, body)
    assert not torch.equal(model.state_dict()["body.0.weight"], missing)


def test_weights() -> None:
    assert member_weight(FEDAVG, 1600) == 1600
    assert member_weight(PERSONALISED, 1600) == 40
    states = {"a": {"x": torch.tensor([0.0, 8.0])}, "b": {"x": torch.tensor([4.0, 0.0])}}
    assert weighted_mean(states, {"a": 3.0, "b": 1.0})["x"].tolist() == [1.0, 6.0]


def test_a_killed_member_repeats_its_round() -> None:
    """A round started again from the shared state and the saved head ends at the same model."""
    site = load_site("clinic-4", 0)
    model = start_model(PERSONALISED, 0)
    local_round(model, site, PERSONALISED, seed=0, round_number=1, plan=PLAN)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    local_round(model, site, PERSONALISED, seed=0, round_number=2, plan=PLAN)
    restarted = start_model(PERSONALISED, 0)
    restarted.load_state_dict(saved)
    local_round(restarted, site, PERSONALISED, seed=0, round_number=2, plan=PLAN)
    assert all(torch.equal(value, restarted.state_dict()[name]) for name, value in model.state_dict().items())


def test_progress_is_told_after_each_round() -> None:
    told: list[int] = []
    site = load_site("clinic-6", 0)
    steps = train_alone(
        start_model(EDGE_ONLY, 0),
        site,
        EDGE_ONLY,
        seed=0,
        plan=PLAN,
        on_round=lambda number, log: told.append(number),
    )
    assert told == [1, 2]
    assert steps == PLAN.rounds * PLAN.steps


def test_cloud_ways_need_the_hospitals_model() -> None:
    with pytest.raises(ValueError, match="hospital's model"):
        start_model(CLOUD_ONLY, 0)


def test_a_receiving_site_is_not_trained() -> None:
    with pytest.raises(ValueError, match="receives"):
        local_round(initial_model(0), load_site(LATE_CLINIC, 0), FEDAVG, seed=0, round_number=1, plan=PLAN)


def test_names_of_ways() -> None:
    assert [way.name for way in WAYS] == [
        "cloud_only",
        "cloud_finetuned",
        "edge_only",
        "fedavg",
        "personalised",
    ]
    assert way_named("fedavg") is FEDAVG
    with pytest.raises(ValueError, match="krum"):
        way_named("krum")


def test_part_depends_on_what_a_way_says_not_on_which_object_it_is() -> None:
    copy: Way = replace(PERSONALISED, learning_rate=0.1)
    assert part_of(copy, LATE_CLINIC) == "fits head"
    assert {part_of(replace(CLOUD_ONLY, learning_rate=0.1), site) for site in COHORT} == {"receives"}
