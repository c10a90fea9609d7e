"""Train in the cloud, infer at the edge: publish a model, make it fit each device, load it there verified."""

from blindsum.client.devices.backends import Backend, UnknownBackend
from blindsum.client.devices.device_model import DeviceModel
from blindsum.client.devices.device_profile import DeviceProfile, ProfileRefused, read_profile
from blindsum.client.devices.optimising import Candidate, NoCandidate, OptimisationReport, optimise
from blindsum.client.devices.published_model import (
    ModelManifest,
    ModelRefused,
    ModelTrust,
    Optimised,
    Provenance,
    PublishedModel,
    manifest_for,
    open_model,
    publish,
    read_model,
    write_model,
)
from blindsum.client.devices.weights import pack_weights, torch_state, unpack_weights

__all__ = [
    "Backend",
    "Candidate",
    "DeviceModel",
    "DeviceProfile",
    "ModelManifest",
    "ModelRefused",
    "ModelTrust",
    "NoCandidate",
    "OptimisationReport",
    "Optimised",
    "ProfileRefused",
    "Provenance",
    "PublishedModel",
    "UnknownBackend",
    "manifest_for",
    "open_model",
    "optimise",
    "pack_weights",
    "publish",
    "read_model",
    "read_profile",
    "torch_state",
    "unpack_weights",
    "write_model",
]
