"""The schemes that exist. There is no plaintext scheme, and no setting can select one."""

from importlib import import_module

from blindsum.crypto.errors import ParameterRefused
from blindsum.crypto.schemes.base import Scheme

_MODULES = {
    "masking": "blindsum.crypto.schemes.masking",
    "bfv": "blindsum.crypto.schemes.homomorphic",
    "ckks": "blindsum.crypto.schemes.homomorphic",
    "paillier": "blindsum.crypto.schemes.homomorphic",
}

SCHEME_NAMES: tuple[str, ...] = tuple(_MODULES)


def scheme(name: str) -> Scheme:
    """The scheme of that name; each module exports `scheme(name)`. Raises `ParameterRefused`."""
    module = _MODULES.get(name)
    if module is None:
        raise ParameterRefused(f"there is no scheme {name!r}; choose one of {', '.join(SCHEME_NAMES)}")
    found: Scheme = import_module(module).scheme(name)
    return found
