"""Measures an artefact as a device would run it: in a process of its own, without torch.

`python -m blindsum.client.devices.measuring BACKEND ARTEFACT INPUTS THREADS` answers one line of JSON. A
process of its own, because torch's threads and memory in the process that builds would be measured with it.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from blindsum.client.devices.backends import Floats, backend
from blindsum.crypto.errors import BlindsumError

_WARM_UP: Final = 10
_ANSWERS: Final = 200
_BATCH: Final = 64
_SECONDS: Final = 300.0


@dataclass(frozen=True)
class Measurement:
    """`latency_us` and `latency_p95_us` are the median and 95th percentile of one answer, one input each;
    `ram_mb` the process's largest resident memory in MiB; `outputs` what it answered, float32.
    """

    latency_us: float
    latency_p95_us: float
    ram_mb: float
    outputs: Floats


def measure(name: str, artefact: bytes, inputs: Floats, threads: int) -> Measurement:
    """Runs every input through the artefact and times single answers, in a process of its own.

    Raises `BlindsumError` when that process fails.
    """
    with tempfile.TemporaryDirectory(prefix="blindsum-measure-") as folder:
        model, values = Path(folder) / "artefact", Path(folder) / "inputs.npy"
        model.write_bytes(artefact)
        np.save(values, inputs, allow_pickle=False)
        run = subprocess.run(  # noqa: S603  (our own module, arguments of our own making)
            [sys.executable, "-m", __name__, name, str(model), str(values), str(threads)],
            capture_output=True, text=True, timeout=_SECONDS, check=False,
        )  # fmt: skip
        if run.returncode:
            said = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise BlindsumError(f"measuring a {name} artefact failed: {said}")
        figures = json.loads(run.stdout)
        outputs: Floats = np.load(values.with_suffix(".out.npy"), allow_pickle=False)
        return Measurement(**figures, outputs=outputs)


@dataclass(frozen=True)
class _Figures:
    latency_us: float
    latency_p95_us: float
    ram_mb: float


def _main(name: str, model: str, values: str, threads: str) -> None:
    inputs: Floats = np.load(values, allow_pickle=False)
    run = backend(name).open(Path(model).read_bytes(), int(threads))
    one = inputs[:1]
    for _ in range(_WARM_UP):
        run(one)
    times = []
    for _ in range(_ANSWERS):
        start = time.perf_counter_ns()
        run(one)
        times.append((time.perf_counter_ns() - start) / 1000)
    peak = _peak_mb()
    outputs = np.concatenate([run(inputs[start : start + _BATCH]) for start in range(0, len(inputs), _BATCH)])
    np.save(Path(values).with_suffix(".out.npy"), outputs, allow_pickle=False)
    median, slow = np.percentile(times, [50, 95])
    print(json.dumps(asdict(_Figures(float(median), float(slow), peak))))


def _peak_mb() -> float:
    """This process's largest resident memory in MiB."""
    # ru_maxrss survives exec on Linux: it would show the memory of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    _main(*sys.argv[1:])
