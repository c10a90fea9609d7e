"""The same faults on the neighbour graph, its exact thresholds, and a cohort of ten thousand."""

from collections.abc import Iterator

import pytest
from blindsum.crypto.schemes.base import StepName
from blindsum.crypto.schemes.masking import scheme as masking_scheme
from blindsum.crypto.schemes.masking import thresholds
from blindsum.crypto.schemes.masking.aggregator import MaskingAggregator
from federation_driver import Federation, make_federation, plain_sum
from federation_simulator import BENIGN, KINDS, Simulation, View, operations
from hypothesis import given, settings
from hypothesis import strategies as st
from large_cohort import play

MASKING = masking_scheme("masking")


@pytest.fixture
def _small_rings() -> Iterator[None]:
    """Rings from 61 members on, so that a round of them is quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "COMPLETE_UP_TO", 60)
        yield


def ring(size: int, n_min: int = 20) -> Federation:
    return make_federation(
        MASKING, size, fields=40, bits=8, n_min=n_min, n_max=250, gamma=50, delta=50, security=40
    )


def machine_of(view: View) -> MaskingAggregator:
    assert isinstance(view.machine, MaskingAggregator)
    return view.machine


def neighbours_of_the_first(view: View) -> list[str]:
    cohort = machine_of(view)._known
    return [cohort.id(position) for position in cohort.graph.neighbours(0).tolist()]


@pytest.mark.usefixtures("_small_rings")
@pytest.mark.parametrize("step", ["upload", "confirm", "reveal"])
@pytest.mark.parametrize("short", [0, 1])
def test_fault_41_exactly_t_neighbours_and_one_fewer(step: StepName, short: int) -> None:
    """All but t, or t - 1, of one member's neighbours leave: the exact sum, or an abort with its reason."""
    s = Simulation(ring(61))
    view = s.views[0]
    for _ in range(MASKING.steps.index(step)):
        s.finish_step(view)
    cohort = machine_of(view)._known
    assert cohort.k < cohort.n - 1
    gone = neighbours_of_the_first(view)[: cohort.k - cohort.t + short]
    for name in gone:
        s.members[name].gone = True
    s.settle()
    s.end()
    if short:
        assert view.machine.abort is not None
        assert "neighbours" in view.machine.abort.reason or "good shares" in view.machine.abort.reason
        assert not s.accepted()
        return
    assert view.machine.abort is None
    survivors = [n for n in s.federation.members if step != "upload" or n not in gone]
    assert list(view.machine.survivors) == survivors
    assert set(s.accepted()) == set(s.federation.members) - set(gone)
    assert (s.accepted()[survivors[-1]].total == plain_sum(s.inputs, survivors)).all()


@pytest.mark.usefixtures("_small_rings")
@settings(max_examples=2, deadline=None)
@given(st.integers(0, 2**32))
def test_no_fault_gives_a_false_sum_on_a_ring(number: int) -> None:
    """What must hold is checked at every message and sum; three rogues of at most 5 % of 61."""
    s = Simulation(ring(61), rogues=["m0003", "m0020", "m0050"])
    s.run(operations(f"ring {number}", 30, KINDS))
    s.settle()
    s.end()


@pytest.mark.slow
def test_230_members_with_faults_in_every_step() -> None:
    """A ring without any shortening: restarts and lost messages everywhere, and a few that leave."""
    s = Simulation(ring(230, n_min=100))
    view = s.views[0]
    for step in range(5):
        s.run(operations(f"large ring {step}", 60, BENIGN))
        s.finish_step(view, absent={"m0007"} if step == 2 else ())
    s.settle()
    s.end()
    whole = [n for n, m in s.members.items() if not m.cut and n != "m0007"]
    assert machine_of(view)._known.k < 229
    assert list(view.machine.survivors) == whole
    assert len(s.accepted()) == 230


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_members_are_summed_exactly() -> None:
    """Every 50th leaves before its upload; `large_cohort.py` prints what it took."""
    round_ = play(10_000)
    assert round_.exact
    assert round_.dropped == 200
    assert (round_.neighbours, round_.threshold) >= (82, 61)
