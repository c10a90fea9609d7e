"""The strategies of personalised learning, through a real server: what is shared, what stays, what moves."""

import copy

import numpy as np
import pytest
from blindsum.client.learning.local_strategy import (
    WEIGHT_STEPS,
    LocalStrategy,
    local_strategy,
    q_weight,
    strategies,
)
from blindsum.client.testing import Federation
from blindsum.crypto.errors import EncodingError, ParameterRefused
from blindsum.crypto.trust.strategy import Strategy

torch = pytest.importorskip("torch")
from blindsum.client.learning.learner import Learner  # noqa: E402

pytestmark = pytest.mark.torch

NAMES = ("member-1", "member-2", "member-3")
TARGET = {"member-1": 2.0, "member-2": -1.0, "member-3": 0.5}
RATE = 0.1


def network() -> "torch.nn.Module":
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        body = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6))
        return torch.nn.Sequential(body, torch.nn.Linear(6, 1))


def data_of(name: str) -> "tuple[torch.Tensor, torch.Tensor]":
    stream = torch.Generator().manual_seed(int(name[-1]))
    inputs = torch.randn((16, 4), generator=stream)
    return inputs, inputs.sum(dim=1, keepdim=True) * TARGET[name]


def loss_of(model: "torch.nn.Module", name: str) -> "torch.Tensor":
    inputs, wanted = data_of(name)
    return torch.nn.functional.mse_loss(model(inputs), wanted)


def training_of(name: str, steps: int = 5):
    def train(model, penalty):
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
        loss = torch.zeros(())
        for _ in range(steps):
            optimiser.zero_grad()
            loss = loss_of(model, name)
            (loss + penalty(model)).backward()
            optimiser.step()
        return float(loss.detach())

    return train


def federate(strategy: LocalStrategy, *, rounds: int = 2, local=(), **plan):
    """Every member's learner after all rounds, and the final shared state."""
    with Federation(3, policy={"max_weight_ratio": 64}) as federation:
        arguments = strategy.plan(network(), local=local)
        federation.start(network().state_dict(), rounds=rounds, bits=22, **arguments, **plan)

        def app(member):
            learner = None
            for rnd in member.rounds():
                if learner is None:
                    learner = Learner(
                        LocalStrategy.of(rnd.plan),
                        network(),
                        evaluate=lambda model: float(loss_of(model, member.name).detach()),
                        learning_rate=RATE,
                        largest_weight=128.0,
                    )
                learner.take_part(rnd, training_of(member.name), examples=8)
            final = member.latest_state()
            learner.finish(final, training_of(member.name))
            return learner, final

        found = federation.run(app)
    final = found["member-1"][1]
    for _, other in found.values():
        assert all(torch.equal(final[name], other[name]) for name in final)
    return {name: learner for name, (learner, _) in found.items()}, final


def distance(one, other):
    return sum(float((one[name] - other[name]).detach().square().sum()) for name in one) ** 0.5


def test_fedavg_gives_everyone_the_mean_of_what_was_learnt():
    learners, final = federate(local_strategy("fedavg"), rounds=1)
    alone = {}
    for name in NAMES:
        model = network()
        training_of(name)(model, lambda _model: torch.zeros(()))
        alone[name] = model.state_dict()
    for tensor, value in final.items():
        mean = sum(alone[name][tensor] for name in NAMES) / 3
        assert torch.allclose(value, mean, atol=2e-5)
    for learner in learners.values():
        assert all(torch.equal(learner.personal.state_dict()[name], final[name]) for name in final)


def test_fedprox_stays_nearer_to_the_shared_model_the_stronger_it_is():
    start = network().state_dict()
    moved = [distance(federate(local_strategy("fedprox", mu), rounds=1)[1], start) for mu in (0.0, 1.0, 5.0)]
    assert moved[0] > moved[1] > moved[2]


def test_fedper_keeps_each_member_s_head():
    learners, final = federate(local_strategy("fedper"), local=["1.*"])
    assert set(final) == {"0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias"}
    heads = [learners[name].personal.state_dict()["1.weight"] for name in NAMES]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_fedbn_finds_the_normalisation_layers_and_keeps_them_local():
    learners, final = federate(local_strategy("fedbn"))
    assert set(final) == {"0.0.weight", "0.0.bias", "1.weight", "1.bias"}
    scales = [learners[name].personal.state_dict()["0.1.weight"] for name in NAMES]
    assert not torch.equal(scales[0], scales[1])


def test_ditto_shares_one_model_and_keeps_a_personal_one_that_fits_better():
    learners, final = federate(local_strategy("ditto", 0.01), rounds=3)
    for name, learner in learners.items():
        assert learner.personal is not learner.model
        shared = network()
        shared.load_state_dict(final)
        assert loss_of(learner.personal, name) < loss_of(shared, name)


def test_a_strong_pull_keeps_ditto_s_personal_model_at_the_shared_one():
    gaps = []
    for strength in (0.01, 5.0):
        learners, _ = federate(local_strategy("ditto", strength), rounds=2)
        learner = learners["member-1"]
        gaps.append(
            distance(dict(learner.personal.named_parameters()), dict(learner.model.named_parameters()))
        )
    assert gaps[0] > gaps[1]


