"""Sealing: what was sealed opens, and nothing else does."""

import copy
import pickle

import pytest
from blindsum.crypto.errors import OpeningFailed, Refused
from blindsum.crypto.primitives.sealing import (
    HPKE_PUBLIC_BYTES,
    STREAM_CHUNK,
    HpkeKey,
    open_sealed,
    open_stream,
    seal,
    seal_stream,
    seal_to,
    sealed_stream_bytes,
)

KEY = bytes(range(32))


class TestHpke:
    key = HpkeKey(bytes(range(96)))

    def test_a_message_opens_with_its_key_and_info_only(self):
        sealed = seal_to(self.key.public, b"secret", b"info")
        assert self.key.open(sealed, b"info") == b"secret"
        assert sealed != seal_to(self.key.public, b"secret", b"info")
        for key, data, info in (
            (HpkeKey.generate(), sealed, b"info"),
            (self.key, sealed, b"other"),
            (self.key, sealed[:-1], b"info"),
            (self.key, sealed + b"\0", b"info"),
            (self.key, bytes([sealed[0] ^ 1]) + sealed[1:], b"info"),
            (self.key, b"", b"info"),
        ):
            with pytest.raises(OpeningFailed):
                key.open(data, info)

    def test_the_key_comes_back_from_its_bytes(self):
        again = HpkeKey(self.key.secret_bytes())
        assert again.public == self.key.public
        assert len(again.public) == HPKE_PUBLIC_BYTES

    def test_public_keys_of_a_wrong_form(self):
        for public in (b"", self.key.public[:-1], b"\xff" * HPKE_PUBLIC_BYTES, bytes(HPKE_PUBLIC_BYTES)):
            with pytest.raises(Refused):
                seal_to(public, b"secret", b"info")

    def test_it_neither_prints_nor_pickles(self):
        assert self.key.secret_bytes().hex() not in repr(self.key)
        for attempt in (pickle.dumps, copy.copy):
            with pytest.raises(TypeError):
                attempt(self.key)


class TestSeal:
    def test_it_opens_under_the_same_key_and_associated_data_only(self):
        sealed = seal(KEY, b"secret", b"round 1")
        assert open_sealed(KEY, sealed, b"round 1") == b"secret"
        flipped = bytearray(sealed)
        flipped[15] ^= 1
        for key, data, associated in (
            (bytes(32), sealed, b"round 1"),
            (KEY, sealed, b"round 2"),
            (KEY, bytes(flipped), b"round 1"),
            (KEY, sealed[:27], b"round 1"),
            (KEY, b"", b"round 1"),
        ):
            with pytest.raises(OpeningFailed):
                open_sealed(key, data, associated)

    def test_a_nonce_is_drawn_for_each_message(self):
        assert seal(KEY, b"secret", b"") != seal(KEY, b"secret", b"")


class TestStream:
    @pytest.mark.parametrize(
        "size", [0, 1, STREAM_CHUNK - 1, STREAM_CHUNK, STREAM_CHUNK + 1, 2 * STREAM_CHUNK]
    )
    @pytest.mark.parametrize("cut", [1000, STREAM_CHUNK + 16, 10 * STREAM_CHUNK])
    def test_any_length_cut_anywhere(self, size, cut):
        message = bytes(range(256)) * (size // 256) + bytes(size % 256)
        sealed = b"".join(seal_stream(KEY, [message[:7], message[7:]], b"aad"))
        assert len(sealed) == sealed_stream_bytes(size)
        pieces = [sealed[start : start + cut] for start in range(0, len(sealed), cut)]
        assert b"".join(open_stream(KEY, pieces, b"aad")) == message

    def test_chunks_cannot_be_cut_off_dropped_swapped_repeated_or_changed(self):
        size = STREAM_CHUNK + 16
        sealed = b"".join(seal_stream(KEY, [bytes(2 * STREAM_CHUNK + 5)], b"aad"))
        salt, one, two, last = (
            sealed[:32],
            sealed[32 : 32 + size],
            sealed[32 + size : 32 + 2 * size],
            sealed[-21:],
        )
        for pieces in (
            [],
            [salt],
            [salt[:31]],
            [salt, one],
            [salt, one, two],
            [salt, two, one, last],
            [salt, one, last],
            [salt, one, one, two, last],
            [salt, one, two, last, b"\0"],
            [salt, one, two, last[:-1]],
            [bytes(32), one, two, last],
            [salt, bytes([one[0] ^ 1]), one[1:], two, last],
        ):
            with pytest.raises(OpeningFailed):
                list(open_stream(KEY, pieces, b"aad"))
        for key, associated in ((bytes(32), b"aad"), (KEY, b"other")):
            with pytest.raises(OpeningFailed):
                list(open_stream(key, [sealed], associated))
