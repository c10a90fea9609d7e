"""The schemes that the conformance suite runs through, and how large their vectors are."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Row:
    """A scheme with a number of values that makes several frames and chunks, and is quick."""

    scheme: str
    size: int

    @property
    def masking(self) -> bool:
        """Whether it is the scheme with five steps and dropouts."""
        return self.scheme == "masking"


SCHEMES = [
    pytest.param(Row("masking", 200_003), id="masking"),
    pytest.param(Row("bfv", 120_001), id="bfv", marks=pytest.mark.he),
    pytest.param(Row("ckks", 60_001), id="ckks", marks=pytest.mark.he),
    pytest.param(Row("paillier", 301), id="paillier", marks=pytest.mark.paillier),
]
