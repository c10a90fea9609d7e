"""Durable ingest over mutual TLS: what a server's CPU second takes in, beside a raw TLS receiver.

A real `blindsum serve` process on loopback and real masking members. Counted is the CPU of all server
processes from the first chunk until every upload is acknowledged, thus durable, and added to the sum:
TLS, gRPC, checksums, fsyncs, group commits and folding included. The round is then finished, and the
opened sum compared with what was sent.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blindsum.bench.figures_output import Report, show_table, size
from blindsum.bench.ingest_limits import PARTS, receiver_cpu_s
from blindsum.bench.ingest_members import BulkMember, Gates, found
from blindsum.bench.ingest_server import MeasuredServer, measured_server
from blindsum.bench.ingest_tls import raw_tls_cpu_s
from blindsum.bench.machine import machine, versions
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.errors import BlindsumError
from rich.console import Console

MB = 1_000_000
_PACKAGES = ("blindsum", "grpcio", "protobuf", "cryptography", "numpy")
_FOLD_LOOK_S = 0.002
_FOLD_PATIENCE_S = 120.0


def bench_ingest(
    sizes_mb: dict[int, int], at_once: int, directory: Path | None, progress: Report
) -> dict[str, Any]:
    """Figures of uploads of these sizes (MB: how many members send one); the worse of all counts."""
    figures: dict[str, Any] = {"at_once": at_once, "sizes": {}}
    raw: list[float] = []
    for megabytes, members in sizes_mb.items():
        progress("raw TLS", 0, 1)
        raw.append(_raw(members * megabytes))
        with tempfile.TemporaryDirectory(prefix="blindsum-", dir=directory) as folder:
            run = _one_size(Path(folder), megabytes, members, at_once, progress)
        figures["sizes"][str(megabytes)] = run | {
            "limits_mb_per_cpu_s": _limits(run, at_once, directory, progress)
        }
        raw.append(_raw(members * megabytes))
    raw.sort()
    runs = figures["sizes"].values()
    figures["mb_per_cpu_s"] = min(run["mb_per_cpu_s"] for run in runs)
    figures["raw_tls_mb_per_cpu_s"] = (raw[(len(raw) - 1) // 2] + raw[len(raw) // 2]) / 2
    figures["bare_grpc_mb_per_cpu_s"] = min(run["limits_mb_per_cpu_s"]["grpc"] for run in runs)
    figures["ratio"] = figures["mb_per_cpu_s"] / figures["raw_tls_mb_per_cpu_s"]
    figures["peak_rss_mb"] = max(run["peak_rss_mb"] for run in runs)
    figures["exact"] = all(run["exact"] for run in runs)
    return {**figures, "machine": machine(), "versions": versions(_PACKAGES)}


def _raw(megabytes: int) -> float:
    return megabytes / raw_tls_cpu_s(megabytes * MB)


def _limits(run: dict[str, Any], at_once: int, directory: Path | None, progress: Report) -> dict[str, float]:
    """What receivers of the same uploads take in that do nothing, then one part of the work more each."""
    limits = {}
    for done, part in enumerate(PARTS):
        progress(f"{run['upload_mb']:.0f} MB: a receiver up to {part}", done, len(PARTS))
        cpu = receiver_cpu_s(part, int(run["upload_mb"] * MB), run["uploads"], at_once, directory)
        limits[part] = run["uploads"] * run["upload_mb"] / cpu
    return limits


def _one_size(folder: Path, megabytes: int, members: int, at_once: int, progress: Report) -> dict[str, Any]:
    def telling(what: str) -> Callable[[int], None]:
        return lambda done: progress(f"{megabytes} MB: {what}", done, members)

    dimension = megabytes * MB // 8 * LaneLayout.for_cohort(16, max(16, members)).fields_per_lane
    with measured_server(folder / "server") as server, found(server, folder, members, dimension):
        gates = Gates(members, at_once)
        crowd = [BulkMember(folder / f"m{index}", index, gates) for index in range(members)]
        try:
            gates.wait_prepared(telling("masking"))
            wall, cpu = time.perf_counter(), server.cpu_s()
            gates.go()
            gates.wait_acknowledged(telling("uploading"))
            acknowledged, acknowledged_cpu = time.perf_counter() - wall, server.cpu_s() - cpu
            _wait_folded(server)
            cpu = server.cpu_s() - cpu
            folded = time.perf_counter() - wall
            peak = server.memory()
            gates.wait_published()
            expected = sum(member.value for member in crowd)
            exact = crowd[0].opened() == {expected}
        finally:
            for member in crowd:
                member.close()
    sent = members * gates.upload_bytes / MB
    return {
        "uploads": members,
        "upload_mb": gates.upload_bytes / MB,
        "mb_per_cpu_s": sent / cpu,
        "cpu_s": cpu,
        "cpu_s_until_acknowledged": acknowledged_cpu,
        "acknowledged_s": acknowledged,
        "folded_s": folded,
        "peak_rss_mb": peak / MB,
        "exact": exact,
    }


def _wait_folded(server: MeasuredServer) -> None:
    """Until no upload is left that isn't part of the sum; looks at its files, which costs it nothing."""
    limit = time.monotonic() + _FOLD_PATIENCE_S
    while any((server.blobs / "contribution").iterdir()):
        if time.monotonic() > limit:
            raise BlindsumError(
                "the uploads weren't folded; give a multiple of 16 members, the server's batch"
            )
        time.sleep(_FOLD_LOOK_S)


def show_ingest(figures: dict[str, Any], console: Console) -> None:
    """A table for people."""
    raw = figures["raw_tls_mb_per_cpu_s"]
    rows = [
        (
            f"{run['uploads']} x {run['upload_mb']:.0f} MB",
            f"{run['mb_per_cpu_s']:.0f}",
            f"{run['mb_per_cpu_s'] / raw:.2f}",
            f"{run['uploads'] * run['upload_mb'] / run['acknowledged_s']:.0f}",
            size(run["peak_rss_mb"] * MB),
            "yes" if run["exact"] else "NO",
        )
        for run in figures["sizes"].values()
    ]
    title = (
        f"Durable ingest over mutual TLS; raw TLS: {figures['raw_tls_mb_per_cpu_s']:.0f} MB per CPU second"
    )
    columns = ("uploads", "MB per CPU s", "of raw TLS", "MB per s", "peak memory", "sum exact")
    show_table(title, columns, rows, console)
    limits = [
        (
            f"{run['uploads']} x {run['upload_mb']:.0f} MB",
            *(f"{run['limits_mb_per_cpu_s'][part]:.0f}" for part in PARTS),
            f"{run['mb_per_cpu_s']:.0f}",
        )
        for run in figures["sizes"].values()
    ]
    show_table(
        "MB per CPU second of receivers that do this part and those before it",
        ("uploads", "gRPC alone", *(f"+ {part}" for part in PARTS[1:]), "the service"),
        limits,
        console,
    )
