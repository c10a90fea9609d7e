"""A member's bulk step of bfv, ckks and paillier in a worker process.

Encryption holds the interpreter lock, so more cores mean more processes. A cipher holds secrets and is
never pickled: the member's process makes a spec, a byte string, and writes it through a pipe to each
worker, which builds its own protector from it. Then fields go one way and frames the other, as raw
bytes. A spec holds the secret key: it belongs in no file, argument list or environment.

Frames are independent, and every worker draws its own randomness from the system. Whoever hands out
frames hands out each of them once.
"""

from typing import Annotated, Literal, NoReturn, Self

import msgspec
import numpy as np
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.errors import EncodingError
from blindsum.crypto.schemes.base import BulkLayout, Fields
from blindsum.crypto.schemes.homomorphic.cipher import CipherParameters, member_cipher, restore_parameters
from blindsum.crypto.trust.documents import Digest

SPEC_VERSION: Literal[1] = 1

Positive = Annotated[int, msgspec.Meta(ge=1)]


class _Spec(Message, frozen=True):
    version: Literal[1]
    parameters: str
    key_bits: Positive
    key_n_max: Positive
    security: Positive
    bits: Positive
    fields: Positive
    h1: Digest
    public: bytes
    secret: bytes


def protector_spec(
    parameters: CipherParameters, public: bytes, secret: bytes, *, fields: int, bits: int, h1: bytes
) -> bytes:
    """What `WorkerProtector` takes: the key and its set, and the round's fields, bits and h1."""
    return encode_message(
        _Spec(
            SPEC_VERSION,
            parameters.name,
            parameters.bits,
            parameters.n_max,
            parameters.security_bits,
            bits,
            fields,
            h1,
            public,
            secret,
        )
    )


class WorkerProtector:
    """Encrypts frames of one upload: a `FrameProtector` from a spec.

    Raises `Refused` for malformed bytes or keys that don't belong together, `ParameterRefused` for an
    unknown set, `MissingExtra`.
    """

    def __init__(self, spec: bytes) -> None:
        held = decode_message(spec, _Spec, "a protector's spec")
        parameters = restore_parameters(
            held.parameters, held.key_bits, held.key_n_max, minimum_security=held.security
        )
        self.layout = bulk_layout(parameters, held.fields)
        self.h1 = held.h1
        self._maximum = (1 << min(held.bits, held.key_bits)) - 1
        self._cipher = member_cipher(parameters, held.public, held.secret)

    def warm_up(self) -> Self:
        """Make what the first frame would wait for (paillier's table, a second or two), and return self."""
        self._cipher.encrypt(np.zeros(0, np.uint32))
        return self

    def protect(self, index: int, fields: Fields) -> bytes:
        """Frame `index`, freshly encrypted: never the same bytes twice. Raises `EncodingError`."""
        what = f"frame {index}"
        if not 0 <= index < self.layout.frames:
            raise EncodingError(what, f"there are {self.layout.frames} frames")
        start, stop = self.layout.field_range(index)
        if fields.shape != (stop - start,):
            raise EncodingError(what, f"expected {stop - start} fields, got shape {fields.shape}")
        if fields.dtype not in (np.uint32, np.uint64) or int(fields.max()) > self._maximum:
            raise EncodingError(what, f"fields are unsigned integers up to {self._maximum}")
        return self._cipher.encrypt(fields)

    def __repr__(self) -> str:
        return f"<WorkerProtector of {self.layout.frames} frames>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a protector holds a secret key and is never pickled; send its spec")


def bulk_layout(parameters: CipherParameters, fields: int) -> BulkLayout:
    """The sizes of a round's bulk step; every frame is padded to the same size."""
    return BulkLayout(
        fields=fields,
        fields_per_frame=parameters.fields_per_frame,
        upload_frame=parameters.upload_frame_bytes,
        upload_last=parameters.upload_frame_bytes,
        sum_frame=parameters.sum_frame_bytes,
        sum_last=parameters.sum_frame_bytes,
        result_frame=parameters.result_frame_bytes,
        result_last=parameters.result_frame_bytes,
    )
