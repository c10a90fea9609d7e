"""A model as it travels: its manifest, signed by the publisher, and its bytes, sealed to the members or open.

A published model is one file or blob:

    "blindsum model 1\\n" | length, head | length, signed manifest | artefact

The head says for which federation and group key epoch it is and whether what follows is sealed. Sealed, not
even the manifest can be read without the group key. Opening checks, in this order: the seal, the manifest's
signature under a publisher that the reader trusts, that it isn't older than what the reader had before,
and the artefact's digest. Needs neither torch nor onnxruntime.
"""

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from blindsum.client.private_files import write_private
from blindsum.crypto.canonical import Document, decode_document, encode_document
from blindsum.crypto.errors import BlindsumError, DocumentError, PolicyViolation, RefusalReason, Refused
from blindsum.crypto.primitives.derivation import Random, labelled, labelled_hash, same, system_random
from blindsum.crypto.primitives.sealing import open_stream, seal_stream
from blindsum.crypto.primitives.signing import SigningKey
from blindsum.crypto.trust.documents import (
    Count,
    Digest,
    MemberId,
    UnixTime,
    open_document,
    parse_signed,
    sign_document,
)
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.policy import Policy
from blindsum.crypto.trust.roster import Roster

KIND: Final = "model"
MAX_MODEL_BYTES: Final = 1 << 30
_MAGIC: Final = b"blindsum model 1\n"
_LENGTH: Final = struct.Struct("<I")
_MAX_HEAD: Final = 1024
_MAX_MANIFEST: Final = 1 << 16

Text = Annotated[str, msgspec.Meta(max_length=500)]
Version = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
Fraction = Annotated[float, msgspec.Meta(ge=-1, le=1)]


class ModelRefused(BlindsumError):
    """A published model that can't be used here; the text says why and what to do."""


class Provenance(Document, frozen=True, kw_only=True):
    """Where a model comes from, in the publisher's words.

    `training` says how it was trained and on what; `network` names the code that the weights belong to;
    `parents` are digests of the artefacts or training states that it was made from; `made_with` are
    versions of the tools; `measured` are figures that the publisher measured, by name.
    """

    training: Text
    network: Text
    parents: tuple[Digest, ...] = ()
    made_with: dict[str, Text] = {}
    measured: dict[str, float] = {}


class Optimised(Document, frozen=True, kw_only=True):
    """How an artefact was made from a model for a device, and what was measured when it was chosen.

    Accuracies are fractions of 1, `latency_us` is the median of one answer on the machine that measured.
    """

    profile: Text
    candidate: Text
    backend: Text
    accuracy: Fraction
    accuracy_drop: Fraction
    latency_us: float
    held_out: Count


class ModelManifest(Document, frozen=True, kw_only=True):
    """What a publisher signs. `digest` is SHA-256 of the artefact's bytes."""

    federation: Digest
    publisher: MemberId
    name: MemberId
    version: Version
    created: UnixTime
    artefact: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]{0,31}$")]
    digest: Digest
    size: Annotated[int, msgspec.Meta(gt=0, le=MAX_MODEL_BYTES)]
    provenance: Provenance
    optimised: Optimised | None = None


class _Head(Document, frozen=True, kw_only=True):
    federation: Digest
    epoch: Count
    audience: Literal["members", "open"]


@dataclass(frozen=True)
class ModelTrust:
    """Whose models are taken: the federation, trusted publishers' identity keys by name, the policy's word on
    open models, and the group key where sealed ones are to be opened.
    """

    federation: bytes
    publishers: Mapping[str, bytes]
    open_models: bool = False
    group_key: GroupKey | None = None

    @classmethod
    def of(
        cls, roster: Roster, policy: Policy, *publishers: str, group_key: GroupKey | None = None
    ) -> "ModelTrust":
        """Trust in these members of the roster. Raises `DocumentError` for one that isn't in it."""
        if not publishers:
            raise DocumentError("name the members whose models are to be trusted")
        keys = {name: roster.entry(name).identity for name in publishers}
        return cls(roster.federation, keys, policy.open_models, group_key)


@dataclass(frozen=True)
class PublishedModel:
    """An opened model: its verified manifest and the artefact's bytes."""

    manifest: ModelManifest
    artefact: bytes


def publish(
    manifest: ModelManifest,
    artefact: bytes,
    signer: SigningKey,
    *,
    group_key: GroupKey | None = None,
    policy: Policy | None = None,
    random: Random = system_random,
) -> bytes:
    """The model's bytes as they travel: sealed to the members with `group_key`, open without one.

    Raises `PolicyViolation` for an open model unless `policy` allows it, `ModelRefused` when the manifest
    is another artefact's.
    """
    if manifest.digest != hashlib.sha256(artefact).digest() or manifest.size != len(artefact):
        raise ModelRefused(f"the manifest of {manifest.name} is another artefact's; make it from these bytes")
    if group_key is None and (policy is None or not policy.open_models):
        raise PolicyViolation(
            "the policy doesn't allow open models: seal it to the members with the group key, or ask the "
            "owner to set open_models"
        )
    signed = sign_document(signer, KIND, manifest).to_bytes()
    content: tuple[bytes, ...] = (_LENGTH.pack(len(signed)), signed, artefact)
    epoch = 0 if group_key is None else group_key.epoch
    head = encode_document(
        _Head(
            federation=manifest.federation, epoch=epoch, audience="open" if group_key is None else "members"
        )
    )
    start = _MAGIC + _LENGTH.pack(len(head)) + head
    if group_key is not None:
        content = tuple(seal_stream(_key(group_key, manifest.federation), content, _bound(head), random))
    return b"".join((start, *content))


