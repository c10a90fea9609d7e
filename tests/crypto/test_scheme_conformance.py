"""What every scheme must do behind schemes/base.py: one suite, one row of settings a scheme."""

import pickle
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial

import msgspec
import numpy as np
import pytest
from blindsum.crypto.errors import BlindsumError, EncodingError, OpeningFailed, RefusalReason, Refused
from blindsum.crypto.schemes.base import Complaint, frame_digest, upload_digest
from blindsum.crypto.schemes.homomorphic.cipher import KeyPair, choose_parameters, generate_keys
from blindsum.crypto.schemes.registry import scheme
from blindsum.crypto.trust.roster import HeKey
from federation_driver import (
    Federation,
    RoundDriver,
    make_federation,
    plain_sum,
    powers_of_two,
    seeded,
)


@dataclass(frozen=True)
class Row:
    """How to make a federation of a scheme, and how large a vector is worth streaming in a test."""

    make: Callable[..., Federation]
    several_frames: int
    large: int
    large_peak: int
    """Bytes that protecting `large` fields, frame by frame, may take at its peak."""


def make_masking(size: int, **settings: object) -> Federation:
    return make_federation(scheme("masking"), size, **settings)  # type: ignore[arg-type]


@cache
def he_key(name: str, length: int) -> tuple[HeKey, KeyPair]:
    """A key for at most 16 members and fields of 16 bits, in frames of about `length` fields."""
    parameters = choose_parameters(name, 16, 16, length=length, modulus_bits=2048, minimum_security=112)
    keys = generate_keys(parameters)
    entry = HeKey(scheme=name, parameters=parameters.name, bits=16, n_max=16, digest=keys.key_id)
    return entry, keys


def make_homomorphic(name: str, length: int, size: int, **settings: object) -> Federation:
    pytest.importorskip(
        "phe" if name == "paillier" else "tenseal", reason=f"the extra of {name} isn't installed"
    )
    entry, keys = he_key(name, length)
    made = make_federation(
        scheme(name),
        size,
        he_key=entry.digest,
        he_parameters=entry.parameters,
        he_public=keys.public,
        he_secret=keys.secret,
        **settings,  # type: ignore[arg-type]
    )
    roster = msgspec.structs.replace(made.terms.roster, he_keys=(entry,))
    return replace(made, terms=replace(made.terms, roster=roster))


ROWS = {
    "masking": Row(make_masking, several_frames=250_000, large=10_000_000, large_peak=4 << 20),
    "bfv": Row(
        partial(make_homomorphic, "bfv", 8_000), several_frames=20_000, large=10_000_000, large_peak=24 << 20
    ),
    "ckks": Row(
        partial(make_homomorphic, "ckks", 8_000), several_frames=20_000, large=2_000_000, large_peak=24 << 20
    ),
    "paillier": Row(
        partial(make_homomorphic, "paillier", 100), several_frames=250, large=20_000, large_peak=4 << 20
    ),
}


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def driver(federation: Federation, **options: object) -> RoundDriver:
    return RoundDriver(federation, powers_of_two(federation), **options)  # type: ignore[arg-type]


# -- sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 4, 7])
@pytest.mark.parametrize("fields", [1, 2, 10])
def test_every_member_opens_the_exact_sum(row: Row, size: int, fields: int) -> None:
    d = driver(row.make(size, fields=fields))
    d.run()
    assert d.aggregator.abort is None
    assert d.aggregator.survivors == d.federation.members
    expected = plain_sum(d.inputs, d.federation.members)
    for name in d.federation.members:
        assert (d.opened(name) == expected).all()
    assert not d.aggregator.named


def test_members_that_never_come_are_not_counted(row: Row) -> None:
    d = driver(row.make(7))
    first = d.aggregator.step
    assert first is not None
    d.run({first: ["m0002", "m0005"]})
    assert d.aggregator.survivors == ("m0000", "m0001", "m0003", "m0004", "m0006")
    assert (d.opened("m0000") == plain_sum(d.inputs, d.aggregator.survivors)).all()


