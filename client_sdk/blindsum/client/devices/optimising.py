"""Makes a model fit a device: builds candidates, measures each on held-out data, chooses, and says why.

The smallest artefact wins among those that fit flash, memory and latency of the profile and lose no more
accuracy than allowed (1 point unless the caller says otherwise) against the published network in torch; of
equal size the faster one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from blindsum.client.devices.backends import FP32, Backend, Floats, backend
from blindsum.client.devices.device_profile import DeviceProfile
from blindsum.client.devices.measuring import Measurement, measure
from blindsum.crypto.errors import BlindsumError
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import nn

MAX_DROP: Final = 0.01
FULL_WIDTH: Final = 1.0
_BATCH: Final = 64

Labels = NDArray[np.integer[Any]]
Accuracy = Callable[[Floats, Labels], float]
"""Outputs and labels to a fraction of 1."""


class NoCandidate(BlindsumError):
    """Nothing fits the device; the text says what stood in the way of each candidate."""

    def __init__(self, text: str, report: "OptimisationReport") -> None:
        super().__init__(text)
        self.report = report


@dataclass(frozen=True)
class Candidate:
    """One way to run the model, with what was measured.

    `size` is the artefact's size, `fp32_bytes` that of the float32 artefact of the same width; accuracies are
    fractions of 1; `accuracy_drop` is against the full-width network in torch; `latency_us` (median) and
    `latency_p95_us` of one answer as the device would need, `ram_mb` the inference process's memory.
    `problems` says why it isn't fit; none if it is.
    """

    width: float
    backend: str
    size: int
    fp32_bytes: int
    accuracy: float
    accuracy_drop: float
    latency_us: float
    latency_p95_us: float
    ram_mb: float
    problems: tuple[str, ...]
    artefact: bytes

    @property
    def name(self) -> str:
        """How the report names it."""
        return f"width {self.width:g}, {self.backend}"

    def as_json(self) -> dict[str, Any]:
        """The figures, for scripts."""
        return {
            "width": self.width,
            "backend": self.backend,
            "bytes": self.size,
            "fp32_bytes": self.fp32_bytes,
            "accuracy": self.accuracy,
            "accuracy_drop": self.accuracy_drop,
            "latency_us": self.latency_us,
            "latency_p95_us": self.latency_p95_us,
            "ram_mb": self.ram_mb,
            "problems": list(self.problems),
        }


@dataclass(frozen=True)
class OptimisationReport:
    """Every candidate in the order in which they were built; `chosen` is one of them, or None."""

    profile: DeviceProfile
    held_out: int
    reference_accuracy: float
    max_drop: float
    candidates: tuple[Candidate, ...]
    chosen: Candidate | None

    @property
    def reason(self) -> str:
        """Why the chosen one was chosen, or why none was."""
        fit = [one for one in self.candidates if not one.problems]
        if self.chosen is None:
            parts = "; ".join(f"{one.name}: {', '.join(one.problems)}" for one in self.candidates)
            return f"nothing fits {self.profile.name} ({parts})"
        others = len(fit) - 1
        among = f"the smallest of {len(fit)} that fit" if others else "the only one that fits"
        return (
            f"{self.chosen.name} is {among}: {self.chosen.size} bytes, "
            f"{self.chosen.size / self.chosen.fp32_bytes:.2f} of float32, "
            f"{100 * self.chosen.accuracy_drop:+.1f} points of accuracy lost"
        )

    def as_json(self) -> dict[str, Any]:
        """The whole report, for scripts."""
        return {
            "profile": self.profile.name,
            "held_out": self.held_out,
            "reference_accuracy": self.reference_accuracy,
            "max_drop": self.max_drop,
            "candidates": [one.as_json() for one in self.candidates],
            "chosen": None if self.chosen is None else self.chosen.name,
            "reason": self.reason,
        }


def optimise(
    networks: "nn.Module | Mapping[float, nn.Module]",
    profile: DeviceProfile,
    *,
    inputs: Floats,
    labels: Labels,
    calibration: Floats,
    max_drop: float = MAX_DROP,
    accuracy: Accuracy | None = None,
    backends: Sequence[Backend] | None = None,
) -> OptimisationReport:
    """The candidates for a device, measured; the choice is `chosen` in the report.

    `networks` is the published network, or trained networks by width where the model offers more than one
    (1.0 is the full one and the reference). `inputs` (n, ...) float32 and `labels` (n,) are held-out local
    data, which must not be part of `calibration`; `accuracy` is balanced accuracy unless given. `backends`
    default to those that the profile names.

    Raises `NoCandidate` with the report when nothing fits, `UnknownBackend`, `MissingExtra`, `ValueError` for
    data that can't be used.
    """
    inputs = np.ascontiguousarray(inputs, dtype=np.float32)
    calibration = np.ascontiguousarray(calibration, dtype=np.float32)
    if len(inputs) != len(labels) or not len(inputs):
        raise ValueError(
            f"{len(inputs)} inputs and {len(labels)} labels; they belong together, and some are needed"
        )
    if _share_an_input(inputs, calibration):
        raise ValueError("a held-out input is also calibration data; keep the two apart")
    score = accuracy or balanced_accuracy
    by_width = networks if isinstance(networks, Mapping) else {FULL_WIDTH: networks}
    if FULL_WIDTH not in by_width:
        raise ValueError("the networks by width include the full one, 1.0: the others are compared with it")
    used = [backend(name) for name in profile.backends] if backends is None else list(backends)
    by_name = {one.name: one for one in used}
    reference = score(_torch_outputs(by_width[FULL_WIDTH], inputs), labels)
    candidates = []
    for width, network in sorted(by_width.items(), reverse=True):
        fp32 = (by_name.get(FP32) or backend(FP32)).build(network, calibration)
        for one in used:
            artefact = fp32 if one.name == FP32 else one.build(network, calibration)
            measured = measure(one.name, artefact, inputs, profile.threads)
            candidates.append(
                _judged(
                    Candidate(
                        width=width,
                        backend=one.name,
                        size=len(artefact),
                        fp32_bytes=len(fp32),
                        accuracy=(reached := score(measured.outputs, labels)),
                        accuracy_drop=reference - reached,
                        latency_us=measured.latency_us * profile.slower,
                        latency_p95_us=measured.latency_p95_us * profile.slower,
                        ram_mb=measured.ram_mb,
                        problems=(),
                        artefact=artefact,
                    ),
                    profile,
                    max_drop,
                )
            )
    fit = [one for one in candidates if not one.problems]
    chosen = min(fit, key=lambda one: (one.size, one.latency_us)) if fit else None
    report = OptimisationReport(profile, len(inputs), reference, max_drop, tuple(candidates), chosen)
    if chosen is None:
        hint = "; allow a larger drop, or publish another width" if _only_drop(candidates) else ""
        raise NoCandidate(report.reason + hint, report)
    return report


def balanced_accuracy(outputs: Floats, labels: Labels) -> float:
    """Mean of the classes' recalls, a fraction of 1. Outputs are logits: (n,) or (n, 1) for two classes, else
    (n, classes). Raises `ValueError` when a class of the labels is alone.
    """
    flat = outputs.reshape(len(outputs), -1)
    answers = (flat[:, 0] > 0).astype(np.int64) if flat.shape[1] == 1 else flat.argmax(axis=1)
    classes = np.unique(labels)
    if len(classes) < 2:
        raise ValueError("held-out data needs examples of at least two classes")
    return float(np.mean([np.mean(answers[labels == one] == one) for one in classes]))


def _judged(one: Candidate, profile: DeviceProfile, max_drop: float) -> Candidate:
    checks = (
        (one.size > profile.flash_kb * 1024, f"{one.size / 1024:.0f} KiB, flash has {profile.flash_kb:g}"),
        (one.ram_mb > profile.ram_mb, f"{one.ram_mb:.0f} MiB of memory, the device has {profile.ram_mb:g}"),
        (
            one.latency_p95_us > profile.latency_ms * 1000,
            f"{one.latency_p95_us / 1000:.2f} ms, {profile.latency_ms:g} are asked for",
        ),
        # Half of one held-out example is no difference.
        (
            one.accuracy_drop > max_drop + 1e-9,
            f"{100 * one.accuracy_drop:.1f} points lost, {100 * max_drop:g} allowed",
        ),
    )
    return replace(one, problems=tuple(text for wrong, text in checks if wrong))


def _only_drop(candidates: Sequence[Candidate]) -> bool:
    return any(len(one.problems) == 1 and "points lost" in one.problems[0] for one in candidates)


def _share_an_input(inputs: Floats, calibration: Floats) -> bool:
    known = {one.tobytes() for one in inputs}
    return any(one.tobytes() in known for one in calibration)


def _torch_outputs(network: "nn.Module", inputs: Floats) -> Floats:
    import torch  # noqa: PLC0415  (only building needs it)

    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            parts = [
                network(torch.from_numpy(inputs[start : start + _BATCH]))
                for start in range(0, len(inputs), _BATCH)
            ]
        outputs: Floats = torch.cat(parts).numpy()
        return outputs
    finally:
        network.train(was_training)


__all__ = ["Candidate", "Measurement", "NoCandidate", "OptimisationReport", "balanced_accuracy", "optimise"]
