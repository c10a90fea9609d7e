"""`blindsum bench all`: every scheme, and the plaintext, on the same vectors, members and machine."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

from blindsum.bench.federation_round import Progress, within
from blindsum.bench.federation_setup import Work
from blindsum.bench.figures_output import seconds, show_table
from blindsum.bench.he_frames import bench_he
from blindsum.bench.machine import machine, versions
from blindsum.bench.masking_round import bench_masking
from blindsum.bench.plain_round import bench_plain
from blindsum.crypto.trust.policy import SchemeName
from rich.console import Console

KEPT = (
    "scheme",
    "parameters",
    "members",
    "dim",
    "runs",
    "member_cpu_s",
    "aggregator_cpu_s",
    "member_open_cpu_s",
    "bytes_up_per_param",
    "bytes_down_per_param",
    "member_peak_bytes",
    "aggregator_peak_bytes",
    "exact",
    "trust",
)
"""Keys of a scheme's own figures that stand in the comparison."""

SCALED = ("member_cpu_s", "aggregator_cpu_s", "member_open_cpu_s")


def round_seconds(entry: dict[str, Any], megabits_per_s: float) -> float:
    """A whole round at a member's bandwidth each way: upload, server, download, opening, in turn.

    CPU on one core; all members at the same time; training, latency and waiting for the slowest aren't in.
    """
    bits = 8 * entry["dim"] * (entry["bytes_up_per_param"] + entry["bytes_down_per_param"])
    work = entry["member_cpu_s"] + entry["aggregator_cpu_s"] + entry["member_open_cpu_s"]
    return float(work + bits / (megabits_per_s * 1e6))


def bench_all(
    work: Work,
    sizes: Sequence[int],
    bandwidths: Sequence[float],
    runs: int,
    threads: int,
    paillier_max: int,
    progress: Progress,
) -> dict[str, Any]:
    """The comparison. Above `paillier_max` parameters paillier is scaled up from there, and says so."""
    results: list[dict[str, Any]] = []
    trust: dict[str, str] = {}
    for size in sorted(sizes):
        entry = bench_plain(replace(work, dimension=size), runs)
        trust["plaintext"] = entry.pop("trust")
        results.append(entry | {"estimated": False})
        for name in get_args(SchemeName):
            this = replace(work, scheme=name, dimension=size)
            report = within(progress, f"{name}, {size:,} parameters")
            if name == "paillier" and size > paillier_max:
                results.append(
                    _scaled(results, name, size) or _measured(this, runs, threads, report, paillier_max)
                )
            else:
                results.append(_measured(this, runs, threads, report, size))
    for entry in results:
        if "trust" in entry:
            trust[entry["scheme"]] = entry.pop("trust")
        entry["round_s"] = {f"{one:g}": round_seconds(entry, one) for one in bandwidths}
    return {
        "members": work.members,
        "bits": work.bits,
        "n_max": work.n_max,
        "runs": runs,
        "threads": threads,
        "sizes": sorted(sizes),
        "bandwidths_mbit_per_s": list(bandwidths),
        "results": results,
        "trust": trust,
        "machine": machine(),
        "versions": versions(),
    }


def _measured(work: Work, runs: int, threads: int, progress: Progress, size: int) -> dict[str, Any]:
    measured = replace(work, dimension=size)
    if work.scheme == "masking":
        figures = bench_masking(measured, runs, threads, None, progress)
        figures["parameters"] = f"k {figures['neighbours']}, t {figures['shares']}"
    else:
        figures = bench_he(measured, runs, threads, False, progress)
    entry = {key: figures[key] for key in KEPT} | {"estimated": False}
    return entry if size == work.dimension else _scale(entry, work.dimension)


def _scaled(results: Sequence[dict[str, Any]], name: str, size: int) -> dict[str, Any] | None:
    measured = [one for one in results if one["scheme"] == name and not one["estimated"]]
    return _scale(measured[-1], size) if measured else None


def _scale(entry: dict[str, Any], size: int) -> dict[str, Any]:
    factor = size / entry["dim"]
    scaled = entry | {key: entry[key] * factor for key in SCALED}
    return scaled | {
        "dim": size,
        "estimated": True,
        "measured_dim": entry["dim"],
        "member_peak_bytes": None,
        "aggregator_peak_bytes": None,
    }


def show_all(figures: dict[str, Any], console: Console) -> None:
    """The comparison as a table."""
    shown = figures["bandwidths_mbit_per_s"]
    for dimension in figures["sizes"]:
        show_table(
            f"{dimension:,} parameters, {figures['members']} members, {figures['bits']} bits, least of "
            f"{figures['runs']} runs",
            (
                "",
                "up, B/param",
                "down",
                "member CPU",
                "server CPU",
                "opening",
                *(f"{one:g} Mbit/s" for one in shown),
                "exact",
            ),
            [
                (
                    one["scheme"] + ("*" if one["estimated"] else ""),
                    f"{one['bytes_up_per_param']:.2f}",
                    f"{one['bytes_down_per_param']:.2f}",
                    seconds(one["member_cpu_s"]),
                    seconds(one["aggregator_cpu_s"]),
                    seconds(one["member_open_cpu_s"]),
                    *(seconds(one["round_s"][f"{bandwidth:g}"]) for bandwidth in shown),
                    "yes" if one["exact"] else "no",
                )
                for one in figures["results"]
                if one["dim"] == dimension
            ],
            console,
        )
    console.print("Mbit/s: a whole round at a member's bandwidth. *: scaled up from a smaller model.")
    for name, line in figures["trust"].items():
        console.print(f"[bold]{name}[/bold]: {line}")
