"""A model on a device: an optimised artefact, verified when it is loaded. Needs onnxruntime and numpy, not
torch.
"""

import os
from typing import Self

import numpy as np
from blindsum.client.devices.backends import Floats, backend
from blindsum.client.devices.published_model import (
    ModelManifest,
    ModelRefused,
    ModelTrust,
    open_model,
    read_model,
)
from numpy.typing import NDArray


class DeviceModel:
    """An artefact that was verified and opened; call it with inputs, float32, the batch first.

    `manifest` says which version it is, who signed it, and what was measured when it was chosen.
    """

    def __init__(self, manifest: ModelManifest, artefact: bytes, *, threads: int = 1) -> None:
        if manifest.optimised is None:
            raise ModelRefused(
                f"{manifest.name} version {manifest.version} holds {manifest.artefact}, which isn't for a "
                "device; make an artefact with `blindsum optimize`"
            )
        self.manifest = manifest
        self._run = backend(manifest.optimised.backend).open(artefact, threads)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        trust: ModelTrust,
        *,
        at_least: int = 1,
        name: str | None = None,
        threads: int = 1,
    ) -> Self:
        """The model in a file, if it is signed by a trusted publisher and whole.

        Raises what `open_model` raises, and `UnknownBackend` or `MissingExtra` when it can't be run here.
        """
        opened = open_model(read_model(path), trust, at_least=at_least, name=name)
        return cls(opened.manifest, opened.artefact, threads=threads)

    @property
    def version(self) -> int:
        """The model's version."""
        return self.manifest.version

    def outputs(self, inputs: Floats) -> Floats:
        """The network's outputs (logits) for inputs with the batch first."""
        return self._run(np.asarray(inputs, dtype=np.float32))

    def probabilities(self, inputs: Floats) -> NDArray[np.float64]:
        """Probabilities of the classes, float64 (n, classes); a single logit gives two classes."""
        logits = self.outputs(inputs).reshape(len(inputs), -1).astype(np.float64)
        if logits.shape[1] == 1:
            logits = np.concatenate((np.zeros_like(logits), logits), axis=1)
        raised = np.exp(logits - logits.max(axis=1, keepdims=True))
        chances: NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
        return chances

    def __repr__(self) -> str:
        return f"<DeviceModel {self.manifest.name} version {self.version}>"
