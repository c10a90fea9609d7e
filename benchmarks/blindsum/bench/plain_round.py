"""The same round without any protection: float32 up, summed by the server. What protection is compared with.

No scheme: nothing of the service can be set to this.
"""

from statistics import median
from typing import Any

import numpy as np
from blindsum.bench.cpu_time import process_cpu, without_collection
from blindsum.bench.federation_round import UPLOAD_CHUNK
from blindsum.bench.federation_setup import EXAMPLES, Work
from blindsum.proto.v1 import round_pb2

TRUST = "None is kept from anyone: the aggregator, and whoever gets into it, reads every member's update."


def bench_plain(work: Work, runs: int) -> dict[str, Any]:
    """CPU and bytes of sending float32 in the clear, in the service's own messages."""
    costs = [_round(work) for _ in range(runs)]
    return {
        "scheme": "plaintext",
        "parameters": "float32",
        "members": work.members,
        "dim": work.dimension,
        "member_cpu_s": min(cost["member"] for cost in costs),
        "aggregator_cpu_s": min(cost["server"] for cost in costs),
        "member_open_cpu_s": min(cost["open"] for cost in costs),
        "bytes_up_per_param": costs[0]["up"] / work.dimension,
        "bytes_down_per_param": costs[0]["down"] / work.dimension,
        "exact": False,
        "trust": TRUST,
    }


def _round(work: Work) -> dict[str, float]:
    members, server, up = [], 0.0, 0
    total = np.zeros(work.dimension, np.float32)
    with without_collection():
        for index in range(work.members):
            update = np.random.default_rng(1 + index).standard_normal(work.dimension, np.float32)
            start = process_cpu()
            weighted = update * np.float32(EXAMPLES)
            messages = _messages(weighted.tobytes())
            members.append(process_cpu() - start)
            up = sum(map(len, messages))
            start = process_cpu()
            data = b"".join(round_pb2.UploadRequest.FromString(message).data for message in messages)
            np.add(total, np.frombuffer(data, np.float32), out=total)
            server += process_cpu() - start
        start = process_cpu()
        published = [
            round_pb2.DownloadResponse(data=piece).SerializeToString() for piece in _pieces(total.tobytes())
        ]
        server += process_cpu() - start
        start = process_cpu()
        opened = b"".join(round_pb2.DownloadResponse.FromString(piece).data for piece in published)
        np.frombuffer(opened, np.float32) / np.float32(EXAMPLES * work.members)
        opening = process_cpu() - start
    return {
        "member": median(members),
        "server": server,
        "open": opening,
        "up": up,
        "down": sum(map(len, published)),
    }


def _pieces(data: bytes) -> list[bytes]:
    return [data[at : at + UPLOAD_CHUNK] for at in range(0, len(data), UPLOAD_CHUNK)]


def _messages(data: bytes) -> list[bytes]:
    return [
        round_pb2.UploadRequest(
            upload_id=bytes(16), offset=index * UPLOAD_CHUNK, data=piece
        ).SerializeToString()
        for index, piece in enumerate(_pieces(data))
    ]
