"""One key with both sides' ciphers: what the tests of this folder work on."""

from dataclasses import dataclass

from blindsum.crypto.schemes.homomorphic.cipher import (
    AggregatorCipher,
    CipherParameters,
    KeyPair,
    MemberCipher,
    aggregator_cipher,
    generate_keys,
    member_cipher,
)


@dataclass
class Setting:
    """One key with both sides' ciphers."""

    parameters: CipherParameters
    keys: KeyPair
    member: MemberCipher
    aggregator: AggregatorCipher


def make_setting(parameters: CipherParameters) -> Setting:
    keys = generate_keys(parameters)
    return Setting(
        parameters,
        keys,
        member_cipher(parameters, keys.public, keys.secret),
        aggregator_cipher(parameters, keys.public),
    )
