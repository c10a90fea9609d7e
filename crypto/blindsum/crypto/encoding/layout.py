"""The layout: names, shapes and dtypes of the shared tensors; past it everything is one flat vector."""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from blindsum.crypto.canonical import Document, encode_document
from blindsum.crypto.errors import EncodingError
from blindsum.crypto.primitives.derivation import mac
from blindsum.crypto.trust.group_key import GroupKey
from numpy.typing import NDArray

DtypeName = Literal["float16", "bfloat16", "float32", "float64"]
Vector = NDArray[np.float32]

_NUMPY_DTYPES: tuple[DtypeName, ...] = ("float16", "float32", "float64")


class TensorLayout(Document, frozen=True, kw_only=True):
    """One shared tensor: its name, shape and floating dtype. Never empty."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    shape: tuple[Annotated[int, msgspec.Meta(ge=1, lt=2**40)], ...]
    dtype: DtypeName

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


class Layout(Document, frozen=True, kw_only=True, dict=True):
    """The shared tensors in the order in which they are laid out in the flat float32 vector."""

    tensors: tuple[TensorLayout, ...]

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError("a layout needs at least one tensor")
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ValueError("a tensor is named twice in the layout")

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Self:
        """The layout of floating arrays, in the mapping's order.

        Raises `EncodingError` naming a tensor that is empty or not floating.
        """
        entries = []
        for name, array in tensors.items():
            _check_floating(name, array)
            if array.size == 0:
                raise EncodingError(name, "the tensor is empty; leave it out of the shared parameters")
            entries.append(TensorLayout(name=name, shape=array.shape, dtype=_dtype_name(name, array)))
        if not entries:
            raise EncodingError("layout", "there are no tensors to share; choose at least one")
        return cls(tensors=tuple(entries))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in order."""
        return tuple(tensor.name for tensor in self.tensors)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of values of the tensors in order."""
        return tuple(tensor.size for tensor in self.tensors)

    @cached_property
    def dimension(self) -> int:
        """Values in the flat vector."""
        return sum(self.sizes)

    def digest(self, key: GroupKey) -> bytes:
        """The keyed digest by which plan and header name the layout; it tells the server nothing."""
        return mac(key.state_key(), "layout", encode_document(self))

    def flatten(self, tensors: Mapping[str, NDArray[Any]], base: Vector | None = None) -> Vector:
        """The tensors as a fresh flat float32 vector of `dimension` values, minus `base` if given.

        Any floating dtype and any strides are taken. Raises `EncodingError` naming a tensor that is
        missing, unknown, not floating, or of another shape.
        """
        unknown = tensors.keys() - set(self.names)
        if unknown:
            raise EncodingError(min(unknown), "this tensor isn't in the layout of the training plan")
        flat = np.empty(self.dimension, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the encoder refuses what isn't finite
            for tensor, part in self._parts(flat):
                array = tensors.get(tensor.name)
                if array is None:
                    raise EncodingError(tensor.name, "this tensor of the training plan is missing")
                _check_floating(tensor.name, array)
                if array.shape != tensor.shape:
                    raise EncodingError(
                        tensor.name, f"the shape is {array.shape}, but the plan says {tensor.shape}"
                    )
                np.copyto(part.reshape(tensor.shape), array, casting="same_kind")
            if base is not None:
                np.subtract(flat, base, out=flat)
        return flat

    def unflatten(self, flat: Vector) -> dict[str, NDArray[Any]]:
        """Fresh arrays by name, in their shapes and dtypes (bfloat16 as float32), from a flat vector."""
        if flat.shape != (self.dimension,):
            raise EncodingError("layout", f"expected {self.dimension} values, got shape {flat.shape}")
        return {
            tensor.name: part.reshape(tensor.shape).astype(
                np.float32 if tensor.dtype == "bfloat16" else tensor.dtype
            )
            for tensor, part in self._parts(flat)
        }

    def _parts(self, flat: Vector) -> Iterator[tuple[TensorLayout, Vector]]:
        start = 0
        for tensor in self.tensors:
            yield tensor, flat[start : start + tensor.size]
            start += tensor.size


def _check_floating(name: str, array: object) -> None:
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        found = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise EncodingError(name, f"only floating arrays are summed, not {found}; keep this tensor local")


def _dtype_name(name: str, array: NDArray[Any]) -> DtypeName:
    for dtype in _NUMPY_DTYPES:
        if array.dtype.newbyteorder("=") == np.dtype(dtype):
            return dtype
    raise EncodingError(name, f"{array.dtype} isn't among {', '.join(_NUMPY_DTYPES)}; convert it first")
