"""Keys and ciphers that the tests of this folder share: making them costs more than using them."""

import pytest
from blindsum.crypto.schemes.homomorphic.cipher import UploadForm, choose_parameters
from homomorphic_settings import Setting, make_setting

KINDS: dict[str, tuple[str, UploadForm]] = {
    "bfv-seeded": ("bfv", "seeded"),
    "bfv-public-key": ("bfv", "public-key"),
    "ckks-seeded": ("ckks", "seeded"),
    "ckks-public-key": ("ckks", "public-key"),
    "paillier": ("paillier", "public-key"),
}


@pytest.fixture(scope="session", params=KINDS)
def setting(request: pytest.FixtureRequest) -> Setting:
    """Each scheme and form with 16-bit fields, up to 7 members, short frames."""
    scheme, form = KINDS[request.param]
    length = 300 if scheme == "paillier" else 5000
    return make_setting(
        choose_parameters(scheme, 16, 7, form=form, length=length, modulus_bits=2048, minimum_security=112)
    )
