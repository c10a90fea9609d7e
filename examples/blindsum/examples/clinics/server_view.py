"""What the server saw: the capture and the server's files, searched for what members hold.

Members of the demo keep a witness of each round in their own folders (`Member.open(..., witness=True)`): the
update, the integer fields that were encoded from it, and the opened sum. The exactness check and the leak
scan read them after the last round; a real member keeps none.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blindsum.aggregator.capture import RECEIVED, read_capture
from blindsum.client.leak_scan import (
    Needle,
    Scanner,
    integer_needles,
    key_needles,
    strongest_correlation,
    vector_needles,
)
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.examples.clinics.outcome import LeakScan
from blindsum.proto.v1 import round_pb2
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

PICTURE_SIDE = 64

_LATTICE_SECRET_BYTES = 1056
_LATTICE_NONCE_BYTES = 32
"""A bfv or ckks secret key is the nonce that its public key has too, then the ternary secret."""


@dataclass(frozen=True)
class Witness:
    """What one member kept of one round."""

    member: str
    round: int
    update: NDArray[np.float32]
    fields: NDArray[np.uint32]
    summed: NDArray[np.uint64]
    survivors: tuple[str, ...]


def read_witness(member: str, folder: Path, number: int) -> Witness | None:
    """The witness of a round in a member's folder; None if it has none."""
    path = folder / "witness" / f"round-{number:06d}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as data:
        survivors = tuple(str(name) for name in data["survivors"])
        return Witness(member, number, data["update"], data["fields"], data["summed"], survivors)


def sums_are_exact(witnesses: Sequence[Witness]) -> bool:
    """Whether all members opened the same sum in a round, and it is the survivors' plain sum, bit for bit."""
    if not witnesses:
        return False
    found = {one.member: one for one in witnesses}
    survivors = witnesses[0].survivors
    if not set(survivors) <= set(found):
        return False
    total = np.zeros(len(witnesses[0].fields), np.uint64)
    for member in survivors:
        total += found[member].fields
    return all(one.survivors == survivors and np.array_equal(one.summed, total) for one in witnesses)


@dataclass(frozen=True)
class CapturedUpload:
    """One bulk upload, put together from its captured chunks."""

    member: str
    round: int
    kind: int
    data: bytes


def captured_uploads(capture: Path) -> Iterator[CapturedUpload]:
    """Every bulk upload in a capture."""
    begun: dict[bytes, round_pb2.BeginUploadRequest] = {}
    for path in sorted(capture.glob("*-BeginUpload-*.capture")):
        messages = list(read_capture(path))
        if len(messages) == 2:
            answer = round_pb2.BeginUploadResponse.FromString(messages[1][1])
            begun[answer.slot.upload_id] = round_pb2.BeginUploadRequest.FromString(messages[0][1])
    for path in sorted(capture.glob("*-Upload-*.capture")):
        chunks: dict[int, bytes] = {}
        upload = b""
        for direction, data in read_capture(path):
            if direction == RECEIVED:
                request = round_pb2.UploadRequest.FromString(data)
                chunks[request.offset], upload = request.data, request.upload_id
        if upload in begun:
            member = path.stem.split("-", 2)[2]
            asked = begun[upload]
            payload = b"".join(chunks[offset] for offset in sorted(chunks))
            yield CapturedUpload(member, asked.round, asked.kind, payload)


def received_bytes(capture: Path) -> tuple[int, int]:
    """Serialised bytes that members sent in rounds, and those of sealed checkpoints among them."""
    total = checkpoints = 0
    for path in capture.glob("*.capture"):
        if path.stem.endswith("-anyone"):
            continue
        total += sum(len(data) for direction, data in read_capture(path) if direction == RECEIVED)
    for upload in captured_uploads(capture):
        if upload.kind == round_pb2.BULK_KIND_CHECKPOINT:
            checkpoints += len(upload.data)
    return total, checkpoints


def secrets_in(folders: Iterable[Path]) -> dict[str, bytes]:
    """Every key, invitation and training state in files below these folders, by its place."""
    return {
        f"{path.parent.parent.name}/{path.parent.name}/{path.name}": _secret_part(path)
        for folder in folders
        for pattern in ("*.key", "invitations/*.json", "state-*.bin")
        for path in sorted(folder.rglob(pattern))
    }