@pytest.mark.parametrize("q", [0.5, 1.0])
def test_qffl_moves_as_the_paper_s_two_sums_say(q):
    _, final = federate(local_strategy("qffl", q), rounds=1, range_exponent=2, weight_ratio=64)
    start = {name: value.double() for name, value in network().state_dict().items()}
    numerator = {name: torch.zeros_like(value) for name, value in start.items()}
    denominator = 0.0
    for name in NAMES:
        model = network()
        before = float(loss_of(model, name).detach())
        training_of(name)(model, lambda _model: torch.zeros(()))
        delta = {k: (start[k] - v.double()) / RATE for k, v in model.state_dict().items()}
        squared = sum(float(v.square().sum()) for v in delta.values())
        for k in numerator:
            numerator[k] += before**q * delta[k]
        denominator += q * before ** (q - 1) * squared + before**q / RATE
    for k, value in final.items():
        assert torch.allclose(value.double(), start[k] - numerator[k] / denominator, atol=2e-3)
    assert distance({k: v.double() for k, v in final.items()}, start) > 0.02


def test_q_zero_is_plain_averaging_of_equal_members():
    scale, weight = q_weight(0.0, loss=3.0, update_norm_squared=7.0, learning_rate=0.1, largest=1.0)
    assert (scale, weight) == (1.0, WEIGHT_STEPS)


def test_a_q_weight_above_its_bound_counts_as_the_bound_and_keeps_the_numerator():
    scale, weight = q_weight(1.0, loss=3.0, update_norm_squared=100.0, learning_rate=0.1, largest=16.0)
    assert weight == WEIGHT_STEPS
    assert scale * 16.0 == pytest.approx(3.0)


def test_a_q_weight_below_the_plan_s_ratio_counts_as_the_smallest_and_keeps_the_numerator():
    scale, weight = q_weight(1.0, 0.5, 0.0, 0.1, largest=16.0, smallest_steps=WEIGHT_STEPS // 16)
    assert weight == WEIGHT_STEPS // 16
    assert scale * 1.0 == pytest.approx(0.5)


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan"), float("inf")])
def test_qffl_refuses_a_loss_that_means_nothing(loss):
    with pytest.raises(ParameterRefused, match="positive, finite loss"):
        q_weight(1.0, loss, 1.0, 0.1, 1.0)


def test_fine_tuning_trains_on_after_the_last_round():
    learners, final = federate(local_strategy("fine_tuning"), rounds=1)
    for name, learner in learners.items():
        shared = copy.deepcopy(learner.model)
        shared.load_state_dict(final)
        assert loss_of(learner.personal, name) < loss_of(shared, name)


def test_any_subset_of_parameters_is_trained_by_name_pattern():
    """Adapters of low rank (LoRA) beside frozen weights: only they travel."""

    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = torch.nn.Linear(4, 4)
            self.lora_a = torch.nn.Parameter(torch.full((1, 4), 0.1))
            self.lora_b = torch.nn.Parameter(torch.zeros(4, 1))

    model = Adapted()
    with Federation(3, model=model.state_dict(), shared=["lora_*"]) as federation:
        federation.train(lambda name, _round: {"lora_a": torch.ones(1, 4), "lora_b": torch.ones(4, 1)})
        with federation.open("member-1") as member:
            final = member.latest_state()
    assert set(final) == {"lora_a", "lora_b"}
    assert torch.allclose(final["lora_b"], torch.ones(4, 1), atol=1e-3)


@pytest.mark.parametrize("name", ["krum", "median", "trimmed mean"])
def test_what_needs_single_updates_is_refused_with_the_reason(name):
    with pytest.raises(ParameterRefused, match="only sums exist"):
        local_strategy(name)
    with pytest.raises(ParameterRefused, match="only sums exist"):
        Strategy.parse(name, {})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: local_strategy("sgd"), "no strategy 'sgd'"),
        (lambda: local_strategy("fedavg", 0.5), "no strength"),
        (lambda: local_strategy("fedprox", -1.0), "isn't within"),
        (lambda: local_strategy("ditto", float("nan")), "isn't within"),
        (lambda: local_strategy("fedper").plan(network()), "needs the name patterns"),
        (lambda: local_strategy("fedavg").plan(network(), local=["1.*"]), "keeps nothing local"),
        (lambda: local_strategy("fedbn").plan(network().state_dict()), "give the torch module"),
        (lambda: local_strategy("fedbn").plan(torch.nn.Linear(2, 2)), "no normalisation layer"),
        (lambda: local_strategy("fedper").plan(network(), local=["*"]), "nothing is left to share"),
        (lambda: Learner(local_strategy("qffl"), network()), "needs evaluate"),
    ],
)
def test_a_strategy_that_can_t_work_says_why(make, match):
    with pytest.raises(ParameterRefused, match=match):
        make()


def test_a_pattern_without_a_tensor_is_an_error_that_names_it():
    with pytest.raises(EncodingError, match="tail"):
        local_strategy("fedper").plan(network(), local=["tail.*"])


def test_a_newcomer_takes_the_shared_tensors_and_keeps_its_head():
    learner = Learner(local_strategy("fedper"), network())
    head = learner.model.state_dict()["1.weight"].clone()
    learner.begin({"0.0.weight": torch.ones(6, 4)})
    assert torch.equal(learner.model.state_dict()["0.0.weight"], torch.ones(6, 4))
    assert torch.equal(learner.model.state_dict()["1.weight"], head)
    with pytest.raises(ParameterRefused, match="isn't the plan's model"):
        learner.begin({"other": torch.ones(1)})


def test_every_strategy_is_described():
    assert set(strategies()) == {"fedavg", "fedprox", "fedper", "fedbn", "ditto", "qffl", "fine_tuning"}
    assert np.all([len(text) > 10 for text in strategies().values()])
