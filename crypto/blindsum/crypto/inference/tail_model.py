"""The tail of a network: what the cloud holds, and the card by which members know it."""

from dataclasses import dataclass
from typing import Annotated, Final, Self

import msgspec
import numpy as np
from blindsum.crypto.canonical import Document, decode_document, encode_document
from blindsum.crypto.errors import ParameterRefused, RefusalReason, Refused
from blindsum.crypto.inference.circuit import (
    LARGEST_HIDDEN,
    LARGEST_INPUT,
    LINEAR,
    SQUARE,
    Circuit,
    CircuitName,
    Floats,
    circuit_named,
)
from blindsum.crypto.primitives.derivation import labelled_hash

CLIP: Final = 3.0
"""Standardised features are cut at plus and minus this, or the square overflows."""
_LARGEST_WEIGHT: Final = 1e4
_SMALLEST_SCALE: Final = 2.0**-16
_LARGEST_HIDDEN: Final = 2.0**20  # its square, with 7 bits of sums, stays below half of 86 - 36 bits

Version = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._+-]+$")]


class TailCard(Document, frozen=True, kw_only=True):
    """What a member must know of a tail: how to make its input, and how to read its answer.

    `mean` and `deviation` standardise a feature, entry by entry. The encrypted answer is the logit times
    `answer_scale`.
    """

    circuit: CircuitName
    version: Version
    mean: list[float]
    deviation: list[float]
    answer_scale: float

    @property
    def parameters(self) -> Circuit:
        """The circuit that evaluates the tail."""
        return circuit_named(self.circuit)

    @property
    def inputs(self) -> int:
        """Entries of a feature."""
        return len(self.mean)

    @property
    def digest(self) -> bytes:
        """Names the card in requests: SHA-256, 32 bytes."""
        return labelled_hash("tail card", encode_document(self))

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The card in `data`. Raises `Refused`."""
        card = decode_document(data, cls, "the tail's card")
        if not 1 <= card.inputs <= LARGEST_INPUT or len(card.deviation) != card.inputs:
            raise Refused(RefusalReason.MALFORMED, f"a tail takes 1 to {LARGEST_INPUT} features")
        numbers = np.array([*card.mean, *card.deviation, card.answer_scale])
        if not np.isfinite(numbers).all() or min(card.deviation) <= 0:
            raise Refused(RefusalReason.OUT_OF_RANGE, "the tail's card has numbers that can't be used")
        if not _SMALLEST_SCALE <= card.answer_scale <= 1:
            raise Refused(RefusalReason.OUT_OF_RANGE, "the tail's answer scale is out of range")
        return card

    def standardise(self, features: Floats) -> Floats:
        """Features (n, inputs) with zero mean and unit variance, cut at plus and minus `CLIP`.

        Raises `ParameterRefused` for another shape or numbers that aren't finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.inputs:
            raise ParameterRefused(
                f"the tail {self.version} takes features of shape (n, {self.inputs}), not {features.shape}"
            )
        if not np.isfinite(features).all():
            raise ParameterRefused("a feature has numbers that aren't finite; check the image and the model")
        standardised = (features - np.array(self.mean)) / np.array(self.deviation)
        return np.asarray(np.clip(standardised, -CLIP, CLIP), np.float64)


class _Stored(Document, frozen=True, kw_only=True):
    circuit: CircuitName
    version: Version
    mean: list[float]
    deviation: list[float]
    weights: list[list[float]]
    bias: list[float]
    output: list[float]
    output_bias: float


