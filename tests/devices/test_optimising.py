"""From a published model to a device's signed artefact, measured and loaded without torch."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript", reason="optimize isn't installed (torch, onnxscript)")
pytest.importorskip("onnxruntime", reason="edge isn't installed (onnxruntime; nor torch)")
pytest.importorskip("safetensors", reason="optimize isn't installed (torch, safetensors)")

import msgspec
import torch
from blindsum.client.devices import (
    DeviceProfile,
    NoCandidate,
    OptimisationReport,
    ProfileRefused,
    UnknownBackend,
    optimise,
    pack_weights,
    read_profile,
    unpack_weights,
)
from blindsum.client.devices.backends import FP32, INT8, backend
from blindsum.client.devices.onnx_export import export_fp32
from blindsum.client.testing import Federation
from blindsum.crypto.errors import BlindsumError
from small_networks import data, network
from typer.testing import CliRunner
from without_torch import NO_TORCH

pytestmark = pytest.mark.torch

ROOMY = DeviceProfile(name="a board", ram_mb=2000, flash_kb=2000, latency_ms=5000)


def run(networks: Any, profile: DeviceProfile, **options: Any) -> OptimisationReport:
    inputs, labels = data(1)
    return optimise(networks, profile, inputs=inputs, labels=labels, calibration=data(2)[0], **options)


@pytest.fixture(scope="module")
def report() -> OptimisationReport:
    return run({1.0: network(), 0.5: network(0.5)}, ROOMY)


class Ready:
    """Anyone's adapter: here one that has its artefact already, so that no test exports more than it must."""

    def __init__(self, name: str, artefact: bytes) -> None:
        self.name = name
        self._artefact = artefact

    def build(self, _network: Any, _calibration: Any) -> bytes:
        return self._artefact

    def open(self, artefact: bytes, threads: int) -> Any:
        return backend(self.name).open(artefact, threads)


def test_every_candidate_is_measured(report: OptimisationReport) -> None:
    assert [(one.width, one.backend) for one in report.candidates] == [
        (1.0, FP32), (1.0, INT8), (0.5, FP32), (0.5, INT8),
    ]  # fmt: skip
    for one in report.candidates:
        assert one.size == len(one.artefact)
        assert one.latency_us > 0
        assert 10 < one.ram_mb < 1000
    assert report.reference_accuracy > 0.9, "the network can do what it is for"


def test_static_int8_is_a_third_and_loses_little(report: OptimisationReport) -> None:
    """Above 20,000 parameters; the half-width one has fewer."""
    assert sum(value.numel() for value in network().parameters()) > 20_000
    fp32, int8 = report.candidates[:2]
    assert int8.size <= 0.35 * fp32.size
    assert abs(int8.accuracy - fp32.accuracy) <= 0.01


def test_float32_answers_as_torch_does(report: OptimisationReport) -> None:
    made, inputs = network(), data(1)[0]
    opened = backend(FP32).open(report.candidates[0].artefact, 1)
    outputs = opened(inputs)
    with torch.inference_mode():
        assert np.allclose(outputs, made(torch.from_numpy(inputs)).numpy(), atol=1e-4)
    assert np.allclose(opened(inputs[:1]), outputs[:1], atol=1e-5), "any batch size"


def test_the_smallest_that_fits_is_chosen_and_the_reason_given(report: OptimisationReport) -> None:
    fit = [one for one in report.candidates if not one.problems]
    assert report.chosen is min(fit, key=lambda one: one.size)
    assert report.chosen.name in report.reason
    assert json.loads(json.dumps(report.as_json()))["chosen"] == report.chosen.name


def ready(report: OptimisationReport) -> list[Ready]:
    return [Ready(one.backend, one.artefact) for one in report.candidates[:2]]


@pytest.mark.parametrize(
    "limit", [{"flash_kb": 8}, {"ram_mb": 1}, {"latency_ms": 1e-6}], ids=lambda limit: next(iter(limit))
)
def test_what_does_not_fit_the_device_is_not_chosen(
    report: OptimisationReport, limit: dict[str, float]
) -> None:
    with pytest.raises(NoCandidate) as caught:
        run(network(), msgspec.structs.replace(ROOMY, **limit), backends=ready(report))
    assert all(len(one.problems) == 1 for one in caught.value.report.candidates)


def test_a_drop_above_a_point_is_refused_unless_allowed(report: OptimisationReport) -> None:
    """The artefact is a network's whose last layer is half of what it was."""
    worse = network(0.5)
    worse[-1].weight.copy_(worse[-1].weight * torch.linspace(-1, 1, worse[-1].weight.shape[1]))
    bad = Ready(INT8, export_fp32(worse, data(2)[0]))
    good = ready(report)[0]
    found = run(network(), ROOMY, backends=[good, bad])
    assert found.chosen is found.candidates[0], "the other one is smaller and was refused"
    assert found.candidates[1].size < found.candidates[0].size
    assert found.candidates[1].accuracy_drop > 0.01
    assert "points lost" in found.candidates[1].problems[0]
    allowed = run(network(), ROOMY, backends=[good, bad], max_drop=1.0)
    assert allowed.chosen is allowed.candidates[1]