def open_model(
    data: bytes, trust: ModelTrust, *, at_least: int = 1, name: str | None = None
) -> PublishedModel:
    """The model in `data`, verified.

    `at_least` is the oldest version that is still taken: remember the newest one seen, so that nobody can
    bring back an old model. Raises `ModelRefused`, `DocumentError` (signature), `PolicyViolation` for an
    open model that the policy doesn't allow, `OpeningFailed` for a seal that doesn't open, `Refused`
    (malformed).
    """
    head_bytes, content = _parts(data)
    head = decode_document(head_bytes, _Head, "the head of a model")
    if head.federation != trust.federation:
        raise ModelRefused("this model is another federation's")
    if head.audience == "members":
        if trust.group_key is None:
            raise ModelRefused("this model is sealed to the members; open it with the group key")
        if trust.group_key.epoch != head.epoch:
            raise ModelRefused(
                f"this model is sealed under the group key of epoch {head.epoch}, and the one here is of "
                f"epoch {trust.group_key.epoch}; ask the publisher for a newer one"
            )
        key = _key(trust.group_key, head.federation)
        content = b"".join(open_stream(key, (content,), _bound(head_bytes)))
    elif not trust.open_models:
        raise PolicyViolation("this model is open, and the policy doesn't allow open models")
    signed_bytes, artefact = _split(content, _MAX_MANIFEST, "manifest")
    signed = parse_signed(signed_bytes)
    # The publisher's name stands in the manifest that it signs: read, then verify under its key.
    claimed = decode_document(signed.body, ModelManifest, "the model's manifest")
    publisher = trust.publishers.get(claimed.publisher)
    if publisher is None:
        raise ModelRefused(
            f"{claimed.publisher!r} isn't a trusted publisher here; trusted: {', '.join(trust.publishers)}"
        )
    try:
        manifest = open_document(signed, publisher, KIND, ModelManifest)
    except DocumentError:
        raise DocumentError(
            f"this model isn't signed by {claimed.publisher}, who is said to have published it; don't use it"
        ) from None
    if manifest.federation != trust.federation:
        raise ModelRefused("this model's manifest is another federation's")
    if name is not None and manifest.name != name:
        raise ModelRefused(f"this is the model {manifest.name!r}, not {name!r}")
    if manifest.version < at_least:
        raise ModelRefused(
            f"version {manifest.version} of {manifest.name} is older than version {at_least}, seen before"
        )
    if manifest.size != len(artefact) or not same(manifest.digest, hashlib.sha256(artefact).digest()):
        raise ModelRefused(f"the bytes of {manifest.name} aren't those that were signed; get the model again")
    return PublishedModel(manifest, artefact)


def manifest_for(
    artefact: bytes,
    *,
    federation: bytes,
    publisher: str,
    name: str,
    version: int,
    created: int,
    kind: str,
    provenance: Provenance,
    optimised: Optimised | None = None,
) -> ModelManifest:
    """The manifest of these bytes. `created` is in seconds since 1970; `kind` names the artefact's format."""
    return ModelManifest(
        federation=federation,
        publisher=publisher,
        name=name,
        version=version,
        created=created,
        artefact=kind,
        digest=hashlib.sha256(artefact).digest(),
        size=len(artefact),
        provenance=provenance,
        optimised=optimised,
    )


def read_model(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a published model's file. Raises `ModelRefused` if it is missing or too large."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_MODEL_BYTES + _MAX_MANIFEST:
            raise ModelRefused(f"{file} is larger than a model may be ({MAX_MODEL_BYTES} bytes)")
        return file.read_bytes()
    except OSError as error:
        raise ModelRefused(f"{file} can't be read: {error.strerror}") from None


def write_model(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a published model, whole or not at all, durable, mode 0600."""
    write_private(Path(path), data)


def _parts(data: bytes) -> tuple[bytes, bytes]:
    if not data.startswith(_MAGIC):
        raise Refused(RefusalReason.MALFORMED, "this isn't a published model")
    return _split(data[len(_MAGIC) :], _MAX_HEAD, "head")


def _split(data: bytes, limit: int, what: str) -> tuple[bytes, bytes]:
    if len(data) < _LENGTH.size:
        raise Refused(RefusalReason.MALFORMED, f"the published model ends before its {what}")
    (length,) = _LENGTH.unpack_from(data)
    end = _LENGTH.size + length
    if length > limit or end > len(data):
        raise Refused(RefusalReason.MALFORMED, f"the published model's {what} has an impossible length")
    return data[_LENGTH.size : end], data[end:]


def _key(group_key: GroupKey, federation: bytes) -> bytes:
    return group_key.model_key(labelled_hash("published model", federation))


def _bound(head: bytes) -> bytes:
    return labelled("published model", head)
