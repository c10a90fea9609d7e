"""X25519 agreement and one-time boxes: what must be refused (fault 14) and what must not show (50)."""

import pickle

import pytest
from blindsum.crypto.primitives.key_agreement import AgreementKey, is_small_order
from blindsum.crypto.primitives.one_time_box import OVERHEAD, open_box, seal_once

P = 2**255 - 19
ORDER_8 = 325606250916557431795983626356110631294008115727848805560023387167927233504
# All encodings of points of small order, the non-canonical ones too (RFC 7748, section 6.1).
SMALL_ORDER = [0, 1, ORDER_8, P - 1, P, P + 1] + [2**255 + value for value in (0, 1, P - 1, P, P + 1)]


def test_both_sides_agree_and_a_third_does_not() -> None:
    one, other, third = (AgreementKey(bytes([i]) * 32) for i in (1, 2, 3))
    assert one.exchange(other.public) == other.exchange(one.public) != third.exchange(one.public)


@pytest.mark.parametrize("value", SMALL_ORDER)
def test_small_order_keys_are_found_and_refused(value: int) -> None:
    public = value.to_bytes(32, "little")
    assert is_small_order(public)
    with pytest.raises(ValueError, match=r".*"):
        AgreementKey(b"\x07" * 32).exchange(public)


def test_ordinary_keys_are_not_of_small_order() -> None:
    assert not any(is_small_order(AgreementKey(bytes([i]) * 32).public) for i in range(20))


@pytest.mark.parametrize("length", [0, 31, 33])
def test_keys_of_another_length_are_refused(length: int) -> None:
    assert is_small_order(bytes(length))
    with pytest.raises(ValueError, match=r".*"):
        AgreementKey(b"\x07" * 32).exchange(bytes(length))


def test_agreement_keys_do_not_show() -> None:
    key = AgreementKey(b"\x07" * 32)
    assert (b"\x07" * 4).hex() not in repr(key)
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_a_box_opens_under_its_key_only() -> None:
    box = seal_once(b"k" * 32, b"content")
    assert len(box) == len(b"content") + OVERHEAD
    assert open_box(b"k" * 32, box) == b"content"
    assert open_box(b"j" * 32, box) is None


@pytest.mark.parametrize("at", range(0, 23, 3))
def test_a_changed_box_does_not_open(at: int) -> None:
    box = bytearray(seal_once(b"k" * 32, b"content"))
    box[at] ^= 1
    assert open_box(b"k" * 32, bytes(box)) is None
    assert open_box(b"k" * 32, bytes(box)[:at]) is None
