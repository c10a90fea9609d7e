"""How long a round takes on the clock: real server process, real members of the SDK, on loopback.

Training is apart: the members' app returns at once with other weights. A round counts from one round's
end to the next one's, at the slowest member, so that it holds every message, every wait, every fsync.
"""

import itertools
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.bench.figures_output import Report, seconds, show_table
from blindsum.bench.ingest_server import measured_server
from blindsum.bench.machine import machine
from blindsum.client.joining import join, poll
from blindsum.client.member import Member
from blindsum.client.owner import Owner
from blindsum.crypto.errors import BlindsumError
from rich.console import Console

_PATIENCE_S = 600.0


def bench_round(
    members: int, dimension: int, rounds: int, directory: Path | None, progress: Report
) -> dict[str, Any]:
    """Figures of a plan of masking rounds; the first round, in which everything is loaded, is apart."""
    with tempfile.TemporaryDirectory(prefix="blindsum-", dir=directory) as name:
        folder = Path(name)
        with measured_server(folder / "server") as server:
            owner = Owner.init(
                folder / "owner",
                "bench",
                enrolment_address=f"localhost:{server.enrolment_port}",
                member_address=f"localhost:{server.member_port}",
                ca=server.ca,
                schemes=("masking",),
                n_max=max(16, members),
            )
            with owner:
                owner.register()
                names = [f"m{index}" for index in range(members)]
                for member in names:
                    join(owner.invite(member), folder / member, wait=False)
                owner.admit()
                for member in names:
                    if not poll(folder / member):
                        raise BlindsumError("a member of the benchmark wasn't admitted")
                model = {"w": np.zeros(dimension, np.float32)}
                owner.start_plan("bench", model, rounds=rounds, scheme="masking")
                ends = _run(folder, names, rounds, progress)
            start_s = server.start_s
    # A round is over when the last member has its receipt.
    over = [max(ends[member][index] for member in names) for index in range(rounds)]
    took = [after - before for before, after in itertools.pairwise(over)]
    return {
        "members": members,
        "dim": dimension,
        "rounds": rounds,
        "round_s": statistics.median(took),
        "slowest_round_s": max(took),
        "server_start_s": start_s,
        "machine": machine(),
    }


def _run(folder: Path, names: list[str], rounds: int, progress: Report) -> Mapping[str, list[float]]:
    ends: dict[str, list[float]] = {name: [] for name in names}
    failures: list[Exception] = []

    def app(name: str) -> None:
        try:
            with Member.open(folder / name) as member:
                for rnd in member.rounds():
                    weights = rnd.weights()
                    rnd.submit({key: value + np.float32(0.01) for key, value in weights.items()}, examples=1)
                    ends[name].append(time.perf_counter())
                    progress("rounds", len(ends[name]), rounds)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=app, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    limit = time.monotonic() + _PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
    if failures:
        raise failures[0]
    if any(len(times) != rounds for times in ends.values()):
        raise BlindsumError("the rounds of the benchmark didn't end")
    return ends


def show_round(figures: dict[str, Any], console: Console) -> None:
    """A table for people."""
    row = (
        str(figures["members"]),
        str(figures["dim"]),
        seconds(figures["round_s"]),
        seconds(figures["slowest_round_s"]),
        seconds(figures["server_start_s"]),
    )
    columns = ("members", "parameters", "a round", "slowest round", "server's start to ready")
    show_table("Masking rounds on the clock, training apart", columns, [row], console)