def test_excluded_members_are_not_asked(row: Row) -> None:
    d = driver(row.make(5), exclude=frozenset({"m0001"}))
    assert "m0001" not in d.aggregator.participants
    with pytest.raises(Refused) as refusal:
        d.aggregator.request("m0001")
    assert refusal.value.reason is RefusalReason.NOT_A_PARTICIPANT
    d.run()
    assert (d.opened("m0000") == plain_sum(d.inputs, d.aggregator.survivors)).all()


@pytest.mark.parametrize("value", [0, 65535])
def test_all_zero_and_all_maximum_vectors(row: Row, value: int) -> None:
    federation = row.make(4, n_max=4)
    d = RoundDriver(federation, {name: np.full(10, value, dtype=np.uint32) for name in federation.members})
    d.run()
    assert d.opened("m0003").tolist() == [4 * value] * 10


def test_several_frames_with_a_shorter_last_one(row: Row) -> None:
    federation = row.make(3, fields=row.several_frames)
    d = driver(federation)
    assert d.aggregator.layout.frames > 1
    assert row.several_frames % d.aggregator.layout.fields_per_frame
    assert d.aggregator.layout == federation.scheme.bulk_layout(federation.terms)
    d.run()
    assert (d.opened("m0001") == plain_sum(d.inputs, federation.members)).all()


