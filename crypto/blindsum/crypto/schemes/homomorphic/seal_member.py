"""What a bfv and a ckks key holder have in common: keys, frames, and secrets that stay put."""

from abc import ABC, abstractmethod
from typing import NoReturn

import numpy as np
from blindsum.crypto.errors import OpeningFailed
from blindsum.crypto.schemes.homomorphic.blake2xb import Words
from blindsum.crypto.schemes.homomorphic.cipher import (
    CipherParameters,
    Fields,
    check_fields,
    check_opening,
)
from blindsum.crypto.schemes.homomorphic.lattice import pack_polynomials, parse_public, parse_result
from blindsum.crypto.schemes.homomorphic.seal_keys import load_secret_key, parse_secret
from blindsum.crypto.schemes.homomorphic.seal_wire import Native, SealContext


class SealMember(ABC):
    """A key holder over SEAL. Seeds and errors are drawn by SEAL from the system, afresh each time."""

    transformed = False

    def __init__(self, parameters: CipherParameters, public: bytes, secret: bytes) -> None:
        assert parameters.ring is not None
        self.parameters = parameters
        self.max_error = 0.0
        parsed = parse_public(parameters, public)
        self._tag = parsed.tag
        ternary = parse_secret(parameters.ring, parsed, secret)
        self._context = SealContext.create(parameters.ring, parameters.scheme, parameters.plain_bits)
        api, native = self._context.api, self._context.native
        key = load_secret_key(self._context, ternary)
        self._decryptor: Native = api.Decryptor(native, key)
        if parsed.polynomials is None:
            self._encryptor: Native = api.Encryptor(native, key)
        else:
            parts = [[residues[i] for residues in parsed.polynomials] for i in (0, 1)]
            self._encryptor = api.Encryptor(native, self._context.load_public_key(parts))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.parameters.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key holder's cipher is never pickled; build it from its key in the process")

    def encrypt(self, fields: Fields) -> bytes:
        """See `MemberCipher.encrypt`."""
        parameters = self.parameters
        blocks = check_fields(parameters, fields).reshape(parameters.ciphertexts_per_frame, -1)
        plaintexts = map(self._encode, blocks)
        if parameters.upload_form == "seeded":
            return self._encrypt_seeded(plaintexts)
        return self._encrypt_public(plaintexts)

    def _encrypt_seeded(self, plaintexts: "map[Native]") -> bytes:
        read = self._context.read_seeded
        made = [read(self._encryptor.encrypt_symmetric(plaintext)) for plaintext in plaintexts]
        return self._tag + b"".join(seed for seed, _ in made) + self._pack([residues for _, residues in made])

    def _encrypt_public(self, plaintexts: "map[Native]") -> bytes:
        made = []
        for plaintext in plaintexts:
            ciphertext = self._context.api.Ciphertext()
            self._encryptor.encrypt(plaintext, ciphertext)
            made.append(self._context.read_ciphertext(ciphertext))
        return self._tag + self._pack([c[0] for c in made]) + self._pack([c[1] for c in made])

    def _pack(self, polynomials: list[list[Words]]) -> bytes:
        by_prime = [np.stack(residues) for residues in zip(*polynomials, strict=True)]
        return pack_polynomials(by_prime, self._context.ring.data)

    def decrypt(self, frame: bytes | memoryview, count: int, contributions: int) -> Words:
        """See `MemberCipher.decrypt`."""
        check_opening(self.parameters, count, contributions)
        first, second = parse_result(self.parameters, self._tag, frame)
        opened = []
        for i in range(self.parameters.ciphertexts_per_frame):
            parts = [[r[i] for r in first], [r[i] for r in second]]
            try:
                ciphertext = self._context.load_ciphertext(
                    parts, transformed=self.transformed, scale=2.0**self.parameters.scale_bits
                )
                opened.append(self._open(ciphertext))
            except (RuntimeError, ValueError) as error:
                raise OpeningFailed("SEAL could not decrypt the sum") from error
        fields = np.concatenate(opened)[:count]
        if count and int(fields.max()) > contributions * self.parameters.largest_value:
            raise OpeningFailed("the opened sum has a field above what the contributions can add up to")
        return fields

    @abstractmethod
    def _encode(self, fields: Words) -> Native:
        """A SEAL plaintext of one ciphertext's fields."""

    @abstractmethod
    def _open(self, ciphertext: Native) -> Words:
        """One ciphertext's summed fields. Raises `OpeningFailed`."""
