"""Rows of the list of faults (README.md here) that need a whole federation, each by its number."""

import msgspec
import numpy as np
import pytest
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.encoding.quantise import WEIGHT_UNITS
from blindsum.crypto.encoding.sum_check import SumCheck, split, tag_limbs
from blindsum.crypto.encoding.vector import VectorDecoder, VectorEncoder, VectorPlan
from blindsum.crypto.errors import BlindsumError, OpeningFailed, ServerViolation
from blindsum.crypto.schemes.base import MemberRound, StepName
from blindsum.crypto.schemes.masking import scheme as masking_scheme
from blindsum.crypto.schemes.masking.messages import OPENED_BYTES, Revealed
from blindsum.crypto.trust.plan import Encoding
from federation_driver import RoundDriver, make_federation, plain_sum, powers_of_two, seeded
from federation_simulator import DEATHS, Death, Operation, Simulation, held_bytes

MASKING = masking_scheme("masking")
STEPS: tuple[StepName, ...] = MASKING.steps
VICTIM = "m0002"


def simulation(size: int = 8, **settings: object) -> Simulation:
    federation = make_federation(MASKING, size, fields=14, **{"gamma": 0, **settings})  # type: ignore[arg-type]
    return Simulation(federation, rogues=["m0001"])


def all_accept(s: Simulation, members: list[str] | tuple[str, ...], survivors: tuple[str, ...]) -> None:
    assert tuple(s.accepted()) == tuple(members)
    expected = plain_sum(s.inputs, survivors)
    assert all((one.total == expected).all() and one.survivors == survivors for one in s.accepted().values())


def others(s: Simulation) -> tuple[str, ...]:
    return tuple(name for name in s.federation.members if name != VICTIM)


# -- 22: boxes and shares --------------------------------------------------------------------------------


def test_fault_22_a_member_that_deals_bad_boxes_is_left_out_of_the_retry() -> None:
    s = simulation()
    s.run([Operation("step"), Operation("rogue_shares"), Operation("step")])
    view = s.views[0]
    s.finish_step(view)
    abort = view.machine.abort
    assert abort is not None
    assert abort.exclude == ("m0000", "m0001")
    assert set(view.machine.named) == {"m0000", "m0001"}
    assert not s.end().accepted()
    retry = make_federation(MASKING, 8, gamma=0, number=2)
    d = RoundDriver(retry, powers_of_two(retry), exclude=frozenset(abort.exclude))
    d.run()
    assert d.aggregator.survivors == retry.members[2:]
    assert (d.opened("m0003") == plain_sum(d.inputs, retry.members[2:])).all()


@pytest.mark.parametrize("kind", ["another recipient's", "another dealer's", "another round's"])
def test_fault_22_a_share_that_is_not_its_own_is_dropped_at_reveal(kind: str) -> None:
    liar = "m0001"
    d, other = (
        RoundDriver(f, powers_of_two(f))
        for f in (make_federation(MASKING, 6, number=number) for number in (1, 2))
    )
    for each in (d, other):
        each.run(until="reveal")
    shares = decode_message(d.answer(liar), Revealed, "the reply").shares
    if kind == "another dealer's":
        foreign = shares[:OPENED_BYTES]  # the first once more in the second place
    else:
        source = d.answer("m0002") if kind == "another recipient's" else other.answer(liar)
        foreign = decode_message(source, Revealed, "the reply").shares[OPENED_BYTES : 2 * OPENED_BYTES]
    forged = shares[:OPENED_BYTES] + foreign + shares[2 * OPENED_BYTES :]
    signature = d.federation.keys[liar].identity.sign(
        "masking reveal",
        d.aggregator.h1,
        liar.encode(),
        d.aggregator._root,  # type: ignore[attr-defined]
        forged,
    )
    for name in d.aggregator.participants:
        d.deliver(name, encode_message(Revealed(forged, signature)) if name == liar else d.answer(name))
    d.close()
    assert set(d.aggregator.named) == {liar}
    assert (d.opened("m0000") == plain_sum(d.inputs, d.federation.members)).all()


