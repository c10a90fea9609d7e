"""The hospital's model on devices: published, fetched, made to fit, signed, and loaded without torch.

Candidates are measured and chosen on validation images; what the table shows was then measured once on the
test images with the artefacts as they are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from blindsum.client.devices import (
    DeviceModel,
    DeviceProfile,
    ModelManifest,
    OptimisationReport,
    Optimised,
    Provenance,
    manifest_for,
    open_model,
    optimise,
    pack_weights,
    publish,
    torch_state,
    unpack_weights,
    write_model,
)
from blindsum.client.devices.backends import backend
from blindsum.client.devices.model_exchange import fetch_model, send_model, trust_in
from blindsum.client.devices.optimising import balanced_accuracy as balanced
from blindsum.client.devices.weights import WEIGHTS
from blindsum.client.federation_view import FederationView
from blindsum.examples.clinics.model import RadiographNet
from blindsum.examples.clinics.sites import HOSPITAL, Images, load_site, load_test, load_tuning
from torch import Tensor

MODEL: Final = "radiograph"
NETWORK: Final = "blindsum.examples.clinics.device_models:network_of"
CALIBRATION: Final = 256
PROFILE: Final = DeviceProfile(name="a small board", ram_mb=512, flash_kb=256, latency_ms=50)

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class DeviceRow:
    """One artefact. `bytes` and `fp32_bytes` are sizes, `accuracy_drop` a fraction of 1 on the test images
    against the network in torch, `latency_us` the median of one answer in a process without torch.
    """

    model: str
    backend: str
    bytes: int
    fp32_bytes: int
    accuracy_drop: float
    latency_us: float

    def as_json(self) -> dict[str, Any]:
        """The figures under the names of the report's `devices`."""
        return {
            "model": self.model,
            "backend": self.backend,
            "bytes": self.bytes,
            "fp32_bytes": self.fp32_bytes,
            "accuracy_drop": self.accuracy_drop,
            "latency_us": self.latency_us,
        }


@dataclass(frozen=True)
class DeviceOutcome:
    """What came out: the table, the optimiser's report, and the signed artefact's file and manifest."""

    rows: tuple[DeviceRow, ...]
    report: OptimisationReport
    file: Path
    manifest: ModelManifest

    def as_json(self) -> list[dict[str, Any]]:
        """The report's `devices`."""
        return [row.as_json() for row in self.rows]


def network_of(weights: State) -> RadiographNet:
    """The clinics' network with these weights: what `blindsum optimize --network` is given."""
    model = RadiographNet()
    model.load_state_dict(dict(weights))
    return model


def publish_hospital_model(state: State, number: int, view: FederationView, training: str) -> ModelManifest:
    """The hospital signs version `number` of its model, seals it to the members and leaves it at the
    aggregator.
    """
    artefact = pack_weights(dict(state))
    manifest = manifest_for(
        artefact,
        federation=view.roster.federation,
        publisher=view.name,
        name=MODEL,
        version=number,
        created=int(time.time()),
        kind=WEIGHTS,
        provenance=Provenance(
            training=training,
            network=NETWORK,
            made_with={name: version(name) for name in ("torch", "safetensors")},
        ),
    )
    send_model(view, publish(manifest, artefact, view.identity, group_key=view.group_key))
    return manifest


def device_models(
    folders: Mapping[str, Path],
    *,
    seed: int,
    work: Path,
    site: str = "clinic-1",
    number: int = 1,
    profile: DeviceProfile = PROFILE,
    calibration: Images | None = None,
) -> DeviceOutcome:
    """A site fetches version `number` or newer of the hospital's model, optimises it for a device, signs the
    artefact, and loads it as a device would.

    `folders` are members' folders by site, connected to a running aggregator at which the hospital has
    published. The artefact is written to `work`. Raises what fetching, opening and optimising raise.
    """
    with FederationView.open(folders[site]) as view:
        published = open_model(
            fetch_model(view, HOSPITAL, MODEL, at_least=number), trust_in(view, HOSPITAL), at_least=number
        )
        network = network_of(torch_state(unpack_weights(published.artefact)))
        images = load_tuning(site, seed)
        local = (calibration or load_site(site, seed).train).pixels[:CALIBRATION]
        report = optimise(network, profile, inputs=images.pixels, labels=images.labels, calibration=local)
        chosen = report.chosen
        assert chosen is not None
        manifest = manifest_for(
            chosen.artefact,
            federation=view.roster.federation,
            publisher=view.name,
            name=MODEL,
            version=published.manifest.version,
            created=int(time.time()),
            kind=chosen.backend,
            provenance=Provenance(
                training=f"optimised from {HOSPITAL}'s model",
                network=NETWORK,
                parents=(published.manifest.digest,),
                made_with={name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
            ),
            optimised=Optimised(
                profile=profile.name,
                candidate=chosen.name,
                backend=chosen.backend,
                accuracy=chosen.accuracy,
                accuracy_drop=chosen.accuracy_drop,
                latency_us=chosen.latency_us,
                held_out=report.held_out,
            ),
        )
        file = work / f"{MODEL}-{manifest.version}.model"
        write_model(file, publish(manifest, chosen.artefact, view.identity, group_key=view.group_key))
        DeviceModel.load(file, trust_in(view, site), at_least=number, name=MODEL)
    return DeviceOutcome(_rows(network, report, load_test(site, seed)), report, file, manifest)


def _rows(network: RadiographNet, report: OptimisationReport, images: Images) -> tuple[DeviceRow, ...]:
    network.eval()
    with torch.inference_mode():
        parts = [network(part) for part in torch.split(torch.from_numpy(images.pixels), 128)]
    reference = balanced(torch.cat(parts).numpy(), images.labels)
    rows = []
    for one in report.candidates:
        outputs = backend(one.backend).open(one.artefact, 1)(images.pixels)
        rows.append(
            DeviceRow(
                model=f"{MODEL}, {sum(value.numel() for value in network.parameters()):,} parameters",
                backend=one.backend,
                bytes=one.size,
                fp32_bytes=one.fp32_bytes,
                accuracy_drop=reference - balanced(outputs, images.labels),
                latency_us=one.latency_us,
            )
        )
    return tuple(rows)
