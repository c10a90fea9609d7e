"""What a curious server could rebuild of an image: from a clear feature, and from all that it holds
otherwise.

The attacker is a ridge regression trained on another member's images; it gets the same number
of them for both. The target is the image as the stem sees it (mean 0, variance 1), and the mean image,
which everybody knows, is taken out before correlating.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blindsum.aggregator.capture import RECEIVED, read_capture
from blindsum.crypto.inference.circuit import Circuit
from blindsum.crypto.inference.tail_wire import unpack_answer, unpack_feature
from blindsum.proto.v1 import inference_pb2
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_RIDGE = 0.1


@dataclass(frozen=True)
class Inversion:
    """Correlations of rebuilt and true images of the victim; pictures are (n, 784), standardised."""

    clear: float
    encrypted: float
    images: Floats
    from_clear: Floats
    from_encrypted: Floats


def invert(
    known: Floats,
    known_features: Floats,
    known_view: NDArray[np.float32],
    victim: Floats,
    victim_features: Floats,
    victim_view: NDArray[np.float32],
) -> Inversion:
    """Train on the known images (m, 784) and attack the victim's (n, 784), by features and by the server's
    view.
    """
    mean = known.mean(axis=0)
    from_clear = _ridge(known_features, known - mean, victim_features)
    from_view = _ridge(known_view, known - mean, victim_view)
    return Inversion(
        _correlation(from_clear, victim - mean),
        _correlation(from_view, victim - mean),
        victim,
        from_clear + mean,
        from_view + mean,
    )


def server_view(capture: Path, circuit: Circuit, member: str, questions: int) -> NDArray[np.float32]:
    """All numbers of a member's last encrypted questions and answers, as the service's handlers had them.

    float32 (questions, numbers): every residue as a fraction of its prime, centred. The evaluation keys
    are the same in each question of a member, so they can't tell its images apart.
    """
    files = sorted(capture.glob(f"*-InferEncrypted-{member}.capture"))[-questions:]
    rows = []
    for path in files:
        numbers = []
        for direction, message in read_capture(path):
            if direction == RECEIVED:
                asked = inference_pb2.InferEncryptedRequest.FromString(message)
                parts = unpack_feature(circuit, asked.keys[:16], asked.feature)
                for part in parts:
                    numbers += [r / p for r, p in zip(part, circuit.ring.data, strict=True)]
            else:
                answer = inference_pb2.InferEncryptedResponse.FromString(message).answer
                numbers += list(unpack_answer(circuit, answer[:16], answer) / circuit.ring.data[0])
        rows.append(np.concatenate(numbers).astype(np.float32) - np.float32(0.5))
    return np.stack(rows)


def _ridge(known: NDArray[np.floating], targets: Floats, asked: NDArray[np.floating]) -> Floats:
    """Ridge regression on standardised inputs, in its dual form: as many unknowns as there are examples."""
    mean, deviation = known.mean(axis=0), known.std(axis=0) + 1e-6
    inputs = (known - mean) / deviation
    kernel = np.asarray(inputs @ inputs.T, np.float64) / inputs.shape[1]
    weights = np.linalg.solve(kernel + _RIDGE / 10 * np.eye(len(kernel)), targets)
    return np.asarray(((asked - mean) / deviation) @ inputs.T / inputs.shape[1] @ weights, np.float64)


def _correlation(found: Floats, true: Floats) -> float:
    return float(np.corrcoef(found.ravel(), true.ravel())[0, 1])
