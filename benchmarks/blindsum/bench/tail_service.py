"""`blindsum bench tail`: what an encrypted answer costs, by the real service on real radiographs."""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from blindsum.bench.figures_output import Report, show_table, size
from blindsum.bench.machine import machine, versions
from blindsum.examples.clinics.inference_process import inference_process
from blindsum.examples.clinics.sites import HOSPITAL, load_site, load_test
from blindsum.examples.clinics.split_network import SplitPlan, train_split
from blindsum.examples.clinics.tail_costs import measure_tail
from rich.console import Console


def bench_tail(images: int, seed: int, progress: Report) -> dict[str, Any]:
    """Train the clinics' tail, start the service, ask about the first test images of clinic 1 one by one."""
    torch.set_num_threads(1)
    progress("training", 0, 3)
    network = train_split(load_site(HOSPITAL, seed), seed, SplitPlan())
    with tempfile.TemporaryDirectory(prefix="blindsum-bench-") as name:
        progress("starting the service", 1, 3)
        with inference_process(Path(name), network.tail) as service, service.member("clinic-1") as cloud:
            cloud.prepare()
            progress("asking", 2, 3)
            features = network.features(load_test("clinic-1", seed).pixels[:images])
            costs = measure_tail(service, cloud, network.tail, features)
    return {
        "machine": machine(),
        "versions": versions(),
        "circuit": network.tail.circuit.name,
        "tail": asdict(costs),
    }


def show_tail(figures: dict[str, Any], console: Console) -> None:
    """The figures as a table."""
    tail = figures["tail"]
    rows = [
        ("server CPU for an answer", f"{tail['server_cpu_ms']:.1f} ms"),
        ("TenSEAL's mm on the same work", f"{tail['mm_server_cpu_ms']:.0f} ms"),
        ("up, down", f"{size(tail['up_bytes'])}, {size(tail['down_bytes'])}"),
        ("evaluation keys, once", size(tail["keys_bytes"])),
        ("same class as in the clear", f"{tail['agree']} of {tail['total']}"),
        ("round trip on loopback, median", f"{tail['round_trip_ms']:.1f} ms"),
    ]
    show_table("Encrypted tail 127 -> 64 -> square -> 1", ("figure", "measured"), rows, console)
