"""Local training under any strategy: the app brings one function, the strategy says on what it is run.

    learner = Learner(LocalStrategy.of(plan), model)
    for rnd in member.rounds():
        with rnd:
            learner.take_part(rnd, train, examples=len(data))
    answer = learner.personal(images)                        # the model to use at this site

`train(model, penalty)` makes this round's gradient steps on `model` in place, adds `penalty(model)` to each
loss, and returns the mean loss. Needs the `torch` extra.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from blindsum.client.learning.local_strategy import WEIGHT_STEPS, LocalStrategy, q_weight
from blindsum.client.member import Round
from blindsum.client.receipts import RoundReceipt
from blindsum.crypto.errors import ParameterRefused
from torch import Tensor, nn

Penalty = Callable[[nn.Module], Tensor]
Train = Callable[[nn.Module, Penalty], float]


class Learner:
    """One member's models under a strategy.

    `model` is what the federation trains, `personal` what this site should use: the same object but under
    ditto. For qffl, `evaluate(model)` gives the mean loss on the member's training data before it trains,
    `learning_rate` is that of the local training, and `largest_weight` bounds h (see `q_weight`).
    """

    def __init__(
        self,
        strategy: LocalStrategy,
        model: nn.Module,
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        learning_rate: float | None = None,
        largest_weight: float = 16.0,
    ) -> None:
        if strategy.name == "qffl" and (evaluate is None or learning_rate is None):
            raise ParameterRefused("q-FFL needs evaluate=... and learning_rate=... of the local training")
        self.strategy = strategy
        self.model = model
        self.personal = copy.deepcopy(model) if strategy.name == "ditto" else model
        self._evaluate = evaluate
        self._learning_rate = learning_rate
        self._largest = largest_weight

    def take_part(
        self,
        rnd: Round,
        train: Train,
        *,
        examples: int,
        metrics: Mapping[str, float] | None = None,
    ) -> RoundReceipt:
        """Take the shared weights, train, and submit; what `Round.submit` raises.

        A metric `loss` that the plan declares and `metrics` leaves out is what `train` returned.
        """
        shared = rnd.weights()
        self.begin(shared)
        anchor = self._anchor(shared)
        before = self._loss_before()
        loss = train(self.model, self._penalty(anchor) if self.strategy.penalises() else _nothing)
        if self.personal is not self.model:
            train(self.personal, self._penalty(anchor))
        given = dict(metrics or {})
        if any(metric.name == "loss" for metric in rnd.plan.encoding.metrics):
            given.setdefault("loss", loss)
        state = self.model.state_dict()
        if self.strategy.name == "qffl":
            smallest = -(-WEIGHT_STEPS // rnd.plan.encoding.weight_ratio)
            state, examples = self._q_weighted(shared, state, before, smallest)
        return rnd.submit(state, examples=examples, metrics=given)

    def begin(self, shared: Mapping[str, Any]) -> None:
        """Put the federation's tensors into the model; local ones stay.

        A newcomer begins with `Member.latest_state()` and fits what is local.

        Raises `ParameterRefused` naming a tensor that the model doesn't have.
        """
        unknown = set(shared) - set(self.model.state_dict())
        if unknown:
            raise ParameterRefused(f"the model has no tensor {min(unknown)!r}; it isn't the plan's model")
        self.model.load_state_dict(dict(shared), strict=False)

    def finish(self, shared: Mapping[str, Any], train: Train | None = None) -> nn.Module:
        """After the last round: take the final weights and, under fine_tuning, train on; the personal model.

        Raises `ParameterRefused` if fine_tuning isn't given a training function.
        """
        self.begin(shared)
        if self.strategy.name == "fine_tuning":
            if train is None:
                raise ParameterRefused("fine_tuning trains after the last round; give train=...")
            train(self.model, _nothing)
        return self.personal

    def _anchor(self, shared: Mapping[str, Any]) -> dict[str, Tensor]:
        names = {name for name, _ in self.model.named_parameters()}
        return {name: value.detach().clone() for name, value in shared.items() if name in names}

    def _penalty(self, anchor: Mapping[str, Tensor]) -> Penalty:
        """Half the strength times the squared distance to the shared model (FedProx eq. 2, Ditto eq. 1)."""
        half = self.strategy.strength / 2

        def penalty(model: nn.Module) -> Tensor:
            distance = torch.zeros(())
            for name, value in model.named_parameters():
                if name in anchor:
                    distance = distance + (value - anchor[name]).square().sum()
            return half * distance

        return penalty

    def _loss_before(self) -> float:
        return self._evaluate(self.model) if self._evaluate is not None else 0.0

    def _q_weighted(
        self, shared: Mapping[str, Any], state: Mapping[str, Tensor], loss: float, smallest: int
    ) -> tuple[dict[str, Tensor], int]:
        assert self._learning_rate is not None
        moved = {name: state[name].double() - shared[name].double() for name in shared}
        norm = sum(float(value.square().sum()) for value in moved.values())
        scale, weight = q_weight(
            self.strategy.strength, loss, norm, self._learning_rate, self._largest, smallest
        )
        scaled = {name: (shared[name].double() + scale * moved[name]).to(state[name].dtype) for name in moved}
        return {**state, **scaled}, weight


def _nothing(_model: nn.Module) -> Tensor:
    return torch.zeros(())
