"""Mask streams against AES-256-CTR used the plain way, and faults 30 and 31 for seeds."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from blindsum.crypto.primitives import mask_expansion
from blindsum.crypto.primitives.mask_expansion import CHUNK_LANES, MaskSet, mask_key, subtract_multiple
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEYS = [bytes([i]) * 32 for i in range(1, 6)]


def stream(key: bytes, lanes: int) -> NDArray[np.uint64]:
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * lanes)), dtype="<u8")


def test_the_first_lanes_are_those_of_sp_800_38a_block_encryption() -> None:
    lanes = np.zeros(2, dtype=np.uint64)
    MaskSet([KEYS[0]]).apply(lanes)
    block = Cipher(algorithms.AES(KEYS[0]), modes.ECB()).encryptor().update(bytes(16))
    assert lanes.tobytes() == block


@pytest.mark.parametrize(
    "count", [1, 2, 3, CHUNK_LANES - 1, CHUNK_LANES, CHUNK_LANES + 1, 3 * CHUNK_LANES + 7]
)
def test_the_signed_sum_of_streams(count: int) -> None:
    start = np.arange(count, dtype=np.uint64)
    lanes = start.copy()
    MaskSet(KEYS[:3], KEYS[3:]).apply(lanes)
    expected = start.copy()
    for key in KEYS[:3]:
        expected += stream(key, count)
    for key in KEYS[3:]:
        expected -= stream(key, count)
    assert (lanes == expected).all()


def test_ranges_are_independent_and_run_on_any_thread() -> None:
    total = np.zeros(10 * 1000, dtype=np.uint64)
    masks = MaskSet(KEYS[:2], KEYS[2:])
    masks.apply(total)
    pieces = np.zeros_like(total)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda at: masks.apply(pieces[at : at + 1000], at), reversed(range(0, 10_000, 1000))))
    assert (pieces == total).all()


def test_keys_beyond_the_kept_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = np.zeros(100, dtype=np.uint64)
    MaskSet(KEYS[:3], KEYS[3:]).apply(expected)
    monkeypatch.setattr(mask_expansion, "_CONTEXTS_KEPT", 2)
    masks = MaskSet(KEYS[:3], KEYS[3:])
    for _ in range(2):
        lanes = np.zeros(100, dtype=np.uint64)
        masks.apply(lanes)
        assert (lanes == expected).all()


def test_subtract_multiple_wraps_at_2_to_the_64() -> None:
    lanes = np.full(CHUNK_LANES + 5, 7, dtype=np.uint64)
    subtract_multiple(KEYS[0], 13, lanes[2:], 2)
    with np.errstate(over="ignore"):
        expected = np.uint64(7) - np.uint64(13) * stream(KEYS[0], CHUNK_LANES + 5)
    assert (lanes[2:] == expected[2:]).all()


def test_a_range_that_starts_inside_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="whole AES block"):
        MaskSet(KEYS).apply(np.zeros(4, dtype=np.uint64), 1)


def test_seeds_with_equal_folds_and_other_rounds_give_other_masks() -> None:
    # Fault 31: a fold of the seed by XOR would make these two the same.
    one, other = bytes([1, 2]) + bytes(30), bytes([2, 1]) + bytes(30)
    swapped = bytes(16) + bytes(range(16)), bytes(range(16)) + bytes(16)
    keys = {mask_key(seed, "masking pair", bytes(32)) for seed in (one, other, *swapped)}
    keys.add(mask_key(one, "masking self", bytes(32)))
    keys.add(mask_key(one, "masking pair", b"\x01" * 32))
    assert len(keys) == 6
    assert one not in keys
    with pytest.raises(ValueError, match="32 bytes"):
        mask_key(bytes(31), "masking pair", bytes(32))


def test_masks_forget_and_do_not_show() -> None:
    masks = MaskSet([b"k" * 32])
    assert "kk" not in repr(masks)
    with pytest.raises(TypeError):
        pickle.dumps(masks)
    masks.forget()
    lanes = np.zeros(2, dtype=np.uint64)
    masks.apply(lanes)
    assert not lanes.any()
