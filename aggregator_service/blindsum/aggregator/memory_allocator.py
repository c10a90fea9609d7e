"""glibc's allocator, set so that megabyte buffers are kept instead of mapped and faulted in anew.

Measured on bulk ingest: page faults, not arithmetic, are what an aggregator in Python pays for.
"""

import ctypes
import gc
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_ARENAS = 2


def keep_large_buffers(mmap_threshold: int = 64 << 20, trim_threshold: int = 256 << 20) -> bool:
    """Raise glibc's thresholds (bytes); False where the C library isn't glibc and nothing was done."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        # Only glibc has this symbol; musl has a mallopt-less allocator of its own.
        library.gnu_get_libc_version  # noqa: B018
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    # glibc caps the mmap threshold at 32 MiB on 64-bit machines when a larger value is refused.
    mapped = mallopt(_M_MMAP_THRESHOLD, mmap_threshold) or mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    # gRPC's threads and ours hand buffers to each other: an arena for each would keep its own stock of them.
    return bool(mapped and mallopt(_M_TRIM_THRESHOLD, trim_threshold) and mallopt(_M_ARENA_MAX, _ARENAS))


def settle_collector() -> None:
    """Leave what is loaded by now out of every later collection, and collect less often.

    A call makes some dozens of objects that refer to each other; looking for cycles among all modules after
    every few calls costs more than the calls.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 10, 10)