# -- 25: asked twice -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
def test_fault_25_a_request_of_any_step_asked_again_at_the_end(step: StepName) -> None:
    """The same request: the same bytes, frames too. Another one: nothing, and not even the same any more."""
    s = simulation()
    s.settle()
    asked = next(m for m in s.archive if (m.kind, m.member, m.step) == ("request", VICTIM, step))
    answered = next(m for m in s.archive if (m.kind, m.member, m.step) == ("reply", VICTIM, step))
    assert s._receive(asked) == [answered]
    s.apply(Operation("restart", 2))
    assert s._receive(asked) == [answered]
    other = next(m for m in s.archive if (m.kind, m.member, m.step) == ("request", "m0003", step))
    machine = s.members[VICTIM].machine
    payload = other.payload if other.payload != asked.payload else asked.payload + b"\0"
    with pytest.raises(ServerViolation) as violation:
        machine.begin_upload(payload) if step == "upload" else machine.answer(step, payload)
    assert violation.value.check == "second_request"
    assert s._receive(asked) == []
    s.end()


# -- 26: sizes of the cohort -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_fault_26_cohorts_around_their_limits(size: int) -> None:
    """n_min = 4, n_max = 6: below, nobody shares a secret; above, the first six are the cohort."""
    s = simulation(size, n_min=4, n_max=6)
    view = s.settle()
    sent = {m.step for m in s.archive if m.kind == "reply"}
    if size < 4:
        assert view.machine.abort is not None
        assert sent == {"advertise"}
        assert not s.accepted()
    else:
        cohort = s.federation.members[:6]
        all_accept(s, cohort, cohort)
    s.end()


# -- 27: members that hold different states --------------------------------------------------------------


def test_fault_27_a_member_with_another_state_takes_no_part() -> None:
    """The digest is in h: its keys and masks would be another round's, so it sends nothing at all."""
    federation = make_federation(MASKING, 8, fields=14, gamma=0)
    strayed = federation.with_header(state=b"\x01" * 32)

    def make(name: str, incarnation: int) -> MemberRound:
        terms = strayed.terms if name == VICTIM else federation.terms
        return MASKING.member(terms, federation.keys[name], seeded(f"{name} {incarnation}"))

    s = Simulation(federation, make_member=make)
    s.settle()
    s.end()
    all_accept(s, others(s), others(s))
    assert not s.members[VICTIM].emitted


def test_fault_27_an_advertisement_under_another_state_is_refused_by_everyone() -> None:
    """A server that brings the strayed member's keys in all the same finds no neighbour that takes them."""
    d = RoundDriver(make_federation(MASKING, 6), {})
    strayed = d.federation.with_header(state=b"\x01" * 32)
    advert = RoundDriver(strayed, {}).answer(VICTIM)
    with pytest.raises(BlindsumError):
        d.aggregator.accept(VICTIM, advert)
    entry = msgspec.msgpack.decode(advert)[1]
    for name in d.federation.members:
        if name != VICTIM:
            d.deliver(name, d.answer(name))
    d.aggregator._entries[2] = entry  # type: ignore[attr-defined]
    d.aggregator._replied.add(VICTIM)  # type: ignore[attr-defined]
    d.aggregator.close()
    for name in d.aggregator.participants:
        if name != VICTIM:
            with pytest.raises(ServerViolation) as violation:
                d.answer(name)
            assert violation.value.check == "neighbour_signature"


# -- 40 and 42: members that die -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "death"),
    [(i, d) for i, step in enumerate(STEPS) for d in (DEATHS if step == "upload" else DEATHS[:2])],
)
def test_faults_40_and_42_a_member_dies_in_a_step_and_comes_back_with_its_state(
    step: int, death: Death
) -> None:
    """Its answer is lost or was never made; asked again it goes on with the same bytes."""
    s = simulation()
    s.run([Operation("step")] * step)
    s.run([Operation("die", 2, DEATHS.index(death)), Operation("exchange", 2)])
    view = s.views[0]
    s.settle()
    s.end()
    survivors = others(s) if death == "in_upload" else s.federation.members
    assert view.machine.survivors == survivors
    # Dropped after sharing, it can still open what the others summed up.
    all_accept(s, s.federation.members, survivors)


@pytest.mark.parametrize("step", range(6))
def test_faults_40_and_42_a_member_dies_and_comes_back_without_its_state(step: int) -> None:
    """It is a dropout from then on: counted if its upload was there, and never able to open the sum."""
    s = simulation()
    s.run([Operation("step")] * step + [Operation("lose_state", 2)])
    s.settle()
    s.end()
    survivors = s.federation.members if step == 0 or step > 2 else others(s)
    all_accept(s, s.federation.members if step == 0 else others(s), survivors)


