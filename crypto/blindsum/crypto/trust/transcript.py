"""The transcript: a hash chain over a federation's receipts (protocols.md 1.10).

Two members that compare one digest know that they saw the same history.
"""

from blindsum.crypto.primitives.derivation import labelled_hash


def genesis(federation: bytes) -> bytes:
    """The digest of a history without rounds."""
    return labelled_hash("transcript", federation)


def extend(previous: bytes, receipt: bytes) -> bytes:
    """The digest of a history that goes on with a round, from the receipt's canonical bytes."""
    return labelled_hash("transcript", previous, receipt)
