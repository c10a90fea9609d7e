"""Between an app's state dict and named numpy arrays: torch or numpy in, the same kind out.

Rule for what is shared: floating tensors whose names match one of the `shared` patterns. Integer and
boolean buffers (counters such as `num_batches_tracked`) are never summed and stay local, as does
every tensor that no pattern matches. torch is imported only where a value is a torch tensor.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from blindsum.crypto.encoding.layout import Layout, TensorLayout, Vector
from blindsum.crypto.errors import EncodingError, MissingExtra
from numpy.typing import NDArray

if TYPE_CHECKING:
    from types import ModuleType

Framework = Literal["numpy", "torch"]
StateDict = Mapping[str, Any]
"""Names to torch tensors or numpy arrays."""

EVERYTHING = ("*",)


def framework_of(state: StateDict) -> Framework:
    """Which library the values of a state dict are of. Raises `EncodingError` naming one of neither."""
    for name, value in state.items():
        if not is_tensor(value) and not isinstance(value, (np.ndarray, np.generic)):
            raise EncodingError(name, f"expected a torch tensor or a numpy array, not {type(value).__name__}")
    return "torch" if any(is_tensor(value) for value in state.values()) else "numpy"


def is_tensor(value: object) -> bool:
    """Whether the value is a torch tensor; doesn't import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def shared_names(state: StateDict, patterns: Sequence[str] = EVERYTHING) -> tuple[str, ...]:
    """Names of the floating tensors that match a pattern (`fnmatch`: * ? [...]), in order.

    Raises `EncodingError` for a pattern that no tensor matches, or when nothing is left to share.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise EncodingError(pattern, "no tensor of the model has a name like this")
    names = tuple(
        name
        for name, value in state.items()
        if _is_floating(name, value) and any(fnmatchcase(name, pattern) for pattern in patterns)
    )
    if not names:
        raise EncodingError("layout", "no floating tensor matches the patterns; there is nothing to share")
    return names


def layout_of(state: StateDict, patterns: Sequence[str] = EVERYTHING) -> Layout:
    """The layout of a model's shared tensors, in the state dict's order.

    Raises `EncodingError` naming a tensor that is empty or has a dtype that can't be shared.
    """
    entries = []
    for name in shared_names(state, patterns):
        value = state[name]
        if is_tensor(value) and str(value.dtype) == "torch.bfloat16":
            if value.numel() == 0:
                raise EncodingError(name, "the tensor is empty; leave it out of the shared parameters")
            entries.append(TensorLayout(name=name, shape=tuple(value.shape), dtype="bfloat16"))
        else:
            entries += Layout.of({name: _array(name, value)}).tensors
    return Layout(tensors=tuple(entries))


def arrays(state: StateDict, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """The named tensors as numpy arrays (views where possible; bfloat16 as float32).

    Raises `EncodingError` naming a tensor that is missing or isn't an array.
    """
    found = {}
    for name in names:
        if name not in state:
            raise EncodingError(
                name, "this shared tensor of the training plan is missing from the state dict"
            )
        found[name] = _array(name, state[name])
    return found


def update_of(layout: Layout, state: StateDict, base: Vector) -> Vector:
    """The flat update: the state's shared tensors minus the round's weights, float32.

    Raises `EncodingError` naming a tensor that is missing, of another shape, not floating or not finite.
    """
    update = layout.flatten(arrays(state, layout.names), base)
    start = 0
    for name, size in zip(layout.names, layout.sizes, strict=True):
        part = update[start : start + size]
        if not (np.isfinite(part.max()) and np.isfinite(part.min())):
            raise EncodingError(name, "a value is NaN or infinite; nothing was sent")
        start += size
    return update


def dress(layout: Layout, shared: Mapping[str, NDArray[Any]], framework: Framework) -> dict[str, Any]:
    """Named arrays as fresh values of the framework, in the layout's dtypes."""
    if framework == "numpy":
        return {name: shared[name] for name in layout.names}
    torch = _torch()
    return {
        entry.name: torch.from_numpy(np.array(shared[entry.name])).to(getattr(torch, entry.dtype))
        for entry in layout.tensors
    }


def local_parts(state: StateDict, layout: Layout) -> dict[str, Any]:
    """Copies of the tensors that aren't shared: the local head, integer buffers."""
    shared = set(layout.names)
    return {
        name: value.detach().clone() if is_tensor(value) else np.array(value)
        for name, value in state.items()
        if name not in shared
    }


def portable(state: StateDict) -> dict[str, NDArray[Any]]:
    """Every tensor as an array that numpy can store; bfloat16 as float32."""
    return {name: np.ascontiguousarray(_array(name, value)) for name, value in state.items()}


def undress(stored: Mapping[str, NDArray[Any]], framework: Framework) -> dict[str, Any]:
    """Stored arrays as values of the framework."""
    if framework == "numpy":
        return dict(stored)
    torch = _torch()
    return {name: torch.from_numpy(np.array(value)) for name, value in stored.items()}


def _array(name: str, value: Any) -> NDArray[Any]:
    if is_tensor(value):
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            tensor = tensor.float()
        array: NDArray[Any] = tensor.numpy()
        return array
    if not isinstance(value, (np.ndarray, np.generic)):
        raise EncodingError(name, f"expected a torch tensor or a numpy array, not {type(value).__name__}")
    if value.dtype.hasobject:
        raise EncodingError(name, "arrays of objects can't be shared; give numbers")
    return np.asarray(value)


def _is_floating(name: str, value: Any) -> bool:
    if is_tensor(value):
        return bool(value.is_floating_point())
    array = _array(name, value)
    if array.dtype.kind == "c":
        raise EncodingError(name, "complex tensors can't be shared; split them into real and imaginary parts")
    return array.dtype.kind == "f"


def _torch() -> "ModuleType":
    try:
        import torch  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtra("torch", "this plan's model is a torch state dict, and it") from None
    return torch
