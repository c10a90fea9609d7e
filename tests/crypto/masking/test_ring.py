"""Rounds on the neighbour graph: the same machines, k neighbours each."""

import pytest
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.masking import scheme, thresholds
from federation_driver import RoundDriver, make_federation, plain_sum, powers_of_two

MASKING = scheme("masking")


@pytest.fixture
def small_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rings from 61 members on, so that a round of them is quick."""
    monkeypatch.setattr(thresholds, "COMPLETE_UP_TO", 60)


def ring_round(size: int, restore: bool = False) -> RoundDriver:
    federation = make_federation(MASKING, size, n_min=20, n_max=1000, gamma=50, delta=50, bits=8, fields=50)
    return RoundDriver(federation, powers_of_two(federation), restore=restore)


def check_the_sum(d: RoundDriver) -> None:
    assert d.aggregator.abort is None
    expected = plain_sum(d.inputs, d.aggregator.survivors)
    for name in d.aggregator.survivors[::20]:
        assert (d.opened(name) == expected).all()


@pytest.mark.usefixtures("small_rings")
def test_a_ring_bears_dropouts_at_every_step() -> None:
    d = ring_round(90)
    names = d.federation.members
    d.run(
        {
            "advertise": names[:2],
            "share": names[2:4],
            "upload": names[4:6],
            "confirm": names[6:8],
            "reveal": names[8:9],
        }
    )
    assert set(d.aggregator.survivors) == set(names[6:])
    check_the_sum(d)


@pytest.mark.usefixtures("small_rings")
def test_a_ring_in_which_someone_is_left_with_too_few_neighbours_aborts() -> None:
    d = ring_round(80)
    d.run(until="upload")
    cohort = d.aggregator._known  # type: ignore[attr-defined]
    lonely = cohort.graph.neighbours(0).tolist()
    gone = [cohort.id(position) for position in lonely[: cohort.k - cohort.t + 1]]
    d.step(gone)
    assert d.aggregator.abort is not None
    assert "neighbours" in d.aggregator.abort.reason


@pytest.mark.usefixtures("small_rings")
def test_a_member_without_live_neighbours_is_left_out_before_it_uploads() -> None:
    d = ring_round(80)
    d.run(until="share")
    cohort = d.aggregator._known  # type: ignore[attr-defined]
    gone = [
        cohort.id(position) for position in cohort.graph.neighbours(0).tolist()[: cohort.k - cohort.t + 1]
    ]
    d.step(gone)
    assert cohort.id(0) not in d.aggregator.participants
    d.run()
    assert d.aggregator.abort is None or "neighbours" in d.aggregator.abort.reason
    if d.aggregator.abort is None:
        check_the_sum(d)


@pytest.mark.usefixtures("small_rings")
def test_lying_shares_in_a_ring_are_named() -> None:
    d = ring_round(70)
    d.run(until="reveal")
    liar = d.aggregator.participants[5]
    honest = d.answer(liar)
    machine = d.aggregator
    machine.accept(liar, honest)
    position = machine._positions[liar]  # type: ignore[attr-defined]
    shares = bytearray(machine._revealed[position])  # type: ignore[attr-defined]
    shares[0] ^= 1
    machine._revealed[position] = bytes(shares)  # type: ignore[attr-defined]
    d.step(absent=[liar])
    assert set(d.aggregator.named) == {liar}
    check_the_sum(d)


def test_the_first_cohort_above_the_complete_graph() -> None:
    d = ring_round(201)
    names = d.federation.members
    d.run({"upload": names[:5], "reveal": names[5:8]})
    k = d.aggregator._known.k  # type: ignore[attr-defined]
    assert k == 42
    check_the_sum(d)


def test_parameters_that_no_ring_bears_are_refused_at_set_up() -> None:
    federation = make_federation(MASKING, 3, n_max=201)
    with pytest.raises(ParameterRefused, match="gamma and delta"):
        MASKING.check_terms(federation.terms)
    with pytest.raises(ParameterRefused, match="bits"):
        MASKING.check_terms(make_federation(MASKING, 3, n_max=100_000, bits=32, gamma=50, delta=50).terms)
    MASKING.check_terms(make_federation(MASKING, 3, n_max=100_000, gamma=50, delta=300).terms)
