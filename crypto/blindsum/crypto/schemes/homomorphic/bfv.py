"""BFV (Brakerski 2012; Fan and Vercauteren 2012) for sums: exact, several integers a coefficient."""

import numpy as np
from blindsum.crypto.errors import OpeningFailed
from blindsum.crypto.schemes.homomorphic.blake2xb import Words
from blindsum.crypto.schemes.homomorphic.seal_member import SealMember
from blindsum.crypto.schemes.homomorphic.seal_wire import Native


class BfvMember(SealMember):
    """A key holder of bfv. Exact: `max_error` stays 0."""

    def _encode(self, fields: Words) -> Native:
        lanes = fields.reshape(-1, self.parameters.fields_per_unit)
        coefficients = lanes[:, 0].copy()
        for lane in range(1, self.parameters.fields_per_unit):
            coefficients |= lanes[:, lane] << np.uint64(lane * self.parameters.field_bits)
        return self._context.load_plaintext(coefficients)

    def _open(self, ciphertext: Native) -> Words:
        if self._decryptor.invariant_noise_budget(ciphertext) <= 0:
            raise OpeningFailed("the sum has no noise budget left: wrong key, or more was added than n_max")
        plaintext = self._context.api.Plaintext()
        self._decryptor.decrypt(ciphertext, plaintext)
        coefficients = self._context.read_plaintext(plaintext)
        width = self.parameters.field_bits
        mask = np.uint64((1 << width) - 1)
        lanes = np.empty((coefficients.size, self.parameters.fields_per_unit), np.uint64)
        for lane in range(self.parameters.fields_per_unit):
            np.bitwise_and(coefficients >> np.uint64(lane * width), mask, lanes[:, lane])
        return lanes.ravel()
