"""CKKS (Cheon, Kim, Kim and Song, 2017) for sums: two integers a complex slot, rounded on opening.

What leaves a key holder is the rounded integer, so it carries no decryption noise (Li and Micciancio,
EUROCRYPT 2021), and all members get equal results.
"""

import numpy as np
from blindsum.crypto.errors import OpeningFailed
from blindsum.crypto.schemes.homomorphic.blake2xb import Words
from blindsum.crypto.schemes.homomorphic.cipher import CipherParameters
from blindsum.crypto.schemes.homomorphic.seal_member import SealMember
from blindsum.crypto.schemes.homomorphic.seal_wire import Native


class CkksMember(SealMember):
    """A key holder of ckks."""

    transformed = True

    def __init__(self, parameters: CipherParameters, public: bytes, secret: bytes) -> None:
        super().__init__(parameters, public, secret)
        self._encoder: Native = self._context.api.CKKSEncoder(self._context.native)
        self._scale = 2.0**parameters.scale_bits

    def _encode(self, fields: Words) -> Native:
        plaintext = self._context.api.Plaintext()
        slots = fields.astype(np.float64).view(np.complex128)
        self._encoder.encode(slots.tolist(), self._scale, plaintext)
        return plaintext

    def _open(self, ciphertext: Native) -> Words:
        plaintext = self._context.api.Plaintext()
        self._decryptor.decrypt(ciphertext, plaintext)
        slots = np.array(self._encoder.decode_complex(plaintext), np.complex128).view(np.float64)
        whole = np.rint(slots)
        error = float(np.abs(slots - whole).max())
        if not error <= self.parameters.noise_limit:
            raise OpeningFailed("the sum lies farther than 1/4 from integers: wrong key, or a damaged sum")
        if float(whole.min()) < 0:
            raise OpeningFailed("the opened sum has a negative field: wrong key, or a damaged sum")
        self.max_error = max(self.max_error, error)
        return whole.astype(np.uint64)