@dataclass(frozen=True, repr=False)
class TailModel:
    """A tail in the clear: z = standardised feature, h = `weights` z + `bias`, and the logit is

    `output` . h^2 + `output_bias` (square), or h_0 (linear: one row, no output layer).
    """

    circuit: Circuit
    version: str
    mean: Floats
    deviation: Floats
    weights: Floats
    bias: Floats
    output: Floats
    output_bias: float

    def __post_init__(self) -> None:
        rows, inputs = self.weights.shape
        hidden = LARGEST_HIDDEN if self.circuit is SQUARE else 1
        if not 1 <= inputs <= LARGEST_INPUT or not 1 <= rows <= hidden:
            raise ParameterRefused(
                f"{self.circuit.name} takes at most {LARGEST_INPUT} features and {hidden} rows, "
                f"not {inputs} and {rows}"
            )
        outputs = rows if self.circuit is SQUARE else 0
        if [a.shape for a in (self.mean, self.deviation, self.bias, self.output)] != [
            (inputs,), (inputs,), (rows,), (outputs,),
        ]:  # fmt: skip
            raise ParameterRefused("the parts of the tail have shapes that don't fit together")
        parts = (self.mean, self.deviation, self.weights, self.bias, self.output)
        numbers = np.concatenate([np.ravel(part) for part in parts] + [[self.output_bias]])
        if not np.isfinite(numbers).all() or np.abs(numbers).max() > _LARGEST_WEIGHT:
            raise ParameterRefused(f"the tail has numbers above {_LARGEST_WEIGHT:g} or not finite")
        if self.deviation.min() <= 0:
            raise ParameterRefused("a deviation of the tail isn't above 0; leave constant features out")
        if not self.weights.any() or (outputs and not self.output.any()):
            raise ParameterRefused("the tail answers every feature alike: a whole layer is zero")
        if self.answer_scale < _SMALLEST_SCALE or self._reach.max() > _LARGEST_HIDDEN:
            raise ParameterRefused(
                "the tail's logits may become too large to compute on; train it with weight decay"
            )

    def __repr__(self) -> str:
        return f"<TailModel {self.version} {self.circuit.name}>"

    @property
    def _reach(self) -> Floats:
        """The largest absolute value of each hidden unit."""
        return np.asarray(CLIP * np.abs(self.weights).sum(axis=1) + np.abs(self.bias))

    @property
    def answer_scale(self) -> float:
        """The power of two, at most 1, that keeps the largest possible logit within the circuit's bound."""
        reach = self._reach
        if self.circuit is SQUARE:
            bound = float(np.abs(self.output) @ reach**2) + abs(self.output_bias)
        else:
            bound = float(reach[0])
        return float(2.0 ** min(0.0, self.circuit.answer_bits - np.ceil(np.log2(max(bound, 1e-300)))))

    @property
    def card(self) -> TailCard:
        """What members get to know of the tail."""
        return TailCard(
            circuit=self.circuit.name,
            version=self.version,
            mean=self.mean.tolist(),
            deviation=self.deviation.tolist(),
            answer_scale=self.answer_scale,
        )

    def logits(self, features: Floats) -> Floats:
        """Logits (n,) of features (n, inputs), in the clear. Raises `ParameterRefused`."""
        hidden = self.card.standardise(features) @ self.weights.T + self.bias
        if self.circuit is LINEAR:
            return np.asarray(hidden[:, 0])
        return np.asarray(hidden**2 @ self.output + self.output_bias)

    def to_bytes(self) -> bytes:
        """The tail as canonical JSON: what `from_bytes` takes."""
        return encode_document(
            _Stored(
                circuit=self.circuit.name,
                version=self.version,
                mean=self.mean.tolist(),
                deviation=self.deviation.tolist(),
                weights=self.weights.tolist(),
                bias=self.bias.tolist(),
                output=self.output.tolist(),
                output_bias=self.output_bias,
            )
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """A stored tail. Raises `Refused` or `ParameterRefused`."""
        stored = decode_document(data, _Stored, "the tail")
        width = len(stored.mean)
        if not stored.weights or any(len(row) != width for row in stored.weights):
            raise Refused(RefusalReason.MALFORMED, "the rows of the tail's weights have different lengths")
        return cls(
            circuit=circuit_named(stored.circuit),
            version=stored.version,
            mean=np.array(stored.mean, np.float64),
            deviation=np.array(stored.deviation, np.float64),
            weights=np.array(stored.weights, np.float64),
            bias=np.array(stored.bias, np.float64),
            output=np.array(stored.output, np.float64),
            output_bias=stored.output_bias,
        )