def test_a_vector_is_protected_in_bounded_memory(row: Row) -> None:
    federation = row.make(3, fields=row.large)
    d = RoundDriver(federation, {})
    while d.aggregator.step != "upload":
        d.step()
    protector = d.machines["m0000"].begin_upload(d.aggregator.request("m0000"))
    assert not isinstance(protector, Complaint)
    arithmetic = d.aggregator.arithmetic()
    values = np.zeros(protector.layout.fields_per_frame, dtype=np.uint32)
    digests = []
    tracemalloc.start()
    try:
        for index in range(protector.layout.frames):
            start, end = protector.layout.field_range(index)
            frame = protector.protect(index, values[: end - start])
            digests.append(frame_digest(frame))
            arithmetic.add(index, None, frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < row.large_peak
    reply = d.machines["m0000"].seal_upload(upload_digest(protector.h1, digests))
    assert d.aggregator.check_reply("m0000", reply)


# -- restarts --------------------------------------------------------------------------------------------


def test_members_and_aggregator_restart_after_every_action(row: Row) -> None:
    calm, shaken = driver(row.make(5)), driver(row.make(5), restore=True)
    calm.run()
    shaken.run()
    expected = plain_sum(calm.inputs, calm.federation.members)
    for name in calm.federation.members:
        assert (calm.opened(name) == expected).all()
        assert (shaken.opened(name) == expected).all()
        assert (
            shaken.restored(name).open_sum(shaken.aggregator.result()).survivors
        ) == calm.aggregator.survivors


def test_a_replayed_aggregator_is_the_same_machine(row: Row) -> None:
    d = driver(row.make(4))
    while d.aggregator.step is not None:
        for name in d.aggregator.participants:
            again = d.replayed()
            assert (again.step, again.participants, again.replied, again.quorum) == (
                d.aggregator.step, d.aggregator.participants, d.aggregator.replied, d.aggregator.quorum,
            )  # fmt: skip
            assert again.request(name) == d.aggregator.request(name)
            d.deliver(name, d.answer(name))
        d.close()
    again = d.replayed()
    assert again.result() == d.aggregator.result()
    for index, total in enumerate(d.totals):
        assert total is not None
        assert again.finish_frame(index, total) == d.aggregator.finish_frame(index, bytes(total))


def test_a_request_asked_again_gets_the_same_reply(row: Row) -> None:
    d = driver(row.make(4))
    while d.aggregator.step is not None:
        step = d.aggregator.step
        for name in d.aggregator.participants:
            request = d.aggregator.request(name)
            assert d.aggregator.request(name) == request
            reply = d.answer(name)
            if step != "upload":
                assert d.machines[name].answer(step, request) == reply
                assert d.restored(name).answer(step, request) == reply
            else:
                digest = d.aggregator.expected_digest(reply)
                assert d.machines[name].seal_upload(digest) == reply
                with pytest.raises(Refused):
                    d.machines[name].seal_upload(bytes(32))
            d.deliver(name, reply)
        d.close()
    assert (d.opened("m0000") == plain_sum(d.inputs, d.federation.members)).all()


def test_a_snapshot_is_strict(row: Row) -> None:
    d = driver(row.make(4))
    federation = d.federation
    snapshot = d.machines["m0000"].snapshot()
    other_round = row.make(4, number=2)
    for bad, terms, keys in (
        (snapshot + b"\0", federation.terms, federation.keys["m0000"]),
        (snapshot[:-1], federation.terms, federation.keys["m0000"]),
        (b"", federation.terms, federation.keys["m0000"]),
        (snapshot, federation.terms, federation.keys["m0001"]),
        (snapshot, other_round.terms, other_round.keys["m0000"]),
    ):
        with pytest.raises(Refused):
            federation.scheme.restore_member(terms, keys, bad, seeded("x"))


# -- input that isn't accepted ---------------------------------------------------------------------------


def test_replies_count_once(row: Row) -> None:
    d = driver(row.make(4))
    other = driver(row.make(4), seed="another run")
    while d.aggregator.step is not None:
        step = d.aggregator.step
        replies = {name: d.answer(name) for name in d.aggregator.participants}
        first, second = d.aggregator.participants[:2]
        rival = (
            other.answer(first) if step in ("advertise", "upload") and other.aggregator.step == step else None
        )
        assert d.deliver(first, replies[first])
        assert not d.aggregator.accept(first, replies[first])
        if rival is not None and rival != replies[first]:
            with pytest.raises(Refused) as refusal:
                d.aggregator.accept(first, rival)
            assert refusal.value.reason is RefusalReason.CONFLICT
        # Someone else's bytes, and bytes from no one in the roster.
        with pytest.raises(Refused):
            d.aggregator.accept(second, replies[first])
        with pytest.raises(Refused) as refusal:
            d.aggregator.accept("stranger", replies[second])
        assert refusal.value.reason is RefusalReason.UNKNOWN_MEMBER
        assert d.aggregator.replied == {first}
        for name in d.aggregator.participants[1:]:
            d.deliver(name, replies[name])
        d.close()
        # Late and identical: still no error, still not counted twice.
        assert not d.aggregator.accept(first, replies[first])
    with pytest.raises(Refused) as refusal:
        d.aggregator.accept("m0000", b"anything")
    assert refusal.value.reason is RefusalReason.CLOSED
    assert (d.opened("m0000") == plain_sum(d.inputs, d.federation.members)).all()


def test_damaged_replies_change_nothing(row: Row) -> None:
    d = driver(row.make(4))
    while d.aggregator.step is not None:
        for name in d.aggregator.participants:
            reply = d.answer(name)
            before = d.aggregator.replied
            flipped = [reply[:at] + bytes([reply[at] ^ 1]) + reply[at + 1 :] for at in (0, 1, len(reply) - 1)]
            middle = len(reply) // 2
            flipped.append(reply[:middle] + bytes([reply[middle] ^ 0x80]) + reply[middle + 1 :])
            for bad in (b"", reply[:-1], reply[: len(reply) // 2], reply + b"\0", reply + reply, *flipped):
                with pytest.raises(Refused):
                    d.aggregator.check_reply(name, bad)
                with pytest.raises(Refused):
                    d.aggregator.accept(name, bad)
            assert d.aggregator.replied == before
            d.deliver(name, reply)
        d.close()
    assert (d.opened("m0000") == plain_sum(d.inputs, d.federation.members)).all()


def test_damaged_requests_are_refused_and_the_right_one_is_still_answered(row: Row) -> None:
    d = driver(row.make(4))
    while d.aggregator.step is not None:
        step = d.aggregator.step
        for name in d.aggregator.participants:
            request = d.aggregator.request(name)
            machine = d.machines[name]
            before = machine.snapshot()
            for bad in (b"", request[:-1], request[: len(request) // 2], request + b"\0", request + request):
                with pytest.raises(Refused):
                    machine.begin_upload(bad) if step == "upload" else machine.answer(step, bad)
            assert machine.snapshot() == before
            d.deliver(name, d.answer(name))
        d.close()
    result = d.aggregator.result()
    for bad in (b"", result[:-1], result + b"\0"):
        with pytest.raises(BlindsumError):
            d.machines["m0001"].open_sum(bad)
    assert (d.opened("m0000") == plain_sum(d.inputs, d.federation.members)).all()


def test_steps_out_of_order_are_refused(row: Row) -> None:
    d = driver(row.make(4))
    steps = d.federation.scheme.steps
    assert d.aggregator.step == steps[0]
    for ahead in steps[1:]:
        with pytest.raises(Refused):
            d.machines["m0000"].begin_upload(b"") if ahead == "upload" else d.machines["m0000"].answer(
                ahead, b""
            )
    assert d.machines["m0000"].waiting_for == steps[0]
    with pytest.raises(Refused):
        d.machines["m0000"].seal_upload(bytes(32))
    with pytest.raises(Refused):
        d.machines["m0000"].answer("upload", b"")
    for early in (d.aggregator.result, lambda: d.aggregator.finish_frame(0, bytes(8))):
        with pytest.raises(Refused):
            early()
    d.run()
    assert d.machines["m0000"].waiting_for is None
    for late in (d.aggregator.close, lambda: d.aggregator.request("m0000")):
        with pytest.raises(Refused) as refusal:
            late()
        assert refusal.value.reason is RefusalReason.CLOSED


def test_frames_of_another_size_are_refused(row: Row) -> None:
    d = driver(row.make(4))
    d.run(until="upload")
    arithmetic, layout = d.aggregator.arithmetic(), d.aggregator.layout
    for size in (0, layout.upload_last - 1, layout.upload_last + 1):
        with pytest.raises(Refused):
            arithmetic.check(0, bytes(size))
    with pytest.raises(Refused):
        arithmetic.check(1, bytes(layout.upload_last))
    protector = d.machines["m0000"].begin_upload(d.aggregator.request("m0000"))
    assert not isinstance(protector, Complaint)
    for fields in (np.zeros(9, np.uint32), np.zeros(11, np.uint32), np.full(10, 1 << 16, np.uint32)):
        with pytest.raises(EncodingError):
            protector.protect(0, fields)
    with pytest.raises(EncodingError):
        protector.protect(1, np.zeros(10, np.uint32))


def test_a_published_frame_of_another_size_does_not_open(row: Row) -> None:
    d = driver(row.make(4))
    d.run()
    opener = d.machines["m0000"].open_sum(d.aggregator.result())
    (frame,) = d.published()
    for bad in (b"", frame[:-1], frame + b"\0"):
        with pytest.raises(OpeningFailed):
            opener.open(0, bad)


# -- endings ---------------------------------------------------------------------------------------------


def test_below_the_smallest_cohort_the_round_aborts(row: Row) -> None:
    d = driver(row.make(4, n_min=4))
    first = d.aggregator.step
    assert first is not None
    assert d.aggregator.quorum == 4
    d.step(absent=["m0000"])
    assert d.aggregator.step is None
    assert d.aggregator.abort is not None
    assert d.aggregator.participants == ()
    with pytest.raises(Refused):
        d.aggregator.result()


def test_an_erased_member_answers_and_opens_nothing(row: Row) -> None:
    d = driver(row.make(4))
    d.run()
    machine = d.machines["m0000"]
    machine.erase()
    assert machine.waiting_for is None
    for step in d.federation.scheme.steps:
        with pytest.raises(Refused):
            machine.begin_upload(b"") if step == "upload" else machine.answer(step, b"")
    with pytest.raises(Refused):
        machine.open_sum(d.aggregator.result())


def test_machines_do_not_print_or_pickle(row: Row) -> None:
    d = driver(row.make(4))
    d.run(until="upload")
    machine = d.machines["m0000"]
    assert len(repr(machine)) < 100
    with pytest.raises(TypeError):
        pickle.dumps(machine)


def test_the_trust_line_is_one_line(row: Row) -> None:
    federation = row.make(4)
    line = federation.scheme.trust_line(federation.terms)
    assert line.strip() == line
    assert "\n" not in line
    assert line.endswith(".")
