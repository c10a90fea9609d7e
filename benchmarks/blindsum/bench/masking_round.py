"""`blindsum bench masking`: CPU, bytes and memory of a masking round, beside AES's limit and a peer."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from blindsum.bench import flower_peer
from blindsum.bench.aes_limit import Limit, measure_limit
from blindsum.bench.federation_round import Progress, RoundCost, run_round, within
from blindsum.bench.federation_setup import Federation, Work, found_federation
from blindsum.bench.figures_output import seconds, show_table, size
from blindsum.bench.machine import machine, versions
from blindsum.crypto.encoding.lanes import LaneLayout
from blindsum.crypto.schemes.masking.frames import bulk_layout
from blindsum.crypto.schemes.masking.thresholds import thresholds
from blindsum.crypto.schemes.registry import scheme
from rich.console import Console

STEPS = ("advertise", "share", "upload", "confirm", "reveal")


@dataclass(frozen=True)
class PeerRequest:
    """Runs Flower's SecAgg+ on the same work, so many times, in an environment below `cache`."""

    cache: Path
    runs: int = 1


def bench_masking(
    work: Work, runs: int, threads: int, peer: PeerRequest | None, progress: Progress
) -> dict[str, Any]:
    """The figures: our runs, the limit and the peer's runs interleaved, the minimum of each kept.

    Of each member too: its figure is its least time over the runs, and the round's is the median member.
    """
    environment = flower_peer.prepare(peer.cache, progress) if peer else None
    federation = found_federation(work)
    limits = thresholds(work.members, work.gamma, work.delta, work.security)
    packed = bulk_layout(federation.terms.bound.header).upload_total
    costs: list[RoundCost] = []
    measured: list[Limit] = []
    peers: list[dict[str, Any]] = []
    for run in range(runs):
        costs.append(run_round(federation, threads, within(progress, f"run {run + 1}")))
        progress(f"run {run + 1}: AES's limit", 0, 1)
        measured.append(measure_limit(limits.neighbours + 2, packed))
        if environment and peer and run < peer.runs:
            progress(f"Flower, run {run + 1}", 0, 1)
            peers.append(flower_peer.measure(environment, work))
    figures = _figures(federation, costs, measured, limits.neighbours, limits.shares, packed)
    figures["threads"] = threads
    if peers:
        figures |= _peer_figures(peers, figures)
    return figures


def _figures(
    federation: Federation,
    costs: list[RoundCost],
    measured: list[Limit],
    neighbours: int,
    shares: int,
    packed: int,
) -> dict[str, Any]:
    work = federation.work
    best = min(costs, key=lambda cost: median(cost.member_seconds()))
    limit = min(measured, key=lambda one: one.seconds)
    lanes = LaneLayout.for_cohort(work.bits, work.n_max)
    seconds_of = [min(run) for run in zip(*(cost.member_seconds() for cost in costs), strict=True)]
    member = median(seconds_of)
    check = min(cost.sum_check_cpu_s for cost in costs)
    server = min(costs, key=lambda cost: sum(cost.aggregator_cpu_s.values()))
    survivors = len(best.survivors)
    streams = survivors + _streams_of_dropped(work, neighbours)
    up = best.bytes_up()
    all_up = sum(sum(cost.bytes_up.values()) for cost in best.members.values())
    peak = best.member_peak
    server_peaks = [value for value in server.aggregator_peaks.values() if value is not None]
    return {
        "scheme": "masking",
        "members": work.members,
        "dim": work.dimension,
        "dropout": work.dropout,
        "bits": work.bits,
        "n_max": work.n_max,
        "gamma": work.gamma,
        "delta": work.delta,
        "security": work.security,
        "neighbours": neighbours,
        "shares": shares,
        "field_bits": lanes.field_bits,
        "fields_per_lane": lanes.fields_per_lane,
        "dropped": work.dropped,
        "survivors": survivors,
        "runs": len(costs),
        "member_cpu_s": member,
        "member_cpu_max_s": max(seconds_of),
        "aggregator_cpu_s": sum(server.aggregator_cpu_s.values()),
        "sum_check_cpu_s": check,
        "member_open_cpu_s": min(cost.open_cpu_s for cost in costs),
        "bytes_up_per_param": median(up) / work.dimension,
        "bytes_up_total": all_up,
        "bytes_down_per_param": median(best.bytes_down()) / work.dimension,
        "upload_frames_bytes": packed,
        "member_limit_s": limit.seconds,
        "member_limit_ratio": (member - check) / limit.seconds,
        "aggregator_limit_s": limit.per_stream * streams,
        "aggregator_streams": streams,
        "limit_gigabytes_per_s": limit.gigabytes_per_s,
        "limit_chunk_bytes": limit.chunk_bytes,
        "member_peak_bytes_per_param": None if peak is None else peak / work.dimension,
        "member_peak_bytes": peak,
        "aggregator_peak_bytes": max(server_peaks) if server_peaks else None,
        "exact": all(cost.mismatches == 0 for cost in costs),
        "steps": {
            step: {
                "member_cpu_s": best.step_seconds(step),
                "aggregator_cpu_s": server.aggregator_cpu_s.get(step, 0.0),
                "bytes_up": _median_bytes(best, step, up=True),
                "bytes_down": _median_bytes(best, step, up=False),
                "member_peak_bytes": peak if step == "upload" else None,
                "aggregator_peak_bytes": server.aggregator_peaks.get(step),
            }
            for step in STEPS
        }
        | {
            "finish": {
                "member_cpu_s": 0.0,
                "aggregator_cpu_s": server.aggregator_cpu_s.get("finish", 0.0),
                "bytes_up": 0,
                "bytes_down": _median_bytes(best, "result", up=False),
                "member_peak_bytes": None,
                "aggregator_peak_bytes": server.aggregator_peaks.get("finish"),
            }
        },
        "wall_s": min(cost.wall_s for cost in costs),
        "trust": scheme(work.scheme).trust_line(federation.terms),
        "machine": machine(),
        "versions": versions(),
    }


