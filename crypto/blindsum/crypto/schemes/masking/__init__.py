"""Secure aggregation by masking (protocols.md 3): plaintext's bytes, and no key that opens everyone."""

from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.base import Scheme
from blindsum.crypto.schemes.masking.scheme import Masking


def scheme(name: str) -> Scheme:
    """The masking scheme. Raises `ParameterRefused` for another name."""
    if name != Masking.name:
        raise ParameterRefused(f"there is no scheme {name!r} here")
    return Masking()
