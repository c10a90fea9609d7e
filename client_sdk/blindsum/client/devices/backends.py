"""Back ends: what turns a torch network into a device's artefact, and what runs that artefact.

Another back end (ExecuTorch, TensorFlow Lite, a vendor's compiler) is an object with these three members,
registered as an entry point of the group `blindsum.backends` under the name that device profiles use:

    [project.entry-points."blindsum.backends"]
    executorch-int8 = "my_package.executorch:Int8Backend"

`name` goes into the manifest, so that the device knows what to run the artefact with. `build` may need torch;
`open` runs on the device and may not.
"""

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
from blindsum.crypto.errors import BlindsumError, MissingExtra
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

GROUP: Final = "blindsum.backends"
FP32: Final = "onnx-fp32"
INT8: Final = "onnx-int8"

Floats = NDArray[np.float32]
Run = Callable[[Floats], Floats]
"""Inputs, float32 with the batch first, to the network's outputs."""


class UnknownBackend(BlindsumError):
    """No back end of that name is installed; the text lists those that are."""


class Backend(Protocol):
    """One way to run a network on a device."""

    name: str

    def build(self, network: "nn.Module", calibration: Floats) -> bytes:
        """The artefact. `calibration` is float32 local data, batch first: it sets ranges and shows the shape.

        Raises `MissingExtra` when a tool isn't installed.
        """

    def open(self, artefact: bytes, threads: int) -> Run:
        """What runs the artefact on this machine. Raises `BlindsumError` for bytes it can't run."""


class OnnxFp32:
    """ONNX in float32, run by ONNX Runtime."""

    name = FP32

    def build(self, network: "nn.Module", calibration: Floats) -> bytes:
        """The exported graph without names and comments that nothing reads."""
        return bytes(_onnx_export().export_fp32(network, calibration))

    def open(self, artefact: bytes, threads: int) -> Run:
        """An ONNX Runtime session on the processor."""
        return open_onnx(artefact, threads)


class OnnxInt8:
    """ONNX with static int8 (QDQ, per channel) for convolutions and matrix products, run by ONNX Runtime.

    Ranges come from the calibration data, not from each input: dynamic int8 is several times slower on
    convolutions.
    """

    name = INT8

    def build(self, network: "nn.Module", calibration: Floats) -> bytes:
        """The quantised graph without names and comments that nothing reads."""
        return bytes(_onnx_export().export_int8(network, calibration))

    def open(self, artefact: bytes, threads: int) -> Run:
        """An ONNX Runtime session on the processor."""
        return open_onnx(artefact, threads)


def backend(name: str) -> Backend:
    """The back end called `name`: ours, or an installed package's. Raises `UnknownBackend`."""
    for ours in (OnnxFp32(), OnnxInt8()):
        if ours.name == name:
            return ours
    others = entry_points(group=GROUP)
    for entry in others:
        if entry.name == name:
            made: Backend = entry.load()()
            return made
    known = ", ".join([FP32, INT8, *sorted(entry.name for entry in others)])
    raise UnknownBackend(f"no back end is called {name!r}; installed: {known}")


def open_onnx(artefact: bytes, threads: int) -> Run:
    """A graph with one input and one output in ONNX Runtime, on the processor.

    Raises `MissingExtra` without onnxruntime, `BlindsumError` for bytes that aren't such a graph.
    """
    try:
        import onnxruntime  # noqa: PLC0415  (the extra may be missing)
    except ModuleNotFoundError:
        raise MissingExtra("edge", "running an ONNX model") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session: Any = onnxruntime.InferenceSession(artefact, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BlindsumError(f"ONNX Runtime can't load this artefact: {type(error).__name__}") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise BlindsumError("an artefact has one input and one output; export the network's logits alone")
    name = inputs[0].name

    def run(values: Floats) -> Floats:
        answer: Floats = session.run(None, {name: np.ascontiguousarray(values, dtype=np.float32)})[0]
        return answer

    return run


def _onnx_export() -> Any:
    """The module that needs torch, onnx and onnxscript, imported only to build."""
    try:
        from blindsum.client.devices import onnx_export  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("blindsum"):
            raise
        raise MissingExtra("optimize", "making an ONNX artefact") from None
    return onnx_export
