"""Published models by way of the aggregator, which stores and relays them as they are."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from blindsum.client.devices.published_model import (
    MAX_MODEL_BYTES,
    ModelRefused,
    ModelTrust,
    PublishedModel,
    open_model,
)
from blindsum.client.federation_view import FederationView
from blindsum.client.transport import CHUNK_BYTES
from blindsum.proto.v1 import models_pb2 as wire
from blindsum.proto.v1.models_pb2_grpc import ModelServiceStub


@dataclass(frozen=True)
class Listed:
    """A version that the aggregator has. What it says is checked when the model is opened."""

    publisher: str
    name: str
    version: int
    total: int
    digest: bytes


def send_model(view: FederationView, data: bytes) -> None:
    """Leave a published model (what `publish` made) at the aggregator under this member's name.

    Idempotent. Raises `ModelRefused` for a model that this member didn't sign, `Refused` (conflict) when a
    newer version is there, `Unreachable`.
    """
    manifest = open_model(data, trust_in(view, view.name)).manifest
    stub = ModelServiceStub(view.line.channel)
    start = wire.PublishModelStart(
        name=manifest.name,
        version=manifest.version,
        total=len(data),
        digest=hashlib.sha256(data).digest(),
    )

    def parts() -> Iterator[wire.PublishModelRequest]:
        yield wire.PublishModelRequest(start=start)
        for begin in range(0, len(data), CHUNK_BYTES):
            yield wire.PublishModelRequest(data=data[begin : begin + CHUNK_BYTES])

    view.line.retry(lambda: stub.PublishModel(parts()), what="publishing a model")


def list_models(view: FederationView) -> list[Listed]:
    """The versions that the aggregator has. Raises `Refused`, `Unreachable`."""
    stub = ModelServiceStub(view.line.channel)
    answer = view.line.call(stub.ListModels, wire.ListModelsRequest(), what="listing models")
    return [Listed(item.publisher, item.name, item.version, item.total, item.digest) for item in answer.items]


def fetch_model(view: FederationView, publisher: str, name: str, *, at_least: int = 1) -> bytes:
    """The newest version of a member's model, verified; the bytes as they were published.

    Raises `ModelRefused` when there is none, or none as new as `at_least`, and what `open_model` raises.
    """
    found = [one for one in list_models(view) if (one.publisher, one.name) == (publisher, name)]
    if not found:
        raise ModelRefused(f"{publisher} has published no model {name!r}")
    newest = max(found, key=lambda one: one.version)
    if newest.total > MAX_MODEL_BYTES + (1 << 20):
        raise ModelRefused(f"{name} is said to have {newest.total} bytes, more than a model may have")
    stub = ModelServiceStub(view.line.channel)
    request = wire.GetModelRequest(publisher=publisher, name=name, version=newest.version)

    def fetch() -> bytes:
        data = bytearray()
        for part in stub.GetModel(request):
            data += part.data
            if len(data) > newest.total:
                raise ModelRefused(f"the aggregator sends more of {name} than it said")
        return bytes(data)

    data = view.line.retry(fetch, what="getting a model")
    opened: PublishedModel = open_model(data, trust_in(view, publisher), at_least=at_least, name=name)
    if opened.manifest.version != newest.version:
        raise ModelRefused(
            f"the aggregator sent version {opened.manifest.version} of {name} as version {newest.version}"
        )
    return data


def trust_in(view: FederationView, *publishers: str) -> ModelTrust:
    """Trust in these members' models, by the roster, policy and group key of the view."""
    return ModelTrust.of(view.roster, view.policy, *publishers, group_key=view.group_key)
