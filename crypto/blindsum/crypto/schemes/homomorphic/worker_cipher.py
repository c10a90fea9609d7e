"""A key holder's bfv, ckks or paillier in worker processes, and how a frame is cut into their pieces.

Encryption holds the interpreter lock, so more cores mean more processes; and what an aggregator published
reaches native code in a process that may die. A cipher holds secrets and is never pickled: the member's
process makes a spec, a byte string, and writes it through a pipe to each worker, which builds its own
cipher from it. Then fields go one way and ciphertexts the other, as raw bytes. A spec holds the secret key:
it belongs in no file, argument list or environment. It says nothing of a round, so a worker keeps its
cipher (and paillier's table of powers) from one round to the next.

A paillier frame is seconds of work, so it is cut into pieces of whole ciphertexts, which are frames of a
set that differs in the number of ciphertexts only. A bfv or ckks frame takes milliseconds and is one piece.

What a piece may be, and that each frame is made once, is for whoever hands it out (rounds.py).
"""

from typing import Annotated, Literal, NoReturn, Self

import msgspec
import numpy as np
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.errors import OpeningFailed, Refused
from blindsum.crypto.schemes.base import Fields, SummedFields
from blindsum.crypto.schemes.homomorphic.cipher import (
    KEY_TAG_BYTES,
    CipherParameters,
    MemberCipher,
    member_cipher,
    restore_parameters,
)

SPEC_VERSION: Literal[1] = 1

PIECE_CIPHERTEXTS = 16
"""Paillier ciphertexts in a piece, about: tens of milliseconds to make, 0.2 s to open at 3072 bits."""

Positive = Annotated[int, msgspec.Meta(ge=1)]


class _Spec(Message, frozen=True):
    version: Literal[1]
    parameters: str
    key_bits: Positive
    key_n_max: Positive
    security: Positive
    public: bytes
    secret: bytes


class WorkerCipher:
    """A key holder's cipher for pieces of frames, from a spec.

    Raises `Refused` for malformed bytes or keys that don't belong together, `ParameterRefused` for an
    unknown set, `MissingExtra`.
    """

    def __init__(self, spec: bytes) -> None:
        held = decode_message(spec, _Spec, "a worker's spec")
        self.parameters = restore_parameters(
            held.parameters, held.key_bits, held.key_n_max, minimum_security=held.security
        )
        self._cipher = member_cipher(self.parameters, held.public, held.secret)

    def warm_up(self) -> Self:
        """Make what the first piece would wait for (paillier's table, a second or two), and return self."""
        self._cipher.encrypt(np.zeros(0, np.uint32))
        return self

    def encrypt(self, fields: Fields) -> bytes:
        """One piece, freshly encrypted: never the same bytes twice. Raises `EncodingError`."""
        return self._cipher.encrypt(fields)

    def decrypt(self, piece: bytes, count: int, contributions: int) -> tuple[SummedFields, float]:
        """The first `count` summed fields of a piece, and the largest rounding error. `OpeningFailed`."""
        self._cipher.max_error = 0.0
        return opened(self._cipher, piece, count, contributions), self._cipher.max_error

    def __repr__(self) -> str:
        return f"<WorkerCipher of {self.parameters.name}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cipher holds a secret key and is never pickled; send its spec")


class PieceWork:
    """How frames of a set are cut into pieces for workers, and put together again. Holds a secret key."""

    def __init__(self, parameters: CipherParameters, public: bytes, secret: bytes) -> None:
        self._whole = parameters
        self._piece = piece_parameters(parameters)
        self.spec = encode_message(
            _Spec(
                SPEC_VERSION,
                self._piece.name,
                parameters.bits,
                parameters.n_max,
                parameters.security_bits,
                public,
                secret,
            )
        )
        """What `WorkerCipher` takes. It holds the secret key: through a pipe, and nowhere else."""

    @property
    def pieces(self) -> int:
        """Pieces of a frame."""
        return -(-self._whole.ciphertexts_per_frame // self._piece.ciphertexts_per_frame)

    def cut_fields(self, fields: Fields) -> list[Fields]:
        """The fields of each piece of a frame. The last pieces of a short frame are empty."""
        each = self._piece.fields_per_frame
        return [fields[i * each : (i + 1) * each] for i in range(self.pieces)]

    def join_upload(self, pieces: list[bytes]) -> bytes:
        """A frame from its encrypted pieces. What the last piece has too much is left out."""
        if self.pieces == 1:
            return pieces[0]
        frame = pieces[0] + b"".join(piece[KEY_TAG_BYTES:] for piece in pieces[1:])
        return frame[: self._whole.upload_frame_bytes]

    def cut_sum(self, frame: bytes | memoryview, count: int) -> list[tuple[bytes, int]]:
        """The pieces of a frame of the sum, and how many of its `count` fields are in each."""
        if self.pieces == 1:
            return [(bytes(frame), count)]
        each = self._piece.fields_per_frame
        length = self._piece.result_frame_bytes - KEY_TAG_BYTES
        tag, body = bytes(frame[:KEY_TAG_BYTES]), bytes(frame[KEY_TAG_BYTES:])
        one = (1).to_bytes(self._piece.modulus_bits // 4, "big")
        body += one * ((self.pieces * length - len(body)) // len(one))
        return [
            (tag + body[i * length : (i + 1) * length], min(max(count - i * each, 0), each))
            for i in range(self.pieces)
        ]

    def __repr__(self) -> str:
        return f"<PieceWork of {self._whole.name}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("piece work holds a secret key and is never pickled; send its spec")


def piece_parameters(parameters: CipherParameters) -> CipherParameters:
    """The set of a piece: the frame's own, with fewer ciphertexts in paillier."""
    count = parameters.ciphertexts_per_frame
    if parameters.scheme != "paillier" or count <= PIECE_CIPHERTEXTS:
        return parameters
    each = -(-count // -(-count // PIECE_CIPHERTEXTS))
    name = parameters.name.replace(f"-k{count}/", f"-k{each}/")
    return restore_parameters(
        name, parameters.bits, parameters.n_max, minimum_security=parameters.security_bits
    )


def opened(cipher: MemberCipher, frame: bytes | memoryview, count: int, contributions: int) -> SummedFields:
    """`MemberCipher.decrypt` where a malformed frame is an `OpeningFailed` too."""
    try:
        return cipher.decrypt(frame, count, contributions)
    except Refused as refusal:
        raise OpeningFailed(f"the sum doesn't open: {refusal.text}; nothing was output") from None
