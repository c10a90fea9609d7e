"""What the aggregator holds: masked lanes that say nothing (faults 29, 30, 37)."""

import numpy as np
import pytest
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.errors import RefusalReason, Refused
from blindsum.crypto.primitives.mask_expansion import MaskSet
from blindsum.crypto.schemes.base import Complaint, frame_digest, upload_digest
from blindsum.crypto.schemes.masking import scheme
from blindsum.crypto.schemes.masking.frames import group_mask_key
from blindsum.crypto.schemes.masking.member import mask_pair, pair_mask_key, self_mask_key
from federation_driver import RoundDriver, make_federation, plain_sum, powers_of_two
from numpy.typing import NDArray

MASKING = scheme("masking")
FIELDS = 6000


def at_upload(number: int = 1, value: int = 1234, size: int = 4, seed: str = "round") -> RoundDriver:
    federation = make_federation(MASKING, size, fields=FIELDS, number=number)
    inputs = {name: np.full(FIELDS, value, dtype=np.uint32) for name in federation.members}
    d = RoundDriver(federation, inputs, seed=seed)
    d.run(until="upload")
    return d


def lanes_of(d: RoundDriver, name: str) -> NDArray[np.uint64]:
    d.answer(name)
    return np.frombuffer(b"".join(d.uploads[name]), dtype="<u8")


def looks_random(lanes: NDArray[np.uint64]) -> bool:
    """Every bit of the lanes is set in about half of them (within 6 standard deviations)."""
    bits = np.unpackbits(np.frombuffer(lanes.tobytes(), dtype=np.uint8)).reshape(len(lanes), 64)
    return bool((abs(bits.mean(axis=0) - 0.5) < 3 / np.sqrt(len(lanes))).all())


def test_uploads_look_random_and_the_unmasked_lanes_do_not() -> None:
    d = at_upload()
    packed = LaneLayout.for_cohort(16, 16).pack(np.full(FIELDS, 1234, dtype=np.uint32))
    assert not looks_random(packed)
    uploads = [lanes_of(d, name) for name in d.federation.members]
    assert all(looks_random(upload) for upload in uploads)
    assert all(looks_random(one - other) for one in uploads for other in uploads if one is not other)


@pytest.mark.parametrize("seed", ["round", "fresh secrets"])
def test_two_rounds_with_equal_inputs_share_no_mask(seed: str) -> None:
    """Fault 30: even with a member's randomness repeated, another header is another mask."""
    one, other = at_upload(1), at_upload(2, seed=seed)
    difference = lanes_of(one, "m0001") - lanes_of(other, "m0001")
    assert difference.all()
    assert looks_random(difference)


def test_without_its_pairwise_masks_a_late_upload_still_hides() -> None:
    """Fault 29: the server has a dropped member's mask root, its late upload, and even the group key."""
    d = at_upload()
    position, name = 2, "m0002"
    upload = lanes_of(d, name)
    machine = d.machines[name]
    root, seed = machine._secrets[:32], machine._secrets[32:]  # type: ignore[attr-defined]
    cohort = machine._cohort  # type: ignore[attr-defined]
    h0, h1 = d.federation.terms.bound.h0, cohort.h1
    pair = mask_pair(root, h0)
    entries = d.aggregator._by_position  # type: ignore[attr-defined]
    added = [group_mask_key(d.federation.keys[name].group_key, h1)]
    subtracted: list[bytes] = []
    for other in range(cohort.n):
        if other != position:
            low, high = min(position, other), max(position, other)
            key = pair_mask_key(pair, entries[other][32:64], h1, low, high)
            (added if position < other else subtracted).append(key)
    left = upload.copy()
    MaskSet(subtracted, added).apply(left)
    packed = LaneLayout.for_cohort(16, 16).pack(np.full(FIELDS, 1234, dtype=np.uint32))
    assert looks_random(left)
    assert (left != packed).all()
    # The control: only the self mask was between them.
    MaskSet([], [self_mask_key(seed, h1)]).apply(left)
    assert (left == packed).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_no_known_bit_of_the_sealed_sum_depends_on_the_inputs(size: int) -> None:
    """Fault 37: |U3| * K has log2 |U3| zero bits at the bottom; the inputs keep clear of them."""
    known = np.uint64(size - 1)
    for value in (0, 1, 65535):
        d = at_upload(value=value, size=size)
        d.run()
        sealed = np.frombuffer(b"".join(d.published()), dtype="<u8")
        assert not (sealed & known).any()
        assert looks_random(
            sealed >> np.uint64(size.bit_length() - 1) << np.uint64(size.bit_length() - 1)
            | (
                np.arange(len(sealed), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
                & known
            )
        )
        assert d.opened("m0000").tolist() == [size * value] * FIELDS


def test_a_frame_is_masked_once() -> None:
    d = at_upload()
    request = d.aggregator.request("m0000")
    protector = d.machines["m0000"].begin_upload(request)
    assert not isinstance(protector, Complaint)
    assert d.machines["m0000"].begin_upload(request) is protector
    with pytest.raises(Refused, match="frames"):
        d.machines["m0000"].seal_upload(bytes(32))
    frame = protector.protect(0, d.inputs["m0000"])
    with pytest.raises(Refused) as refusal:
        protector.protect(0, d.inputs["m0000"])
    assert refusal.value.reason is RefusalReason.CONFLICT

    # After a restart there is no second protector, but what was stored can be sealed.
    restarted = d.restored("m0000")
    with pytest.raises(Refused) as refusal:
        restarted.begin_upload(request)
    assert refusal.value.reason is RefusalReason.CONFLICT
    reply = restarted.seal_upload(upload_digest(protector.h1, [frame_digest(frame)]))
    d.machines["m0000"] = restarted
    d.uploads["m0000"] = [frame]
    d.deliver("m0000", reply)
    d.step(absent=["m0000"])


def test_one_seed_gives_equal_sums_and_fresh_secrets_other_uploads() -> None:
    federation = make_federation(MASKING, 4)
    rounds = [RoundDriver(federation, powers_of_two(federation), seed=seed) for seed in ("a", "a", "b")]
    for d in rounds:
        d.run()
        assert (d.opened("m0001") == plain_sum(d.inputs, federation.members)).all()
    same, again, fresh = (d.uploads for d in rounds)
    assert same == again
    assert all(same[name] != fresh[name] for name in federation.members)


def test_a_member_set_back_to_an_old_snapshot_deals_the_same_shares() -> None:
    d = RoundDriver(make_federation(MASKING, 4), {})
    d.run(until="share")
    twin = d.restored("m0000")
    request = d.aggregator.request("m0000")
    assert twin.answer("share", request) == d.machines["m0000"].answer("share", request)
