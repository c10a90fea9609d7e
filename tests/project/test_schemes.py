"""Promise 2: there is no plaintext scheme, and no name, document or setting selects one."""

from typing import get_args

import msgspec
import pytest
from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.registry import SCHEME_NAMES, scheme
from blindsum.crypto.trust.policy import Policy, SchemeName


def test_exactly_four_schemes_are_registered() -> None:
    assert set(SCHEME_NAMES) == {"masking", "bfv", "ckks", "paillier"}
    assert set(get_args(SchemeName)) == set(SCHEME_NAMES)


@pytest.mark.parametrize("name", ["plain", "plaintext", "none", "", "mock", "identity", "oneshot", "Masking"])
def test_any_other_name_is_refused(name: str) -> None:
    with pytest.raises(ParameterRefused, match="choose one of masking, bfv, ckks, paillier"):
        scheme(name)


@pytest.mark.parametrize("name", ["plain", "none", "oneshot"])
def test_a_policy_cannot_name_another_scheme(name: str) -> None:
    fields = {
        "federation": bytes(32), "version": 1, "valid_until": 1, "schemes": [name], "n_min": 3, "n_max": 8,
    }  # fmt: skip
    with pytest.raises(msgspec.ValidationError, match="schemes"):
        msgspec.convert(fields, Policy)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_each_scheme_says_its_name_and_has_one_bulk_step(name: str) -> None:
    found = scheme(name)
    assert found.name == name
    assert found.steps.count("upload") == 1
