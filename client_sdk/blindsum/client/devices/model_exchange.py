"""Published models by way of the aggregator, which stores and relays them as they are.

A member remembers the newest version of each model that it fetched, in its folder: no aggregator can bring
back an older one, or show another model under the same version.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blindsum.client.devices.published_model import (
    MAX_MODEL_BYTES,
    ModelRefused,
    ModelTrust,
    open_model,
)
from blindsum.client.federation_view import FederationView
from blindsum.client.private_files import read_private, write_private
from blindsum.client.transport import CHUNK_BYTES
from blindsum.crypto.canonical import Message, decode_message, encode_message
from blindsum.crypto.trust.documents import Count, Digest
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

    Raises `ModelRefused` when there is none, or none as new as `at_least` and as what was fetched before, and
    what `open_model` raises.
    """
    view.roster.entry(publisher)
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
    seen = _seen(view, publisher, name)
    trust = trust_in(view, publisher)
    manifest = open_model(data, trust, at_least=max(at_least, seen.version), name=name).manifest
    if manifest.version != newest.version:
        raise ModelRefused(
            f"the aggregator sent version {manifest.version} of {name} as version {newest.version}"
        )
    if manifest.version == seen.version and manifest.digest != seen.digest:
        raise ModelRefused(
            f"{publisher} signed two models as version {seen.version} of {name}, and another one was fetched "
            "before; ask for a newer version"
        )
    if manifest.version > seen.version:
        newer = _Seen(manifest.version, manifest.digest)
        write_private(_seen_path(view, publisher, name), encode_message(newer))
    return data


class _Seen(Message, frozen=True):
    version: Count
    digest: Digest


def _seen(view: FederationView, publisher: str, name: str) -> _Seen:
    """The newest version that was fetched before."""
    path = _seen_path(view, publisher, name)
    if not path.exists():
        return _Seen(0, bytes(32))
    return decode_message(read_private(path), _Seen, "the mark of a model")


def _seen_path(view: FederationView, publisher: str, name: str) -> Path:
    return view.path / f"model-{publisher}.{name}.bin"


def trust_in(view: FederationView, *publishers: str) -> ModelTrust:
    """Trust in these members' models, by the roster, policy and group key of the view."""
    return ModelTrust.of(view.roster, view.policy, *publishers, group_key=view.group_key)
