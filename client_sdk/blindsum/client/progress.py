"""What a member tells its app while a round runs. The SDK itself prints nothing."""

from collections.abc import Callable
from typing import Literal

Phase = Literal[
    "waiting", "checkpoint", "training", "advertise", "share", "protect", "upload", "confirm", "reveal",
    "download", "open", "conclude", "concluded", "aborted",
]  # fmt: skip
"""What goes on: waiting for a round, fetching a state, the app trains, a step, protecting frames, ..."""

OnProgress = Callable[[Phase, int, int], None]
"""`on_progress(phase, done, total)`: bytes for checkpoint, upload and download, frames for protect and
open, else members that have replied and participants (0, 0 where unknown). It may be called from the
SDK's threads, and should return at once; what it raises is logged and ignored."""


def silent(phase: Phase, done: int, total: int) -> None:
    """Reports nothing."""
