"""A member's side: its own key, features encrypted under it, answers that only it can open."""

from typing import NoReturn

import numpy as np
from blindsum.crypto.errors import OpeningFailed
from blindsum.crypto.inference.circuit import Floats, lay_out_feature
from blindsum.crypto.inference.tail_model import TailCard
from blindsum.crypto.inference.tail_wire import (
    key_tag_of,
    keys_digest,
    pack_feature,
    pack_keys,
    unpack_answer,
)
from blindsum.crypto.primitives.derivation import Random, system_random
from blindsum.crypto.schemes.homomorphic.seal_keys import load_secret_key, sample_ternary
from blindsum.crypto.schemes.homomorphic.seal_wire import Native, SealContext


class TailKeyHolder:
    """A fresh CKKS key (Cheon, Kim, Kim and Song, 2017) of one member, for one card.

    The secret is drawn from `random`; seeds and errors are drawn by SEAL from the system, afresh for each
    ciphertext. The key lives in this object alone and is never stored. Raises `MissingExtra` without the
    extra `he`, `UnsupportedPlatform` where SEAL's binding can't be used.
    """

    def __init__(self, card: TailCard, random: Random = system_random) -> None:
        self.card = card
        circuit = self._circuit = card.parameters
        context = self._context = SealContext.create(circuit.ring, "ckks", 0)
        secret = load_secret_key(context, sample_ternary(circuit.ring.degree, random))
        api, native = context.api, context.native
        self._encoder: Native = api.CKKSEncoder(native)
        self._encryptor: Native = api.Encryptor(native, secret)
        self._decryptor: Native = api.Decryptor(native, secret)
        self.evaluation_keys = self._make_keys(api.KeyGenerator(native, secret))
        self.digest = keys_digest(self.evaluation_keys)
        self._tag = key_tag_of(self.digest)

    def __repr__(self) -> str:
        return f"<TailKeyHolder {self.digest.hex()[:16]}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a member's key for encrypted inference is never pickled")

    def _make_keys(self, generator: Native) -> bytes:
        circuit, context = self._circuit, self._context
        made = []
        for used in circuit.keys:
            if used.step:
                keys = generator.create_galois_keys([circuit.galois_element(used.step)])
            else:
                keys = generator.create_relin_keys()
            made += context.read_switching_keys(keys)
        return pack_keys(circuit, made)

    def encrypt(self, feature: Floats) -> bytes:
        """The frame of one feature (inputs,), standardised by the card. Raises `ParameterRefused`."""
        circuit = self._circuit
        plaintext = self._context.api.Plaintext()
        slots = lay_out_feature(circuit, self.card.standardise(feature[None])[0])
        self._encoder.encode(slots.tolist(), 2.0**circuit.scale_bits, plaintext)
        seed, residues = self._context.read_seeded(self._encryptor.encrypt_symmetric(plaintext))
        return pack_feature(circuit, self._tag, seed, residues)

    def decrypt(self, frame: bytes) -> float:
        """The logit of an encrypted answer. It stays with the member: nothing derived from it goes back.

        Raises `Refused` for a malformed frame, `OpeningFailed` for a logit that no honest evaluation gives.
        """
        circuit = self._circuit
        residues = unpack_answer(circuit, self._tag, frame)
        try:
            ciphertext = self._context.load_reduced(list(residues), scale=2.0**circuit.answer_scale_bits)
            plaintext = self._context.api.Plaintext()
            self._decryptor.decrypt(ciphertext, plaintext)
            slots = np.array(self._encoder.decode_complex(plaintext), np.complex128)
        except (RuntimeError, ValueError) as error:
            raise OpeningFailed("SEAL could not decrypt the answer") from error
        answer = float(slots[0].real)
        # What hides the other slots has a bound as well, which noise and other ciphertexts exceed.
        largest = float(np.abs(slots.view(np.float64)).max())
        bound = 2.0**circuit.answer_bits
        if not (abs(answer) <= 1.01 * bound and largest <= 1.01 * (bound + 2.0**circuit.mask_bits)):
            raise OpeningFailed("the answer holds numbers larger than an honest evaluation makes")
        return answer / self.card.answer_scale
