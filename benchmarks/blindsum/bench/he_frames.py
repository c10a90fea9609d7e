"""`blindsum bench he`: bytes, speed and exactness of a homomorphic scheme, beside what users run today.

Rates are parameters in a CPU second of the role: encrypting counts making frames from integers (the
median member), aggregating checking and adding all frames of all members, decrypting opening all frames
of the sum. Members encrypt and decrypt in the SDK's worker processes, which count. Starting them, contexts,
keys and paillier's tables, made once a process and key, are apart. Each run has a fresh key.
"""

import sys
import time
from statistics import median
from typing import Any

import numpy as np
from blindsum.bench.federation_round import Progress, RoundCost, run_round, within
from blindsum.bench.federation_setup import Federation, Work, found_federation
from blindsum.bench.figures_output import rate, seconds, show_table, size
from blindsum.bench.he_baseline import ckks_default, textbook_paillier
from blindsum.bench.machine import cores, machine, versions
from blindsum.client.frame_workers import FrameWorkers
from blindsum.crypto.schemes.homomorphic.cipher import member_cipher
from blindsum.crypto.schemes.homomorphic.worker_cipher import PieceWork
from blindsum.crypto.schemes.registry import scheme
from rich.console import Console

_WORTH_SAYING_S = 10.0
_SPEEDUP_RUNS = 4


def bench_he(work: Work, runs: int, threads: int, baseline: bool, progress: Progress) -> dict[str, Any]:
    """The figures: our runs and the baseline's interleaved by kind, the minimum of each kept."""
    federations: list[Federation] = []
    costs: list[RoundCost] = []
    for run in range(runs):
        progress(f"run {run + 1}: making keys", 0, 1)
        federation = found_federation(work)
        if run == 0 and work.scheme == "paillier":
            _announce(federation, runs)
        federations.append(federation)
        costs.append(run_round(federation, threads, within(progress, f"run {run + 1}")))
    figures = _figures(federations, costs)
    figures["threads"] = threads
    if work.scheme == "paillier":
        progress("one worker against all", 0, 1)
        figures["speedup"] = worker_speedup(federations[-1])
    if baseline and work.scheme == "paillier":
        progress("textbook Paillier", 0, 1)
        figures["baseline"] = textbook_paillier(work.bits, runs, work.modulus_bits)
        figures["baseline_paillier"] = figures["baseline"]
    elif baseline:
        progress("CKKS 8192 [60,40,40]", 0, 1)
        figures["baseline"] = ckks_default(work.dimension, work.bits, runs)
        progress("textbook Paillier", 0, 1)
        figures["baseline_paillier"] = textbook_paillier(work.bits, 1)
    return figures


def estimate_seconds(federation: Federation) -> float:
    """Seconds that a member of a paillier round will take to encrypt, from one frame."""
    parameters, name = federation.parameters, next(iter(federation.keys))
    assert parameters is not None
    cipher = member_cipher(parameters, federation.terms.he_public, federation.keys[name].he_secret)
    cipher.encrypt(np.zeros(1, np.uint32))
    start = time.perf_counter()
    cipher.encrypt(np.ones(parameters.fields_per_frame, np.uint32))
    return (time.perf_counter() - start) * parameters.frames(federation.vector.fields)


def _announce(federation: Federation, runs: int) -> None:
    each = estimate_seconds(federation)
    total = each * federation.work.members * runs
    if total < _WORTH_SAYING_S:
        return
    print(
        f"paillier: a member takes about {each:.0f} s to encrypt {federation.work.dimension:,} parameters on "
        f"one core, this benchmark about {total:.0f} s. For models of this size choose bfv or masking.",
        file=sys.stderr,
    )


def worker_speedup(federation: Federation) -> dict[str, Any]:
    """By how much all cores are faster than one (wall time of a frame, least of some interleaved runs)."""
    parameters, name = federation.parameters, next(iter(federation.keys))
    assert parameters is not None
    work = PieceWork(parameters, federation.terms.he_public, federation.keys[name].he_secret)
    fields = np.ones(parameters.fields_per_frame, np.uint32)
    pools = [FrameWorkers(count) for count in (1, cores())]
    encrypt: list[list[float]] = [[], []]
    opening: list[list[float]] = [[], []]
    for pool in pools:
        pool.start(work)
        pool.encrypt(work, fields)
    for _ in range(_SPEEDUP_RUNS):
        for place, pool in enumerate(pools):
            start = time.perf_counter()
            frame = pool.encrypt(work, fields)
            made = time.perf_counter()
            pool.decrypt(work, frame, fields.size, 1)
            encrypt[place].append(made - start)
            opening[place].append(time.perf_counter() - made)
    for pool in pools:
        pool.close()
    return {
        "cores": cores(),
        "encrypt": min(encrypt[0]) / min(encrypt[1]),
        "open": min(opening[0]) / min(opening[1]),
    }


