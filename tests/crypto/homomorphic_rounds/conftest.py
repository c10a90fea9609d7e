"""One key a scheme for all tests of this folder: making it costs more than using it."""

import pytest
from small_he_round import SmallHeRound


@pytest.fixture(scope="session", params=["bfv", "ckks", "paillier"])
def setting(request: pytest.FixtureRequest) -> SmallHeRound:
    """Four members with a key of the scheme, each with its update; a dropout is a fifth."""
    pytest.importorskip(
        "phe" if request.param == "paillier" else "tenseal", reason=f"{request.param}'s extra isn't installed"
    )
    return SmallHeRound(request.param)