def _streams_of_dropped(work: Work, neighbours: int) -> int:
    """Pairwise masks that the aggregator takes back: those of dropped members with survivors."""
    alive = neighbours * (work.members - work.dropped) / max(work.members - 1, 1)
    return round(work.dropped * alive)


def _median_bytes(cost: RoundCost, step: str, *, up: bool) -> int:
    counted = [
        (cost.members[name].bytes_up if up else cost.members[name].bytes_down).get(step, 0)
        for name in cost.survivors
    ]
    return int(median(counted))


def _peer_figures(peers: list[dict[str, Any]], ours: dict[str, Any]) -> dict[str, Any]:
    member = min(peer["member_cpu_s"] for peer in peers)
    server = min(peer["aggregator_cpu_s"] for peer in peers)
    return {
        "peer": "flwr",
        "peer_version": peers[0]["version"],
        "peer_runs": len(peers),
        "peer_member_cpu_s": member,
        "peer_member_serialising_cpu_s": min(peer["member_serialising_cpu_s"] for peer in peers),
        "peer_aggregator_cpu_s": server,
        "peer_aggregator_serialising_cpu_s": min(peer["aggregator_serialising_cpu_s"] for peer in peers),
        "peer_bytes_up_per_param": peers[0]["bytes_up"] / ours["dim"],
        "peer_max_error": max(peer["max_error"] for peer in peers),
        "peer_member_ratio": member / ours["member_cpu_s"],
        "peer_aggregator_ratio": server / ours["aggregator_cpu_s"],
        "peer_bytes_ratio": peers[0]["bytes_up"] / ours["dim"] / ours["bytes_up_per_param"],
    }


def show_masking(figures: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    f = figures
    console.print(
        f"[bold]masking[/bold]: {f['members']} members (n_max {f['n_max']}), {f['dim']:,} parameters of "
        f"{f['bits']} bits, {f['fields_per_lane']} fields of {f['field_bits']} bits a lane, k = "
        f"{f['neighbours']}, t = {f['shares']} (gamma {f['gamma']}, delta {f['delta']} per mille, sec "
        f"{f['security']}), {f['dropped']} dropped after sharing; least of {f['runs']} runs"
    )
    show_table(
        "By step (member: median survivor; finish: unmasking and publishing the sum)",
        ("step", "member CPU", "server CPU", "bytes up", "bytes down", "server peak"),
        [
            (
                step,
                seconds(row["member_cpu_s"]),
                seconds(row["aggregator_cpu_s"]),
                size(row["bytes_up"]),
                size(row["bytes_down"]),
                size(row["aggregator_peak_bytes"]),
            )
            for step, row in f["steps"].items()
        ],
        console,
    )
    peer = "peer" in f
    rows = [
        (
            "member CPU, median",
            seconds(f["member_cpu_s"]),
            seconds(f["member_limit_s"]),
            seconds(f["peer_member_cpu_s"]) if peer else "",
        ),
        ("member CPU, slowest", seconds(f["member_cpu_max_s"]), "", ""),
        ("of it the sum check", seconds(f["sum_check_cpu_s"]), "", ""),
        ("opening the sum, beside it", seconds(f["member_open_cpu_s"]), "", ""),
        (
            "server CPU",
            seconds(f["aggregator_cpu_s"]),
            seconds(f["aggregator_limit_s"]),
            seconds(f["peer_aggregator_cpu_s"]) if peer else "",
        ),
        (
            "bytes up a parameter",
            f"{f['bytes_up_per_param']:.3f}",
            "",
            f"{f['peer_bytes_up_per_param']:.3f}" if peer else "",
        ),
        ("member peak above its input", size(f["member_peak_bytes"]), "", ""),
        ("server peak above idle", size(f["aggregator_peak_bytes"]), "", ""),
        ("exact", "yes" if f["exact"] else "NO", "", ""),
    ]
    columns = ["", "blindsum", "AES limit"]
    if peer:
        columns.append(f"flwr {f['peer_version']}")
    show_table("The round", columns, [row[: len(columns)] for row in rows], console)
    console.print(
        f"AES-256-CTR and addition: {f['limit_gigabytes_per_s']:.2f} GB/s in chunks of "
        f"{f['limit_chunk_bytes'] // 1024} KiB; member without the sum check / limit = "
        f"{f['member_limit_ratio']:.2f}"
    )
    if peer:
        console.print(
            f"flwr / blindsum: member {f['peer_member_ratio']:.1f}x (its serialising, "
            f"{seconds(f['peer_member_serialising_cpu_s'])}, not counted), server "
            f"{f['peer_aggregator_ratio']:.1f}x, bytes up {f['peer_bytes_ratio']:.2f}x"
        )
