"""A model's weights as one artefact: safetensors, which holds arrays and their names, and no code."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from blindsum.client.devices.published_model import ModelRefused
from blindsum.crypto.errors import MissingExtra
from numpy.typing import NDArray

if TYPE_CHECKING:
    from blindsum.client.layout import StateDict

WEIGHTS: Final = "safetensors"


def pack_weights(state: "StateDict") -> bytes:
    """The state dict (torch tensors or numpy arrays) as bytes; the same for the same values.

    Raises `MissingExtra` without the extra `optimize`.
    """
    try:
        from safetensors.numpy import save  # noqa: PLC0415  (the extra may be missing)
    except ModuleNotFoundError:
        raise MissingExtra("optimize", "publishing weights") from None
    return bytes(save({name: np.ascontiguousarray(_array(state[name])) for name in sorted(state)}))


def unpack_weights(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays by name. Raises `ModelRefused` for bytes that aren't safetensors, `MissingExtra`."""
    try:
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.numpy import load  # noqa: PLC0415
    except ModuleNotFoundError:
        raise MissingExtra("optimize", "reading published weights") from None
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise ModelRefused(f"the weights can't be read: {error}") from None


def torch_state(weights: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The weights as torch tensors, for `load_state_dict`."""
    import torch  # noqa: PLC0415  (the extra may be missing)

    return {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}


def _array(value: Any) -> NDArray[Any]:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
