"""A torch tail that can be evaluated on ciphertext, and its export. For whoever trains the tail; needs
torch.
"""

from typing import Final

import numpy as np
import torch
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.inference.circuit import LARGEST_HIDDEN, LARGEST_INPUT, LINEAR, SQUARE
from blindsum.crypto.inference.evaluator import TailEvaluator
from blindsum.crypto.inference.key_holder import TailKeyHolder
from blindsum.crypto.inference.tail_model import CLIP, TailModel
from torch import Tensor, nn

_TOLERANCE: Final = 0.02


class Square(nn.Module):
    """The activation that CKKS can compute: each entry squared."""

    def forward(self, values: Tensor) -> Tensor:
        """The squares."""
        return values * values


class EncryptableTail(nn.Module):
    """Features (n, d) to logits (n,): standardised, cut at plus and minus 3, then the layers.

    `layers` are Linear, Square, Linear with at most 64 hidden units, or (hidden 0) one Linear. Call
    `standardise_by` with training features before training.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, inputs: int = LARGEST_INPUT, hidden: int = LARGEST_HIDDEN) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        if hidden:
            self.layers = nn.Sequential(nn.Linear(inputs, hidden), Square(), nn.Linear(hidden, 1))
        else:
            self.layers = nn.Sequential(nn.Linear(inputs, 1))

    def standardise_by(self, features: Tensor) -> None:
        """Take mean and deviation from training features (n, d)."""
        self.mean.copy_(features.mean(dim=0))
        self.deviation.copy_(features.std(dim=0).clamp_min(1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n,) of raw features (n, d)."""
        standard = ((features - self.mean) / self.deviation).clamp(-CLIP, CLIP)
        logits: Tensor = self.layers(standard)
        return logits.squeeze(1)


def export_tail(tail: EncryptableTail, check: Tensor, version: str) -> TailModel:
    """The tail in the form that the inference service takes: write its `to_bytes()` to a file.

    `check` are raw features (n, d): the export's logits are compared with torch's on all of them, and the
    encrypted evaluation's on the first eight. Raises `ParameterRefused` for layers that can't be exported,
    and if a logit differs by more than 0.02 (or by that part of it).
    """
    layers = list(tail.layers)
    kinds = [type(layer) for layer in layers]
    if kinds not in ([nn.Linear, Square, nn.Linear], [nn.Linear]):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise ParameterRefused(f"a tail is Linear, Square, Linear or one Linear, not {names}")
    arrays = {name: value.detach().double().cpu().numpy() for name, value in tail.state_dict().items()}
    square = len(layers) == 3
    width = arrays["layers.0.weight"].shape[0]
    model = TailModel(
        circuit=SQUARE if square else LINEAR,
        version=version,
        mean=arrays["mean"],
        deviation=arrays["deviation"],
        weights=arrays["layers.0.weight"],
        bias=arrays.get("layers.0.bias", np.zeros(width)),
        output=arrays["layers.2.weight"][0] if square else np.zeros(0),
        output_bias=float(arrays.get("layers.2.bias", np.zeros(1))[0]) if square else 0.0,
    )
    if not len(check):
        raise ParameterRefused("give some features to check the export with")
    with torch.inference_mode():
        expected = tail(check).double().cpu().numpy()
    features = check.detach().double().cpu().numpy()
    _compare("the export", model.logits(features), expected)
    holder, evaluator = TailKeyHolder(model.card), TailEvaluator(model)
    keys = evaluator.load_keys(holder.evaluation_keys)
    opened = [holder.decrypt(evaluator.evaluate(keys, holder.encrypt(one))) for one in features[:8]]
    _compare("the encrypted evaluation", np.array(opened), expected[:8])
    return model


def _compare(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    error = float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())
    if not error <= _TOLERANCE:
        raise ParameterRefused(f"{what} differs from the torch tail by {error:.3g}; train with weight decay")