@pytest.mark.parametrize("step", range(6))
def test_fault_40_a_member_dies_for_good(step: int) -> None:
    s = simulation()
    s.run([Operation("step")] * step + [Operation("leave", 2)])
    s.settle()
    s.end()
    all_accept(s, others(s), s.federation.members if step > 2 else others(s))


@pytest.mark.parametrize("step", range(1, 5))
def test_fault_40_too_many_die_and_the_round_says_why(step: int) -> None:
    s = simulation()
    s.run([Operation("step")] * step + [Operation("leave", a) for a in range(4)])
    view = s.settle()
    s.end()
    assert view.machine.abort is not None
    assert STEPS[step] in view.machine.abort.reason
    assert not s.accepted()


@pytest.mark.parametrize("ending", ["sum", "abort"])
def test_the_aggregator_keeps_no_share_once_the_round_has_ended(ending: str) -> None:
    federation = make_federation(MASKING, 6)
    d = RoundDriver(federation, powers_of_two(federation))
    d.step()
    if ending == "abort":  # by another self seed and mask root than advertised
        dealer = d.machines[VICTIM]
        dealer._secrets = dealer._secrets[:32] + bytes(64) + dealer._secrets[96:]  # type: ignore[attr-defined]
    d.run(until="reveal")
    shares = []
    for name in d.aggregator.participants:
        reply = d.answer(name)
        d.deliver(name, reply)
        given = decode_message(reply, Revealed, "the shares").shares
        shares += [given[at : at + OPENED_BYTES] for at in range(0, len(given), OPENED_BYTES)]
    d.history.clear()
    assert all(share in held_bytes(d.aggregator) for share in shares)
    d.close()
    assert (d.aggregator.abort is not None) == (ending == "abort")
    held = held_bytes(d.aggregator)
    assert not any(share in held for share in shares)


# -- 47 and 48: members that send what the SDK refuses ---------------------------------------------------


PLAN = VectorPlan(("a",), (3,), Encoding(bits=16, max_examples=100), 16)


def weighted(units: dict[str, int]) -> tuple[RoundDriver, VectorDecoder]:
    """A round in which members claim weights of their own, with tags that fit: what only a rogue does."""
    names = list(units)
    federation = make_federation(MASKING, len(names), fields=PLAN.fields)
    d = RoundDriver(federation, {})
    d.run(until="upload")
    key = federation.keys[names[0]].group_key.check_key(d.aggregator.h1)
    check = SumCheck(key)
    inputs = {}
    for name in names:
        update = np.zeros(3, dtype=np.float32)
        encoder = VectorEncoder(
            PLAN, (0,), update, examples=100, metrics={}, check_key=key, member=name, rounding_seed=bytes(32)
        )
        fields = encoder.fields(0, PLAN.fields).astype(np.uint64)
        fields[PLAN.weight] = split(units[name], 16, PLAN.weight.stop - PLAN.weight.start)
        body = fields[: PLAN.tags[0].start]
        for tag, place in zip(check.expected([name], check.partial(0, body, 16)), PLAN.tags, strict=True):
            fields[place] = split(tag, 16, tag_limbs(16))
        inputs[name] = fields
    d.inputs = inputs
    d.run()
    return d, VectorDecoder(PLAN, (0,), check_key=key)


def test_fault_47_a_weight_above_the_cap_is_not_output() -> None:
    d, decoder = weighted(
        {"m0000": WEIGHT_UNITS, "m0001": 7 * WEIGHT_UNITS, "m0002": 1 << 17, "m0003": 1 << 17}
    )
    decoder.absorb(0, d.opened("m0000"))
    with pytest.raises(OpeningFailed, match="weights is out of range"):
        decoder.finish(d.aggregator.survivors)


def test_fault_47_a_false_value_within_range_is_not_noticed() -> None:
    """Nobody can: the sum is exactly that of what was sent. The docs say so."""
    d, decoder = weighted({"m0000": 1 << 17, "m0001": 3 << 17, "m0002": 1 << 17, "m0003": 1 << 17})
    decoder.absorb(0, d.opened("m0000"))
    assert decoder.finish(d.aggregator.survivors).weight == 6 << 17


def test_fault_48_a_sum_of_weights_of_zero_is_not_output() -> None:
    d, decoder = weighted(dict.fromkeys(["m0000", "m0001", "m0002"], 0))
    decoder.absorb(0, d.opened("m0001"))
    with pytest.raises(OpeningFailed, match="zero"):
        decoder.finish(d.aggregator.survivors)
