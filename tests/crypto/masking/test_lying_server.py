"""A server that lies (protocols.md 3, "what the server may try"; faults 20 to 26): nothing is revealed."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from blindsum.crypto.canonical import decode_message, encode_message
from blindsum.crypto.errors import ParameterRefused, RefusalReason, Refused, ServerViolation
from blindsum.crypto.primitives.key_agreement import AgreementKey
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.schemes.base import Complaint, MemberKeys, StepName
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.messages import (
    BOX_BYTES,
    COMMITMENTS_BYTES,
    ENTRY_BYTES,
    Advertisement,
    BoxComplaint,
    ConfirmRequest,
    Result,
    RevealRequest,
    ShareRequest,
    Shares,
    UploadRequest,
    leaf_hash,
    u32,
)
from federation_driver import RoundDriver, make_federation, plain_sum, powers_of_two

MASKING = scheme("masking")
VICTIM = "m0002"
POSITION = 2


def at(step: StepName, size: int = 6, drop: dict[StepName, list[str]] | None = None) -> RoundDriver:
    """A round whose honest aggregator has just opened `step`."""
    federation = make_federation(MASKING, size)
    d = RoundDriver(federation, powers_of_two(federation))
    d.run(drop, until=step)
    assert d.aggregator.step == step
    return d


def refuses(d: RoundDriver, step: StepName, request: bytes, check: str) -> None:
    """The victim names the check and answers nothing more, not even the honest request or after a restart."""
    honest = d.aggregator.request(VICTIM)
    machine = d.machines[VICTIM]
    with pytest.raises(ServerViolation) as violation:
        machine.begin_upload(request) if step == "upload" else machine.answer(step, request)
    assert violation.value.check == check
    for stopped in (machine, d.restored(VICTIM)):
        assert stopped.waiting_for is None
        with pytest.raises(ServerViolation):
            stopped.begin_upload(honest) if step == "upload" else stopped.answer(step, honest)


# -- share: the list of the cohort and the keys in it ----------------------------------------------------

Lie = Callable[[RoundDriver, ShareRequest], ShareRequest]


def replace_entry(
    d: RoundDriver, request: ShareRequest, position: int, entry: bytes, leaf: bool
) -> ShareRequest:
    """Another entry at a position (not the victim's own), with a leaf that fits it if asked for."""
    slot = position - (position > POSITION)
    entries = request.entries[: slot * ENTRY_BYTES] + entry + request.entries[(slot + 1) * ENTRY_BYTES :]
    leaves = request.leaves
    if leaf:
        fitting = leaf_hash(d.federation.terms.bound.h0, position, entry)
        leaves = leaves[: 32 * position] + fitting + leaves[32 * position + 32 :]
    return msgspec.structs.replace(request, entries=entries, leaves=leaves)


def entry_of(request: ShareRequest, position: int) -> bytes:
    slot = position - (position > POSITION)
    return request.entries[slot * ENTRY_BYTES : (slot + 1) * ENTRY_BYTES]


def servers_keys(d: RoundDriver, signer: SigningKey, name: str) -> bytes:
    keys = AgreementKey(b"s" * 32).public + AgreementKey(b"t" * 32).public + bytes(32)
    return keys + signer.sign("masking advertise", d.federation.terms.bound.h0, name.encode(), keys)


def own_key_unsigned(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return replace_entry(d, r, 4, servers_keys(d, SigningKey(b"z" * 32), "m0004")[:96] + bytes(64), leaf=True)


def own_key_signed_by_the_server(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return replace_entry(d, r, 4, servers_keys(d, SigningKey(b"z" * 32), "m0004"), leaf=True)


def own_key_signed_by_a_colluder(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    colluder = d.federation.keys["m0005"].identity
    return replace_entry(d, r, 4, servers_keys(d, colluder, "m0005"), leaf=True)


def own_key_under_the_old_leaf(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return replace_entry(d, r, 4, servers_keys(d, SigningKey(b"z" * 32), "m0004"), leaf=False)


def neighbours_entry_twice(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return replace_entry(d, r, 4, entry_of(r, 3), leaf=True)


def colluders_with_one_key(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    for position in (3, 4):
        name = f"m{position:04d}"
        r = replace_entry(d, r, position, servers_keys(d, d.federation.keys[name].identity, name), leaf=True)
    return r


def victims_own_keys_from_a_colluder(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    own = d.machines[VICTIM]._entry[:96]  # type: ignore[attr-defined]
    signature = d.federation.keys["m0004"].identity.sign(
        "masking advertise", d.federation.terms.bound.h0, b"m0004", own
    )
    return replace_entry(d, r, 4, own + signature, leaf=True)


def small_order_key_from_a_colluder(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    keys = bytes(32) + AgreementKey(b"t" * 32).public + bytes(32)
    signature = d.federation.keys["m0004"].identity.sign(
        "masking advertise", d.federation.terms.bound.h0, b"m0004", keys
    )
    return replace_entry(d, r, 4, keys + signature, leaf=True)


def member_twice(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    members = r.members[:16] + r.members[12:16] + r.members[20:]
    return msgspec.structs.replace(r, members=members)


def not_sorted(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return msgspec.structs.replace(r, members=r.members[:-8] + r.members[-4:] + r.members[-8:-4])


def invented_member(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return msgspec.structs.replace(r, members=r.members[:-4] + u32(6))


def without_the_victim(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return ShareRequest(
        r.members[:8] + r.members[12:], r.leaves[:64] + r.leaves[96:], r.entries[:-ENTRY_BYTES]
    )


def other_leaf_for_the_victim(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return msgspec.structs.replace(r, leaves=r.leaves[:64] + bytes(32) + r.leaves[96:])


def a_neighbour_missing(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return msgspec.structs.replace(r, entries=r.entries[:-ENTRY_BYTES])


def a_neighbour_more(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return msgspec.structs.replace(r, entries=r.entries + r.entries[-ENTRY_BYTES:])


def cohort_of_two(d: RoundDriver, r: ShareRequest) -> ShareRequest:
    return ShareRequest(r.members[4:12], r.leaves[32:96], r.entries[:ENTRY_BYTES])


@pytest.mark.parametrize(
    ("lie", "check"),
    [
        (own_key_unsigned, "neighbour_signature"),
        (own_key_signed_by_the_server, "neighbour_signature"),
        (own_key_signed_by_a_colluder, "neighbour_signature"),
        (own_key_under_the_old_leaf, "neighbour_leaf"),
        (neighbours_entry_twice, "neighbour_signature"),
        (colluders_with_one_key, "neighbour_keys"),
        (victims_own_keys_from_a_colluder, "neighbour_keys"),
        (small_order_key_from_a_colluder, "neighbour_keys"),
        (member_twice, "cohort_list"),
        (not_sorted, "cohort_list"),
        (invented_member, "cohort_list"),
        (without_the_victim, "own_leaf"),
        (other_leaf_for_the_victim, "own_leaf"),
        (a_neighbour_missing, "degree"),
        (a_neighbour_more, "degree"),
        (cohort_of_two, "cohort_size"),
    ],
)
def test_a_false_cohort(lie: Lie, check: str) -> None:
    """Fault 20."""
    d = at("share")
    request = decode_message(d.aggregator.request(VICTIM), ShareRequest, "the request")
    refuses(d, "share", encode_message(lie(d, request)), check)


def test_a_cohort_above_n_max() -> None:
    federation = make_federation(MASKING, 6, n_max=5)
    d = RoundDriver(make_federation(MASKING, 6), {})
    d.run(until="share")
    # A round of the same header but for n_max has another h0, so the member itself is told of n_max = 5.
    machine = MASKING.member(federation.terms, federation.keys[VICTIM], lambda n: b"r" * n)
    wide = d.aggregator.request(VICTIM)
    machine.answer("advertise", RoundDriver(federation, {}).aggregator.request(VICTIM))
    with pytest.raises(ServerViolation) as violation:
        machine.answer("share", wide)
    assert violation.value.check == "cohort_size"


def test_two_lists_for_two_members() -> None:
    """Fault 21: the roots differ, so what one shares the others' signatures and boxes don't accept."""
    d = RoundDriver(make_federation(MASKING, 7), {})
    adverts = {name: d.answer(name) for name in d.aggregator.participants}
    lists = []
    for missing in ("m0005", "m0006"):
        aggregator = MASKING.aggregator(d.federation.terms)
        for name, advert in adverts.items():
            if name != missing:
                aggregator.accept(name, advert)
        aggregator.close()
        lists.append(aggregator)
    shown_to_all, shown_to_victim = lists
    split = d.machines[VICTIM].answer("share", shown_to_victim.request(VICTIM))
    with pytest.raises(Refused) as refusal:
        shown_to_all.accept(VICTIM, split)
    assert refusal.value.reason is RefusalReason.SIGNATURE
    # A lying server forwards what was shared all the same: the boxes don't open under another h1.
    for name in shown_to_all.participants:
        if name != VICTIM:
            shown_to_all.accept(name, d.machines[name].answer("share", shown_to_all.request(name)))
    shown_to_all.close()
    honest = decode_message(shown_to_all.request("m0000"), UploadRequest, "the request")
    shares = decode_message(split, Shares, "the shares")
    forged = UploadRequest(
        b"\x1f",
        honest.commitments[:64] + shares.commitments[:64] + honest.commitments[64:],
        honest.boxes[:BOX_BYTES] + shares.boxes[:BOX_BYTES] + honest.boxes[BOX_BYTES:],
    )
    complaint = d.machines["m0000"].begin_upload(encode_message(forged))
    assert isinstance(complaint, Complaint)
    assert complaint.accused == VICTIM


# -- upload: boxes ---------------------------------------------------------------------------------------


def boxes(request: UploadRequest) -> list[bytes]:
    return [request.boxes[i : i + BOX_BYTES] for i in range(0, len(request.boxes), BOX_BYTES)]


def damaged_box(d: RoundDriver, r: UploadRequest) -> UploadRequest:
    found = boxes(r)
    found[3] = found[3][:-1] + bytes([found[3][-1] ^ 1])
    return msgspec.structs.replace(r, boxes=b"".join(found))


def another_recipients_box(d: RoundDriver, r: UploadRequest) -> UploadRequest:
    other = boxes(decode_message(d.aggregator.request("m0001"), UploadRequest, "the request"))
    found = boxes(r)
    found[3] = other[3]  # from m0004 too, to m0001
    return msgspec.structs.replace(r, boxes=b"".join(found))


def box_twice(d: RoundDriver, r: UploadRequest) -> UploadRequest:
    found = boxes(r)
    found[3] = found[2]
    return msgspec.structs.replace(r, boxes=b"".join(found))


def another_rounds_box(d: RoundDriver, r: UploadRequest) -> UploadRequest:
    later = RoundDriver(make_federation(MASKING, 6, number=2), {})
    later.run(until="upload")
    found = boxes(r)
    found[3] = boxes(decode_message(later.aggregator.request(VICTIM), UploadRequest, "the request"))[3]
    return msgspec.structs.replace(r, boxes=b"".join(found))


def another_commitment(d: RoundDriver, r: UploadRequest) -> UploadRequest:
    start = 3 * COMMITMENTS_BYTES + 32
    return msgspec.structs.replace(
        r, commitments=r.commitments[:start] + bytes(32) + r.commitments[start + 32 :]
    )


@pytest.mark.parametrize(
    "lie", [damaged_box, another_recipients_box, box_twice, another_rounds_box, another_commitment]
)
def test_a_bad_box_is_complained_about_and_both_are_left_out(
    lie: Callable[[RoundDriver, UploadRequest], UploadRequest],
) -> None:
    """Fault 22."""
    d = at("upload")
    request = encode_message(
        lie(d, decode_message(d.aggregator.request(VICTIM), UploadRequest, "the request"))
    )
    complaint = d.machines[VICTIM].begin_upload(request)
    assert isinstance(complaint, Complaint)
    assert complaint.accused == "m0004"
    # It stays by its complaint, also after a restart, and says nothing else.
    for machine in (d.machines[VICTIM], d.restored(VICTIM)):
        assert machine.begin_upload(request) == complaint
        assert machine.waiting_for is None
        with pytest.raises(Refused):
            machine.seal_upload(bytes(32))
    assert not d.aggregator.check_reply(VICTIM, complaint.reply)
    d.history.append((VICTIM, complaint.reply))
    assert d.aggregator.accept(VICTIM, complaint.reply)
    for aggregator in (d.aggregator, d.replayed()):
        assert aggregator.step is None
        assert aggregator.abort is not None
        assert aggregator.abort.exclude == (VICTIM, "m0004")
        assert set(aggregator.named) == {VICTIM, "m0004"}
    retry = RoundDriver(make_federation(MASKING, 6, number=2), d.inputs, exclude=frozenset({VICTIM, "m0004"}))
    retry.run()
    assert retry.aggregator.survivors == ("m0000", "m0001", "m0003", "m0005")
    assert (retry.opened("m0000") == plain_sum(d.inputs, retry.aggregator.survivors)).all()


def test_a_complaint_about_someone_who_sent_nothing_is_refused() -> None:
    d = at("upload", drop={"share": ["m0004"]})
    h1 = d.aggregator.h1
    for accused in (4, POSITION, 77):
        name = f"m{accused:04d}".encode()
        signature = d.federation.keys[VICTIM].identity.sign("masking complaint", h1, VICTIM.encode(), name)
        with pytest.raises(Refused) as refusal:
            d.aggregator.accept(VICTIM, encode_message(BoxComplaint(accused, signature)))
        assert refusal.value.reason is RefusalReason.OUT_OF_RANGE


def test_too_few_live_neighbours() -> None:
    d = at("upload")
    request = UploadRequest(b"\x07", bytes(3 * COMMITMENTS_BYTES), bytes(3 * BOX_BYTES))
    refuses(d, "upload", encode_message(request), "live_neighbours")


def test_a_second_upload_request() -> None:
    d = at("upload")
    d.machines[VICTIM].begin_upload(d.aggregator.request(VICTIM))
    request = decode_message(d.aggregator.request(VICTIM), UploadRequest, "the request")
    one_fewer = UploadRequest(b"\x0f", request.commitments[:-COMMITMENTS_BYTES], request.boxes[:-BOX_BYTES])
    with pytest.raises(ServerViolation) as violation:
        d.machines[VICTIM].begin_upload(encode_message(one_fewer))
    assert violation.value.check == "second_request"


# -- confirm: the survivor set ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharers", "survivors", "check"),
    [
        (0b111111, 0b111011, "own_survival"),
        (0b111111, 0b000111, "live_neighbours"),
        (0b111111, 0b000101, "survivor_count"),
        (0b011111, 0b111111, "survivors"),
        (0b011111, 0b011111, "sharers"),
        (0b000000, 0b000000, "survivor_count"),
    ],
)
def test_a_false_survivor_set(sharers: int, survivors: int, check: str) -> None:
    """Faults 23 and 24."""
    d = at("confirm")
    refuses(d, "confirm", encode_message(ConfirmRequest(bytes([sharers]), bytes([survivors]))), check)


@pytest.mark.parametrize(
    ("sharers", "survivors"), [(b"\x7f", b"\x3f"), (b"\x3f", b"\xbf"), (b"\x3f\0", b"\x3f")]
)
def test_members_beyond_the_cohort_in_a_bitmap(sharers: bytes, survivors: bytes) -> None:
    d = at("confirm")
    with pytest.raises(Refused):
        d.machines[VICTIM].answer("confirm", encode_message(ConfirmRequest(sharers, survivors)))
    assert d.machines[VICTIM].waiting_for == "confirm"


def test_a_dropped_member_can_not_be_brought_back() -> None:
    d = at("confirm", drop={"share": ["m0005"]})
    refuses(d, "confirm", encode_message(ConfirmRequest(b"\x3f", b"\x3f")), "sharers")


def test_a_second_survivor_set_to_confirm() -> None:
    """Both shares of one member would need two survivor sets; one member confirms one."""
    d = at("confirm")
    request = d.aggregator.request(VICTIM)
    reply = d.machines[VICTIM].answer("confirm", request)
    assert d.machines[VICTIM].answer("confirm", request) == reply
    refuses(d, "confirm", encode_message(ConfirmRequest(b"\x3f", b"\x1f")), "second_request")


# -- reveal ----------------------------------------------------------------------------------------------


def test_two_survivor_sets_for_two_halves() -> None:
    """Fault 23: the others' signatures are over another root, so nobody reveals."""
    d = at("confirm")
    d.machines[VICTIM].answer("confirm", encode_message(ConfirmRequest(b"\x3f", b"\x1f")))
    d.step(absent=[VICTIM])
    request = RevealRequest(b"\x0f", b"".join(d.aggregator._confirmations[i] for i in (0, 1, 3, 4)))  # type: ignore[attr-defined]
    with pytest.raises(ServerViolation) as violation:
        d.machines[VICTIM].answer("reveal", encode_message(request))
    assert violation.value.check == "confirm_signature"


def test_too_few_confirmations() -> None:
    d = at("reveal")
    request = decode_message(d.aggregator.request(VICTIM), RevealRequest, "the request")
    refuses(d, "reveal", encode_message(RevealRequest(b"\x07", request.signatures[:-64])), "confirmations")


def test_a_confirmation_of_a_member_that_did_not_survive() -> None:
    d = at("reveal", drop={"upload": ["m0005"]})
    request = decode_message(d.aggregator.request(VICTIM), RevealRequest, "the request")
    stranger = RevealRequest(b"\x17", request.signatures)
    refuses(d, "reveal", encode_message(stranger), "confirmations")


def test_a_confirmation_of_another_round() -> None:
    d = at("reveal")
    other = RoundDriver(make_federation(MASKING, 6, number=2), d.inputs)
    other.run(until="reveal")
    refuses(d, "reveal", other.aggregator.request(VICTIM), "confirm_signature")


def test_a_second_reveal_request() -> None:
    """Fault 25: the same request gets the stored bytes, another one nothing."""
    d = at("reveal", drop={"upload": ["m0005"]})
    request = d.aggregator.request(VICTIM)
    reply = d.machines[VICTIM].answer("reveal", request)
    assert d.machines[VICTIM].answer("reveal", request) == reply
    assert d.restored(VICTIM).answer("reveal", request) == reply
    message = decode_message(request, RevealRequest, "the request")
    refuses(d, "reveal", encode_message(RevealRequest(b"\x07", message.signatures[:-64])), "second_request")


def test_one_share_of_each_neighbour_is_revealed_and_the_rest_is_forgotten() -> None:
    d = at("reveal", size=8, drop={"share": ["m0000"], "upload": ["m0007"]})
    machine = d.machines[VICTIM]
    received = machine._received  # type: ignore[attr-defined]
    reply = d.answer(VICTIM)
    kept = [received[i : i + 130] for i in range(0, len(received), 130)]
    assert len(kept) == 6
    # m0001, m0003 to m0006 survived: the self seed's share. m0007 was dropped: the mask root's.
    assert all(content[:33] in reply and content[65:98] not in reply for content in kept[:5])
    assert kept[5][65:98] in reply
    assert kept[5][:33] not in reply
    snapshot = machine.snapshot()
    for content in kept:
        assert (content[:33] in snapshot) == (content[:33] in reply)
        assert (content[65:98] in snapshot) == (content[65:98] in reply)


# -- the result ------------------------------------------------------------------------------------------


def test_a_false_result() -> None:
    d = at("upload")
    d.run({"upload": ["m0005"]})
    honest = decode_message(d.aggregator.result(), Result, "the result")
    lies = [
        (msgspec.structs.replace(honest, survivors=b"\x0f"), "result_survivors"),
        (msgspec.structs.replace(honest, survivors=b"\x3f"), "result_survivors"),
        (
            msgspec.structs.replace(honest, signers=b"\x07", signatures=honest.signatures[:-64]),
            "result_signers",
        ),
        (msgspec.structs.replace(honest, sharers=b"\x0f"), "survivors"),
        (msgspec.structs.replace(honest, survivors=b"\x03"), "survivor_count"),
    ]
    for lie, check in lies:
        with pytest.raises(ServerViolation) as violation:
            d.restored("m0001").open_sum(encode_message(lie))
        assert violation.value.check == check
    # A member that was dropped has confirmed nothing, and goes by the signatures.
    with pytest.raises(ServerViolation) as violation:
        d.restored("m0005").open_sum(encode_message(msgspec.structs.replace(honest, survivors=b"\x3f")))
    assert violation.value.check == "result_signature"


# -- who may be there at all -----------------------------------------------------------------------------


def test_an_advertisement_is_the_members_own() -> None:
    federation = make_federation(MASKING, 4)
    d = RoundDriver(federation, {})
    entry = decode_message(d.answer("m0000"), Advertisement, "the reply").entry
    other_round = decode_message(
        RoundDriver(make_federation(MASKING, 4, number=2), {}).answer("m0000"), Advertisement, "the reply"
    ).entry
    for bad in (entry[:96] + bytes(64), other_round, entry[:95] + bytes([entry[95] ^ 1]) + entry[96:]):
        with pytest.raises(Refused) as refusal:
            d.aggregator.accept("m0000", encode_message(Advertisement(bad)))
        assert refusal.value.reason is RefusalReason.SIGNATURE
    d.deliver("m0000", d.answer("m0000"))
    keys = entry[:96]
    copied = keys + federation.keys["m0001"].identity.sign(
        "masking advertise", federation.terms.bound.h0, b"m0001", keys
    )
    with pytest.raises(Refused) as refusal:
        d.aggregator.accept("m0001", encode_message(Advertisement(copied)))
    assert refusal.value.reason is RefusalReason.CONFLICT
    low = bytes(32) + AgreementKey(b"q" * 32).public + bytes(32)
    low += federation.keys["m0001"].identity.sign(
        "masking advertise", federation.terms.bound.h0, b"m0001", low
    )
    with pytest.raises(Refused) as refusal:
        d.aggregator.accept("m0001", encode_message(Advertisement(low)))
    assert refusal.value.reason is RefusalReason.OUT_OF_RANGE


def test_keys_that_are_not_the_rosters_start_no_round() -> None:
    federation = make_federation(MASKING, 4)
    keys = federation.keys["m0000"]
    with pytest.raises(ParameterRefused, match="identity key"):
        MASKING.member(
            federation.terms, MemberKeys("m0000", SigningKey(b"o" * 32), keys.group_key), lambda n: bytes(n)
        )
    other_epoch = federation.with_header(group_key=b"g" * 32)
    with pytest.raises(ParameterRefused, match="group key"):
        MASKING.member(other_epoch.terms, keys, lambda n: bytes(n))


def test_an_advertise_request_of_another_round_is_refused() -> None:
    d = RoundDriver(make_federation(MASKING, 4), {})
    other = RoundDriver(make_federation(MASKING, 4, number=2), {})
    with pytest.raises(Refused) as refusal:
        d.machines[VICTIM].answer("advertise", other.aggregator.request(VICTIM))
    assert refusal.value.reason is RefusalReason.WRONG_ROUND
    assert np.array_equal(d.aggregator.participants, d.federation.members)
