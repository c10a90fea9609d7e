"""Peak memory of a stretch of code: how far the resident set rose above where it was (Linux).

Linux keeps a process' largest resident set (VmHWM in /proc/self/status) and forgets it on request
(5 written to /proc/self/clear_refs). Unlike tracemalloc this costs nothing, and sees native memory. Freed
memory is first given back to the system (malloc_trim), so that reusing it counts again.
"""

import ctypes
from collections.abc import Iterable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The rise of the resident set since this was made. `above` is None where Linux doesn't tell."""

    def __init__(self) -> None:
        self._known = _reset()
        self._start = _resident("VmRSS") if self._known else 0

    def restart(self) -> None:
        """Forget the peak so far; the starting point stays."""
        if self._known:
            _reset()

    @property
    def above(self) -> int | None:
        """Bytes of the peak above the starting point."""
        return max(_resident("VmHWM") - self._start, 0) if self._known else None


def peak_resident(pids: Iterable[int]) -> int | None:
    """Bytes of the largest resident sets that other processes had, added up, with all that they loaded."""
    try:
        return sum(_resident("VmHWM", Path(f"/proc/{pid}/status")) for pid in pids)
    except OSError:
        return None


def _reset() -> bool:
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str, status: Path = _STATUS) -> int:
    for line in status.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
