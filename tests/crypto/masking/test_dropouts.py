"""Dropout at every step: the exact sum of the survivors, or an abort, never anything else."""

import numpy as np
import pytest
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.schemes.base import StepName
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.thresholds import complete_graph
from federation_driver import RoundDriver, make_federation, plain_sum, powers_of_two
from hypothesis import given, settings
from hypothesis import strategies as st

STEPS: tuple[StepName, ...] = ("advertise", "share", "upload", "confirm", "reveal")
MASKING = scheme("masking")


def play(
    size: int, drop: dict[StepName, list[str]], *, restore: bool = False, **settings_: int
) -> RoundDriver:
    federation = make_federation(MASKING, size, **settings_)  # type: ignore[arg-type]
    d = RoundDriver(federation, powers_of_two(federation), restore=restore)
    d.run(drop)
    return d


def check_the_sum(d: RoundDriver, survivors: set[str]) -> None:
    assert d.aggregator.abort is None
    assert set(d.aggregator.survivors) == survivors
    expected = plain_sum(d.inputs, survivors)
    for name in survivors:
        assert (d.opened(name) == expected).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_sum_is_the_survivors_or_the_round_aborts(data: st.DataObject) -> None:
    size = data.draw(st.integers(3, 9), "members")
    gamma = data.draw(st.sampled_from([333, 100]), "gamma")
    n_min = data.draw(st.integers(3, size), "n_min")
    restore = data.draw(st.booleans(), "restore") and size < 6
    leaving = {f"m{i:04d}": data.draw(st.sampled_from([*STEPS, *[None] * 8])) for i in range(size)}
    drop: dict[StepName, list[str]] = {
        step: [name for name, at in leaving.items() if at == step] for step in STEPS
    }
    d = play(size, drop, restore=restore, gamma=gamma, n_min=n_min)

    left = list(np.cumsum([len(drop[step]) for step in STEPS]))
    u1, u2, u3, u4, u5 = (size - gone for gone in left)
    if u1 < n_min:
        assert d.aggregator.abort is not None
        return
    t = complete_graph(u1, gamma).shares
    finishes = min(u2, u3) >= n_min and min(u2, u3, u4, u5) > t
    assert (d.aggregator.abort is None) == finishes
    if finishes:
        check_the_sum(d, {name for name, at in leaving.items() if at in (None, "confirm", "reveal")})
        assert not d.aggregator.named


@pytest.mark.parametrize("step", STEPS[1:])
def test_t_live_neighbours_finish_and_one_fewer_aborts(step: StepName) -> None:
    """Fault 41: of 8 members t = 5, so 6 must stay, each with 5 live neighbours."""
    names = [f"m{i:04d}" for i in range(8)]
    enough = play(8, {step: names[:2]})
    check_the_sum(enough, set(names[2:] if step in STEPS[:3] else names))
    short = play(8, {step: names[:3]})
    assert short.aggregator.abort is not None
    assert short.aggregator.step is None
    with pytest.raises(Refused):
        short.aggregator.result()


def test_a_lower_gamma_bears_more_dropouts() -> None:
    names = [f"m{i:04d}" for i in range(10)]
    assert play(10, {"upload": names[:3]}).aggregator.abort is not None
    check_the_sum(play(10, {"upload": names[:3]}, gamma=100, delta=300), set(names[3:]))


def test_members_that_drop_one_after_the_other() -> None:
    names = [f"m{i:04d}" for i in range(12)]
    d = play(12, {"share": names[:1], "upload": names[1:2], "confirm": names[2:3]}, restore=True)
    check_the_sum(d, set(names[2:]))


@pytest.mark.parametrize("size", [3, 4, 16])
def test_cohorts_from_n_min_to_n_max(size: int) -> None:
    d = play(size, {}, n_min=3, n_max=16)
    check_the_sum(d, set(d.federation.members))


def test_a_cohort_below_n_min_aborts_and_above_n_max_is_cut() -> None:
    """Fault 26."""
    assert play(3, {}, n_min=4, n_max=4).aggregator.abort is not None
    federation = make_federation(MASKING, 5, n_max=4)
    d = RoundDriver(federation, powers_of_two(federation))
    for name in federation.members[:4]:
        d.deliver(name, d.answer(name))
    with pytest.raises(Refused) as refusal:
        d.aggregator.accept("m0004", d.answer("m0004"))
    assert refusal.value.reason is RefusalReason.LIMIT
    d.close()
    d.run()
    check_the_sum(d, set(federation.members[:4]))


def test_a_late_upload_is_refused() -> None:
    federation = make_federation(MASKING, 5)
    d = RoundDriver(federation, powers_of_two(federation))
    d.run(until="upload")
    late = d.answer("m0000")
    d.step(absent=["m0000"])
    with pytest.raises(Refused) as refusal:
        d.deliver("m0000", late)
    assert refusal.value.reason is RefusalReason.NOT_A_PARTICIPANT
    d.run()
    check_the_sum(d, set(federation.members[1:]))


def test_a_member_that_was_dropped_after_sharing_can_open_the_sum() -> None:
    d = play(5, {"upload": ["m0000"]})
    assert (d.opened("m0000") == plain_sum(d.inputs, d.aggregator.survivors)).all()


def test_a_member_that_restarts_without_its_state_is_a_dropout() -> None:
    """Fault 42."""
    federation = make_federation(MASKING, 5)
    d = RoundDriver(federation, powers_of_two(federation))
    d.run(until="upload")
    d.machines["m0002"] = MASKING.member(federation.terms, federation.keys["m0002"], lambda n: b"\x05" * n)
    with pytest.raises(Refused) as refusal:
        d.answer("m0002")
    assert refusal.value.reason is RefusalReason.WRONG_STEP
    d.run({"upload": ["m0002"]})
    check_the_sum(d, set(federation.members) - {"m0002"})
