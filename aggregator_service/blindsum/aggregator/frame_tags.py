"""Tags of stored frames: whether what comes back from the disk is what was checked when it came in.

GMAC (NIST SP 800-38D) under a key of this process costs a tenth of SHA-256. After a restart the key is
gone, and the frames' digests in the accept log are compared instead.
"""

import os
from collections.abc import Sequence

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

TAG_BYTES = 16
# Tags never leave the process, so one nonce for all is no loss: they find damage, they stop nobody.
_NONCE = bytes(12)


class FrameTags:
    """The tags of the uploads of one round that came since this process took the round up."""

    def __init__(self) -> None:
        self._gmac = AESGCM(os.urandom(16))
        self._known: dict[bytes, tuple[bytes, ...]] = {}

    def tag(self, frame: bytes | memoryview) -> bytes:
        """The tag of a frame's bytes: 16 bytes."""
        return self._gmac.encrypt(_NONCE, b"", frame)

    def keep(self, upload: bytes, tags: Sequence[bytes]) -> None:
        """Remember the tags of an upload, by its digest."""
        self._known[upload] = tuple(tags)

    def of(self, upload: bytes) -> tuple[bytes, ...] | None:
        """The tags of an upload in order of its frames; None if it came before this process."""
        return self._known.get(upload)
