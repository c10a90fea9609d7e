"""Mean and variance of all members' inputs by one secure sum."""

import numpy as np
import pytest
from blindsum.client.learning.normalisation import (
    InputStatistics,
    statistics_model,
    statistics_of,
    statistics_plan,
)
from blindsum.client.testing import Federation
from blindsum.crypto.errors import EncodingError, ParameterRefused

COUNTS = {"member-1": 40, "member-2": 7, "member-3": 100}


def examples_of(name):
    stream = np.random.default_rng(int(name[-1]))
    return stream.uniform(0, 255, (COUNTS[name], 3, 5, 5)) * np.array([1.0, 0.5, 0.1]).reshape(1, 3, 1, 1)


def test_the_statistics_are_those_of_the_pooled_examples():
    with Federation(3) as federation:
        federation.start(statistics_model(3), **statistics_plan(largest=100))

        def app(member):
            examples = examples_of(member.name)
            for rnd in member.rounds():
                rnd.submit(statistics_of(examples, low=0, high=255), examples=len(examples))
            return InputStatistics.of(member.latest_state(), low=0, high=255)

        found = federation.run(app)
    pooled = np.concatenate([examples_of(name) for name in COUNTS])
    for statistics in found.values():
        assert statistics.mean == pytest.approx(pooled.mean(axis=(0, 2, 3)), abs=0.01)
        assert statistics.deviation == pytest.approx(pooled.std(axis=(0, 2, 3)), abs=0.05)
    standard = statistics.standardise(pooled)
    assert standard.dtype == np.float32
    assert standard.mean(axis=(0, 2, 3)) == pytest.approx(np.zeros(3), abs=0.01)
    assert standard.std(axis=(0, 2, 3)) == pytest.approx(np.ones(3), abs=0.01)


def test_a_constant_channel_becomes_zero():
    state = statistics_of(np.full((4, 1, 2), 0.25), low=0, high=1)
    statistics = InputStatistics.of(state, low=0, high=1)
    assert statistics.standardise(np.full((2, 1, 3), 0.25)).tolist() == np.zeros((2, 1, 3)).tolist()


@pytest.mark.parametrize("examples", [[[2.0]], [[np.nan]], [[-0.1]], np.zeros((0, 3)), [1.0]])
def test_examples_outside_the_range_are_refused(examples):
    with pytest.raises(EncodingError, match="examples"):
        statistics_of(examples, low=0, high=1)


def test_a_range_or_shape_that_means_nothing_is_refused():
    with pytest.raises(ParameterRefused, match="low < high"):
        statistics_of([[0.5]], low=1, high=1)
    with pytest.raises(ParameterRefused, match="at least one channel"):
        statistics_model(0)
    with pytest.raises(EncodingError, match="mean"):
        InputStatistics.of({"mean": np.zeros(1, np.float32)}, low=0, high=1)
