"""AES-256-CTR streams that can be read at any offset (protocols.md 1.5)."""

import threading

from blindsum.crypto.primitives.derivation import derive_key
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

READ_MAX = 1 << 18
"""Bytes that one read gives at most: what stays in a core's cache."""

READ_ROOM = READ_MAX + 31
"""Bytes of a buffer that any read fits: an unaligned start, and what the cipher wants on top."""

_BLOCK = 16
_ZEROS = bytes(READ_MAX + _BLOCK)


class Keystream:
    """PRG(seed): AES-256-CTR from counter block zero, keyed by HKDF of the seed under a label.

    One stream a key. Reading keeps no position, so that any thread may read any part.
    """

    __slots__ = ("_algorithm", "_mine")

    def __init__(self, seed: bytes, label: str, *context: bytes) -> None:
        self._algorithm = algorithms.AES(derive_key(seed, label, *context))
        self._mine = threading.local()

    def read(self, offset: int, length: int, room: bytearray) -> memoryview:
        """`length` bytes of the stream from byte `offset` on, written to `room` (`READ_ROOM` bytes).

        A caller that keeps `room` saves the page faults that would otherwise cost more than AES.
        """
        block, skip = divmod(offset, _BLOCK)
        start = block.to_bytes(_BLOCK, "big")
        encryptor: CipherContext | None = getattr(self._mine, "encryptor", None)
        if encryptor is None:
            encryptor = self._mine.encryptor = Cipher(self._algorithm, modes.CTR(start)).encryptor()
        else:
            encryptor.reset_nonce(start)
        encryptor.update_into(memoryview(_ZEROS)[: skip + length], room)
        return memoryview(room)[skip : skip + length]

    def __repr__(self) -> str:
        return "<Keystream>"
