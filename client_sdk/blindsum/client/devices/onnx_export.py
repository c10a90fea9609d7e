"""From a torch network to small ONNX graphs: float32, and static int8. Needs the extra `optimize`."""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxscript  # noqa: F401  (torch's exporter needs it; its absence shall show here)
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

INPUT: Final = "input"
OUTPUT: Final = "output"
QUANTISED: Final = ("Conv", "Gemm", "MatMul", "ConvTranspose")
"""Operators that hold nearly all weights and work. Quantising the others adds nodes, not savings."""
CALIBRATION_BATCH: Final = 16

Floats = NDArray[np.float32]


def export_fp32(network: nn.Module, calibration: Floats) -> bytes:
    """The network's graph, any batch size, without what only people read."""
    with tempfile.TemporaryDirectory(prefix="blindsum-onnx-") as folder:
        path = Path(folder) / "fp32.onnx"
        _export(network, calibration, path)
        return bytes(slim(onnx.load(path)).SerializeToString())


def export_int8(network: nn.Module, calibration: Floats) -> bytes:
    """The same graph with int8 weights per channel and uint8 activations, ranges from `calibration`."""
    with tempfile.TemporaryDirectory(prefix="blindsum-onnx-") as folder:
        exported, prepared, quantised = (Path(folder) / f"{part}.onnx" for part in ("a", "b", "c"))
        _export(network, calibration, exported)
        with _quiet():
            quant_pre_process(str(exported), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(quantised),
                _Batches(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                op_types_to_quantize=list(QUANTISED),
            )
        return bytes(slim(onnx.load(quantised)).SerializeToString())


def slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with short names and without comments, metadata and inferred shapes: the same computation.

    On a small network those take a third of the file. Changes `model` in place.
    """
    graph = model.graph
    for part in (model, graph):
        part.doc_string = ""
        del part.metadata_props[:]
    model.producer_name = model.producer_version = ""
    del graph.value_info[:]
    kept = {value.name for value in (*graph.input, *graph.output)}
    names: dict[str, str] = {}

    def short(name: str) -> str:
        return name if not name or name in kept else names.setdefault(name, f"{len(names):x}")

    for initializer in graph.initializer:
        initializer.name = short(initializer.name)
        initializer.doc_string = ""
    for node in graph.node:
        node.name = node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [short(name) for name in node.input]
        node.output[:] = [short(name) for name in node.output]
    onnx.checker.check_model(model)
    return model


def _export(network: nn.Module, calibration: Floats, path: Path) -> None:
    example = torch.from_numpy(np.ascontiguousarray(calibration[:2], dtype=np.float32))
    if len(example) < 2:
        raise ValueError("an export needs at least two examples, so that the batch size stays free")
    was_training = network.training
    network.eval()
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        program.save(str(path), external_data=False)
    finally:
        network.train(was_training)


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data as ONNX Runtime wants it."""

    def __init__(self, values: Floats) -> None:
        starts = range(0, len(values), CALIBRATION_BATCH)
        self._batches = iter([{INPUT: values[start : start + CALIBRATION_BATCH]} for start in starts])

    def get_next(self) -> dict[str, Floats] | None:
        return next(self._batches, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the tools' notices, which name files of this machine, out of the app's output."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