def _figures(federations: list[Federation], costs: list[RoundCost]) -> dict[str, Any]:
    federation = federations[0]
    work, parameters = federation.work, federation.parameters
    assert parameters is not None
    dimension = work.dimension
    protect = min(median(cost.members[name].protect_cpu_s for name in cost.survivors) for cost in costs)
    tables = min(one.table_cpu_s for one in federations)
    aggregate = min(cost.aggregate_cpu_s for cost in costs)
    best = costs[0]
    layout = scheme(work.scheme).bulk_layout(federation.terms)
    mismatches = sum(cost.mismatches for cost in costs)
    peaks = [value for value in best.aggregator_peaks.values() if value is not None]
    peak = best.member_peak
    return {
        "scheme": work.scheme,
        "parameters": parameters.name,
        "security_bits": parameters.security_bits,
        "upload_form": parameters.upload_form,
        "members": work.members,
        "dim": dimension,
        "dropout": work.dropout,
        "bits": work.bits,
        "n_max": work.n_max,
        "runs": len(costs),
        "keys": len(federations),
        "bytes_up_per_param": median(best.bytes_up()) / dimension,
        "bytes_down_per_param": median(best.bytes_down()) / dimension,
        "bytes_up_total": sum(sum(cost.bytes_up.values()) for cost in best.members.values()),
        "upload_frames_bytes": layout.upload_total,
        "context_bytes": len(federation.terms.he_public),
        "encrypt_params_per_s": dimension / protect,
        "aggregate_params_per_s": dimension * len(best.survivors) / aggregate,
        "decrypt_params_per_s": dimension / min(cost.decrypt_cpu_s for cost in costs),
        "max_error": max(cost.max_error for cost in costs),
        "error_bound": parameters.noise_bound if work.scheme == "ckks" else 0.0,
        "grid_mismatches": mismatches,
        "exact": mismatches == 0,
        "member_cpu_s": min(median(cost.member_seconds()) for cost in costs),
        "member_cpu_max_s": min(max(cost.member_seconds()) for cost in costs),
        "aggregator_cpu_s": min(sum(cost.aggregator_cpu_s.values()) for cost in costs),
        "member_open_cpu_s": min(cost.open_cpu_s for cost in costs),
        "sum_check_cpu_s": min(cost.sum_check_cpu_s for cost in costs),
        "key_cpu_s": min(one.key_cpu_s for one in federations),
        "worker_start_cpu_s": federations[0].table_cpu_s,
        "table_cpu_s": tables,
        "member_peak_bytes_per_param": None if peak is None else peak / dimension,
        "member_peak_bytes": peak,
        "worker_peak_bytes": best.worker_peak,
        "aggregator_peak_bytes": max(peaks) if peaks else None,
        "wall_s": min(cost.wall_s for cost in costs),
        "trust": scheme(work.scheme).trust_line(federation.terms),
        "machine": machine(),
        "versions": versions(),
    }


def show_he(figures: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    f = figures
    console.print(
        f"[bold]{f['scheme']}[/bold] {f['parameters']}: {f['members']} members (n_max {f['n_max']}), "
        f"{f['dim']:,} parameters of {f['bits']} bits, {f['upload_form']} uploads; least of {f['runs']} "
        "runs, each under a fresh key"
    )
    columns: list[tuple[str, dict[str, Any]]] = [(f["scheme"], f)]
    for key, title in (("baseline", "CKKS default"), ("baseline_paillier", "textbook Paillier")):
        if key in f and not (key == "baseline" and f["scheme"] == "paillier"):
            columns.append((title, f[key]))
    rows = [
        ("parameters", *(f"{one['dim']:,}" for _, one in columns)),
        ("security, bits", *(str(one["security_bits"]) for _, one in columns)),
        ("bytes up a parameter", *(f"{one['bytes_up_per_param']:.2f}" for _, one in columns)),
        ("bytes down a parameter", *(f"{one['bytes_down_per_param']:.2f}" for _, one in columns)),
        ("encrypt, a CPU second", *(rate(one["encrypt_params_per_s"]) for _, one in columns)),
        ("load and add, a CPU second", *(rate(one["aggregate_params_per_s"]) for _, one in columns)),
        ("decrypt, a CPU second", *(rate(one["decrypt_params_per_s"]) for _, one in columns)),
        ("largest error, steps", *(f"{one['max_error']:.1e}" for _, one in columns)),
        ("sums off the grid", *(str(one["grid_mismatches"]) for _, one in columns)),
        ("exact", *("yes" if one["exact"] else "no" for _, one in columns)),
    ]
    show_table("By scheme", ["", *(title for title, _ in columns)], rows, console)
    console.print(
        f"Member {seconds(f['member_cpu_s'])} in all (slowest {seconds(f['member_cpu_max_s'])}), peak "
        f"{size(f['member_peak_bytes'])} above its input and {size(f['worker_peak_bytes'])} of worker "
        f"processes with their libraries; server {seconds(f['aggregator_cpu_s'])}, peak "
        f"{size(f['aggregator_peak_bytes'])} above idle; opening {seconds(f['member_open_cpu_s'])}. Apart: "
        f"keys {seconds(f['key_cpu_s'])}, context {size(f['context_bytes'])}, a member's tables "
        f"{seconds(f['table_cpu_s'])}, starting its workers as well {seconds(f['worker_start_cpu_s'])}"
    )
    if "speedup" in f:
        faster = f["speedup"]
        console.print(
            f"{faster['cores']} worker processes against one: {faster['encrypt']:.2f}x faster to encrypt, "
            f"{faster['open']:.2f}x to open"
        )
    base = f.get("baseline")
    if base:
        console.print(
            f"Against {base['scheme']} {base['parameters']}: "
            f"{base['bytes_up_per_param'] / f['bytes_up_per_param']:.1f}x fewer bytes up, "
            f"{f['encrypt_params_per_s'] / base['encrypt_params_per_s']:.1f}x faster to encrypt"
        )
