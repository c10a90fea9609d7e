"""An edge model in ONNX: image in, logit and feature out."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.client.inference.calibration import Floats
from blindsum.crypto.errors import MissingExtra, ParameterRefused


class OnnxBody:
    """An ONNX model with one input (n, ...) and the outputs `logit` (n,) or (n, 1) and `feature` (n, d).

    Raises `MissingExtra` without onnxruntime, `ParameterRefused` for a model with other outputs.
    """

    def __init__(self, model: Path | str | bytes, threads: int = 1) -> None:
        try:
            runtime: Any = import_module("onnxruntime")
        except ImportError as error:
            raise MissingExtra("edge", "an edge model in ONNX") from error
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else str(model)
        self._session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name
        if not {"logit", "feature"} <= {output.name for output in self._session.get_outputs()}:
            raise ParameterRefused("the ONNX model needs outputs named 'logit' and 'feature'")

    def __call__(self, images: Any) -> tuple[Floats, Floats]:
        """Logits (n,) and features (n, d) of images (n, ...), float32."""
        given = {self._input: np.asarray(images, np.float32)}
        logits, features = self._session.run(["logit", "feature"], given)
        return np.asarray(logits, np.float64).reshape(len(logits)), np.asarray(features, np.float64)