def test_held_out_data_is_held_out() -> None:
    inputs, labels = data(1)
    with pytest.raises(ValueError, match="keep the two apart"):
        optimise(network(), ROOMY, inputs=inputs, labels=labels, calibration=inputs[:20])
    with pytest.raises(ValueError, match="the full one"):
        run({0.5: network(0.5)}, ROOMY)


def test_an_unknown_backend_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownBackend, match="onnx-int8"):
        run(network(), DeviceProfile(name="x", ram_mb=1, flash_kb=1, latency_ms=1, backends=("tpu",)))
    with pytest.raises(BlindsumError):
        backend(FP32).open(b"not a graph", 1)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("name = 'x'", "ram_mb"),
        ("name = 'x'\nram_mb = -1\nflash_kb = 1\nlatency_ms = 1", "ram_mb"),
        ("name = 'x'\nram_mb = 1\nflash_kb = 1\nlatency_ms = 1\nram = 2", "ram"),
        ("name", "TOML"),
    ],
)
def test_profiles_are_strict(tmp_path: Path, text: str, fault: str) -> None:
    (tmp_path / "pi4.toml").write_text(text)
    with pytest.raises(ProfileRefused, match=fault):
        read_profile(tmp_path / "pi4.toml")


def test_weights_come_back_as_they_were() -> None:
    state = network().state_dict()
    found = unpack_weights(pack_weights(state))
    assert all(np.array_equal(found[name], value.numpy()) for name, value in state.items())
    assert pack_weights(state) == pack_weights(dict(reversed(state.items())))
    with pytest.raises(BlindsumError):
        unpack_weights(b"no weights")


ON_THE_DEVICE = (
    NO_TORCH
    + """
import numpy as np
from blindsum.client.devices import DeviceModel
from blindsum.client.devices.model_exchange import trust_in
from blindsum.client.federation_view import FederationView

with FederationView.open(sys.argv[1], fetch=False) as view:
    model = DeviceModel.load(sys.argv[2], trust_in(view, "clinic"), at_least=1, name="bright")
print(model.version, *(model.probabilities(np.load(sys.argv[3]))[:, 1] > 0.5).astype(int))
assert "torch" not in sys.modules
"""
)


@pytest.fixture(scope="module")
def federation() -> Iterator[Federation]:
    with Federation(["hospital", "clinic", "other"]) as made:
        yield made


def test_from_the_command_line_to_a_device_without_torch(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blindsum.client.devices.commands import model_app, optimize_app  # noqa: PLC0415

    def command(app: Any, *words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    hospital, clinic = federation.path("hospital"), federation.path("clinic")
    np.savez(
        tmp_path / "weights.npz", **{name: value.numpy() for name, value in network().state_dict().items()}
    )
    command(
        model_app, "publish", hospital, tmp_path / "weights.npz", "--name", "bright", "--version", 1,
        "--network", "small_networks:of_weights", "--training", "least squares on 200 images",
    )  # fmt: skip
    command(model_app, "fetch", clinic, "hospital", "bright", "--out", tmp_path / "bright.model")
    (inputs, labels), (calibration, _) = data(1), data(2)
    np.savez(tmp_path / "local.npz", inputs=inputs, labels=labels, calibration=calibration)
    (tmp_path / "pi4.toml").write_text(
        'name = "Raspberry Pi 4"\nram_mb = 2000\nflash_kb = 200\nlatency_ms = 5000\n'
    )
    told = command(
        optimize_app, tmp_path / "bright.model", "--member", clinic, "--publisher", "hospital",
        "--profile", tmp_path / "pi4.toml", "--network", "small_networks:of_weights",
        "--data", tmp_path / "local.npz", "--out", tmp_path / "device.model", "--json",
    )  # fmt: skip
    assert json.loads(told)["chosen"].endswith(INT8)
    shown = json.loads(command(model_app, "show", clinic, tmp_path / "device.model", "--publisher", "clinic"))
    assert shown["optimised"]["accuracy_drop"] <= 0.01
    assert len(shown["provenance"]["parents"]) == 1
    np.save(tmp_path / "images.npy", inputs)
    answer = subprocess.run(
        [sys.executable, "-c", ON_THE_DEVICE, clinic, tmp_path / "device.model", tmp_path / "images.npy"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert answer[0] == "1"
    assert np.mean(np.array(answer[1:], int) == labels) > 0.9
    data_of_device = bytearray((tmp_path / "device.model").read_bytes())
    data_of_device[len(data_of_device) // 2] ^= 1
    (tmp_path / "changed.model").write_bytes(data_of_device)
    changed = subprocess.run(
        [sys.executable, "-c", ON_THE_DEVICE, clinic, tmp_path / "changed.model", tmp_path / "images.npy"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert changed.returncode != 0
    assert "OpeningFailed" in changed.stderr
