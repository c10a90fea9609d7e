"""What a member can write down to prove, afterwards and elsewhere, that sums were exact.

For tests, demos and audits only: a witness holds the plain update. It stays in the member's folder (0600).
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
from blindsum.client.private_files import remove_private, write_private
from blindsum.crypto.encoding.layout import Vector
from numpy.typing import NDArray


class Witness:
    """One round as it was at this member: what it sent in the clear, and the sum as it opened it."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder = folder / "witness"
        self.number = number
        self.update: Vector | None = None
        self.fields: NDArray[np.uint32] | None = None
        self.summed: NDArray[np.uint64] | None = None
        if self._sent.exists():
            with np.load(self._sent, allow_pickle=False) as stored:
                self.update, self.fields = stored["update"], stored["fields"]

    @property
    def _sent(self) -> Path:
        return self.folder / f"sent-{self.number:06d}.npz"

    def sent(self, update: Vector, fields: NDArray[np.uint32]) -> None:
        """Keep what was encoded; it outlives a restart in the middle of the round."""
        self.update, self.fields = update, fields
        self._save(self._sent, {"update": update, "fields": fields})

    def write(self, survivors: tuple[str, ...], max_error: float) -> None:
        """Write `witness/round-<number>.npz`, if this member sent something in the round.

        round: int; update: float32, new minus old shared values; fields: uint32, all fields as encoded;
        summed: uint64, all fields of the opened sum; survivors: names; max_error: float.
        """
        if self.update is None or self.fields is None or self.summed is None:
            return
        parts: dict[str, Any] = {
            "round": np.array(self.number),
            "update": self.update,
            "fields": self.fields,
            "summed": self.summed,
            "survivors": np.array(survivors),
            "max_error": np.array(max_error),
        }
        self._save(self.folder / f"round-{self.number:06d}.npz", parts)
        remove_private(self._sent)

    def _save(self, path: Path, parts: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, **parts)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        write_private(path, buffer.getvalue())
