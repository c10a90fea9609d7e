"""A member takes a new model only if it isn't worse than its own on its own validation data."""

import numpy as np
import pytest
from blindsum.client.learning import AcceptGate
from blindsum.client.private_files import FolderError
from blindsum.crypto.errors import ParameterRefused
from hypothesis import given
from hypothesis import strategies as st


def score(state):
    return float(state["w"][0])


def model(value):
    return {"w": np.array([value], dtype=np.float64)}


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_the_model_in_use_is_never_worse_than_any_before(offers):
    gate = AcceptGate(score)
    best = -np.inf
    for value in offers:
        decision = gate.offer(model(value))
        assert decision.taken == (value >= best)
        best = max(best, value)
        assert score(gate.state) == best


def test_within_the_tolerance_a_slightly_lower_score_is_taken():
    gate = AcceptGate(score, model(0.80), tolerance=0.05)
    assert gate.offer(model(0.76)).taken
    refused = gate.offer(model(0.70))
    assert not refused.taken
    assert score(gate.state) == 0.76
    assert "kept its own" in str(refused)


def test_a_score_that_is_no_number_keeps_the_own_model():
    gate = AcceptGate(score, model(0.5))
    assert not gate.offer(model(np.nan)).taken
    assert score(gate.state) == 0.5


def test_the_first_model_needs_a_score():
    with pytest.raises(ParameterRefused, match="isn't a number"):
        AcceptGate(score).offer(model(np.nan))
    with pytest.raises(ParameterRefused, match="isn't a number"):
        AcceptGate(score, model(np.inf))
    with pytest.raises(ParameterRefused, match="no model yet"):
        _ = AcceptGate(score).state


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf")])
def test_a_tolerance_that_means_nothing_is_refused(tolerance):
    with pytest.raises(ParameterRefused, match="tolerance"):
        AcceptGate(score, tolerance=tolerance)


def test_the_model_in_use_survives_a_restart(tmp_path):
    gate = AcceptGate(score, model(0.9))
    gate.save(tmp_path / "in-use")
    again = AcceptGate.load(tmp_path / "in-use", score, model(0.0))
    assert not again.offer(model(0.8)).taken
    assert score(again.state) == 0.9
    (tmp_path / "in-use").chmod(0o644)
    with pytest.raises(FolderError, match="others may read"):
        AcceptGate.load(tmp_path / "in-use", score, model(0.0))


def test_another_model_s_file_is_refused(tmp_path):
    AcceptGate(score, model(0.9)).save(tmp_path / "in-use")
    with pytest.raises(ParameterRefused, match="other tensors"):
        AcceptGate.load(tmp_path / "in-use", score, {"w": np.zeros(2)})
    (tmp_path / "in-use").write_bytes(b"not a model")
    with pytest.raises(ParameterRefused, match="isn't a model"):
        AcceptGate.load(tmp_path / "in-use", score, model(0.0))
