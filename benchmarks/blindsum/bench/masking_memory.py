"""What the aggregator's memory grows by with the members of a masking round, as JSON.

    python -m blindsum.bench.masking_memory 10 1000

One round of each size at the same model and packing, in a fresh process of the aggregator. The peak counts
from the idle process, libraries loaded, and is set beside the bytes of all requests and replies of the
message steps: what a server has to know until the round ends. An upload is in memory here as a whole, where
the service has it on disk; so a peak holds one sum, one upload, and the pieces on their way.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

from blindsum.bench.aggregator_process import AggregatorProcess
from blindsum.bench.federation_round import MeasuredRound
from blindsum.bench.federation_setup import Work, found_federation
from blindsum.bench.machine import cores
from blindsum.crypto.schemes.masking.frames import bulk_layout

DIMENSION = 1_000_000
BITS = 16
N_MAX = 1_000
_GROWTH = 1.5
_SLACK = 32 << 20


def measure(members: int, dimension: int = DIMENSION) -> dict[str, int | bool]:
    """The peak above idle of one round, and what it is compared with, in bytes.

    `step_message_bytes` leaves out the upload replies, so it is somewhat too small.
    """
    work = Work("masking", members, dimension, BITS, N_MAX, gamma=50, delta=50)
    federation = found_federation(work)
    with AggregatorProcess(federation.terms, cores()) as aggregator, ThreadPoolExecutor(cores()) as pool:
        cost = MeasuredRound(federation, aggregator, pool, cores()).run()
    messages = sum(
        sum(size for step, size in member.bytes_up.items() if step != "upload")
        + sum(size for step, size in member.bytes_down.items() if step != "result")
        for member in cost.members.values()
    )
    layout = bulk_layout(federation.terms.bound.header)
    return {
        "members": members,
        "dim": dimension,
        "exact": cost.mismatches == 0,
        "aggregator_peak_bytes": max(peak or 0 for peak in cost.aggregator_peaks.values()),
        "step_message_bytes": messages,
        "sum_bytes": layout.sum_total,
        "upload_bytes": layout.upload_total,
    }


def main() -> None:
    """Measures cohorts of the given sizes; the smallest is the one that the others are compared with."""
    sizes = sorted(map(int, sys.argv[1:])) or [10, N_MAX]
    rows = [measure(size) for size in sizes]
    for row in rows:
        allowed = rows[0]["aggregator_peak_bytes"] + int(_GROWTH * row["step_message_bytes"]) + _SLACK
        row |= {"allowed_bytes": allowed, "within": row["aggregator_peak_bytes"] <= allowed}
        sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