def _secret_part(path: Path) -> bytes:
    """What is secret in a file: not the frame that all PEM keys share, nor the nonce that names an HE key."""
    data = path.read_bytes()
    if path.name.startswith("he-") and len(data) == _LATTICE_SECRET_BYTES:
        return data[_LATTICE_NONCE_BYTES:]
    if not data.startswith(b"-----BEGIN"):
        return data
    key = serialization.load_pem_private_key(data, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.private_numbers().private_value.to_bytes(32, "big")


def _needles(witnesses: Iterable[Witness], secrets: dict[str, bytes], lanes: LaneLayout) -> list[Needle]:
    needles: list[Needle] = []
    for witness in witnesses:
        name = f"{witness.member} round {witness.round}"
        needles += vector_needles(f"{name} update", witness.update)
        needles += integer_needles(f"{name} quantised update", witness.fields)
        needles.append(Needle(f"{name} packed lanes", lanes.pack(witness.fields).tobytes()))
    for name, secret in secrets.items():
        needles += key_needles(name, secret)
    return needles


def scan_server(
    *,
    capture: Path,
    server_data: Path,
    server_logs: Path,
    witnesses: Sequence[Witness],
    secrets: dict[str, bytes],
    bits: int,
    n_max: int,
    shown: Witness,
) -> LeakScan:
    """Search all that the server received, returned, stored and logged for all that members hold.

    `shown` is the witness whose captured upload is correlated with its update and drawn. The positive
    control always runs: the same search over its packed but unprotected upload, its update and a key, and
    the same correlation.
    """
    lanes = LaneLayout.for_cohort(bits, n_max)
    widths = [(lanes.guard_bits, lanes.field_bits, lanes.fields_per_lane)]
    needles = _needles(witnesses, secrets, lanes)
    scanner = Scanner(needles, windows=64)

    uploads = list(captured_uploads(capture))
    payload = next(
        upload.data
        for upload in uploads
        if (upload.member, upload.round, upload.kind)
        == (shown.member, shown.round, round_pb2.BULK_KIND_CONTRIBUTION)
    )
    control = lanes.pack(shown.fields).tobytes()
    first_key = next((needle for needle in needles if needle.name.endswith("(base64)")), None)
    leaked = control + shown.update.tobytes() + (first_key.data if first_key else b"")
    control_hits = [hit.needle for hit in scanner.search("control", leaked)]
    control_correlation = strongest_correlation("control", control, shown.update, widths)
    wire = strongest_correlation("wire", payload, shown.update, widths)

    hits: list[str] = []
    files = size = 0
    for place, root in (("capture", capture), ("server data", server_data), ("server logs", server_logs)):
        found, count, read = scanner.search_files(root)
        hits += [f"{hit.needle} in {place}/{hit.place}" for hit in found]
        files += count
        size += read
    for upload in uploads:
        place = f"upload of {upload.member} in round {upload.round}"
        hits += [f"{hit.needle} in {place}" for hit in scanner.search(place, upload.data)]
    if wire.suspicious:
        hits.append(f"correlation {wire.value:.3f} of the captured upload as {wire.decoding}")

    pixels = PICTURE_SIDE**2
    low, high = np.quantile(shown.update, (0.02, 0.98))
    update = np.clip(np.resize(shown.update, pixels), low, high)
    words = np.resize(np.frombuffer(payload[: len(payload) // 4 * 4], "<u4"), pixels)
    return LeakScan(
        searched=scanner.names,
        places=["captured messages", "server data", "server logs"],
        files=files,
        bytes=size,
        hits=hits,
        control_hits=control_hits,
        correlation_update=control_correlation.value,
        correlation_wire=wire.value,
        correlation_chance=float(wire.chance),
        payloads=len(uploads),
        update_picture=update.reshape(PICTURE_SIDE, PICTURE_SIDE).astype(float).tolist(),
        wire_picture=words.reshape(PICTURE_SIDE, PICTURE_SIDE).astype(float).tolist(),
    )
