"""What the server saw: scans the capture and the server's files for what members hold.

Members of the demo keep a witness of each round in their own folders (`Member.open(..., witness=True)`):
the update, the integer fields that were encoded from it, and the opened sum. The exactness check and the
leak scan read it after the last round; a real member keeps none.
"""

from collections.abc import Iterable, Iterator
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
from numpy.typing import NDArray

PICTURE_SIDE = 64


@dataclass(frozen=True)
class Witness:
    """What one member kept of one round."""

    member: str
    round: int
    update: NDArray[np.float32]
    fields: NDArray[np.uint32]
    summed: NDArray[np.uint64]
    survivors: tuple[str, ...]


def read_witness(member: str, path: Path) -> Witness:
    """The witness in `round-<number>.npz`."""
    with np.load(path, allow_pickle=False) as data:
        return Witness(
            member,
            int(data["round"]),
            data["update"],
            data["fields"],
            data["summed"],
            tuple(str(name) for name in data["survivors"]),
        )


def exact_rounds(witnesses: dict[str, Path], rounds: Iterable[int]) -> tuple[int, bool]:
    """Rounds compared, and whether each opened sum equals the plain sum of the survivors' fields.

    `witnesses` maps each member to its folder of witnesses. A round without any witness isn't compared;
    a survivor without one makes the result False.
    """
    compared, exact = 0, True
    for number in rounds:
        found = {
            member: read_witness(member, path)
            for member, folder in witnesses.items()
            if (path := folder / f"round-{number:06d}.npz").exists()
        }
        if not found:
            continue
        compared += 1
        survivors = next(iter(found.values())).survivors
        if not set(survivors) <= set(found):
            exact = False
            continue
        total = np.zeros(len(found[survivors[0]].fields), np.uint64)
        for member in survivors:
            total += found[member].fields
        for witness in found.values():
            exact &= witness.survivors == survivors and bool(np.array_equal(witness.summed, total))
    return compared, exact and compared > 0


def captured_uploads(capture: Path) -> Iterator[tuple[str, bytes]]:
    """Every bulk upload in a capture, put together from its chunks: (file name, bytes)."""
    for path in sorted(capture.glob("*-Upload.capture")):
        chunks: dict[int, bytes] = {}
        for direction, data in read_capture(path):
            if direction == RECEIVED:
                request = round_pb2.UploadRequest.FromString(data)
                chunks[request.offset] = request.data
        yield path.name, b"".join(chunks[offset] for offset in sorted(chunks))


def _needles(witnesses: Iterable[Witness], secrets: dict[str, bytes], n_max: int, bits: int) -> list[Needle]:
    lanes = LaneLayout.for_cohort(bits, n_max)
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
    witnesses: list[Witness],
    secrets: dict[str, bytes],
    bits: int,
    n_max: int,
    upload_of: tuple[Witness, bytes],
) -> LeakScan:
    """Search all that the server received, returned, stored and logged for all that members hold.

    `upload_of` is one witness with the captured upload of the same member and round, for the pictures and
    the correlation. The positive control, the same search over that member's packed but unprotected
    upload, always runs.
    """
    lanes = LaneLayout.for_cohort(bits, n_max)
    widths = [(lanes.guard_bits, lanes.field_bits, lanes.fields_per_lane)]
    needles = _needles(witnesses, secrets, n_max, bits)
    scanner = Scanner(needles)

    witness, payload = upload_of
    control = lanes.pack(witness.fields).tobytes()
    control_hits = [hit.needle for hit in scanner.search("control", control)]
    control_correlation = strongest_correlation("control", control, witness.update, widths)
    wire = strongest_correlation("wire", payload, witness.update, widths)

    hits: list[str] = []
    files = size = 0
    for place, root in (("capture", capture), ("server data", server_data), ("server logs", server_logs)):
        found, count, read = scanner.search_files(root)
        hits += [f"{hit.needle} in {place}/{hit.place}" for hit in found]
        files += count
        size += read
    payloads = 0
    for name, data in captured_uploads(capture):
        payloads += 1
        hits += [f"{hit.needle} in upload {name}" for hit in scanner.search(name, data)]
    if wire.suspicious:
        hits.append(f"correlation {wire.value:.3f} of the captured upload as {wire.decoding}")

    pixels = PICTURE_SIDE**2
    shown = np.clip(witness.update[:pixels], *np.quantile(witness.update, (0.01, 0.99)))
    words = np.frombuffer(payload, np.uint8)[: 4 * pixels].view("<u4")[:pixels]
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
        payloads=payloads,
        update_picture=shown.reshape(PICTURE_SIDE, PICTURE_SIDE).astype(float).tolist(),
        wire_picture=words.reshape(PICTURE_SIDE, PICTURE_SIDE).astype(float).tolist(),
    )
