"""Sums are exact at their worst case, frames have their size, secrets stay with key holders."""

import numpy as np
import pytest
from blindsum.crypto.errors import EncodingError, OpeningFailed, ParameterRefused, Refused
from blindsum.crypto.schemes.homomorphic.cipher import (
    UploadForm,
    aggregator_cipher,
    choose_parameters,
    generate_keys,
    member_cipher,
    restore_parameters,
)
from homomorphic_settings import Setting, make_setting
from numpy.typing import NDArray


def add_all(setting: Setting, frames: list[bytes]) -> bytes:
    total: bytearray | None = None
    for frame in frames:
        total = setting.aggregator.add(total, frame)
        assert len(total) == setting.parameters.sum_frame_bytes
    assert total is not None
    return setting.aggregator.finish(total)


def vectors(setting: Setting, members: int, seed: int) -> list[NDArray[np.uint64]]:
    generator = np.random.default_rng(seed)
    size, top = setting.parameters.fields_per_frame, setting.parameters.largest_value
    return [generator.integers(0, top + 1, size, dtype=np.uint64) for _ in range(members)]


def test_random_sums_are_exact(setting: Setting) -> None:
    values = vectors(setting, setting.parameters.n_max, 1)
    frames = [setting.member.encrypt(value) for value in values]
    assert {len(frame) for frame in frames} == {setting.parameters.upload_frame_bytes}
    for frame in frames:
        setting.aggregator.check(frame)
    result = add_all(setting, frames)
    assert len(result) == setting.parameters.result_frame_bytes
    opened = setting.member.decrypt(result, setting.parameters.fields_per_frame, len(frames))
    np.testing.assert_array_equal(opened, np.sum(values, axis=0, dtype=np.uint64))
    assert opened.dtype == np.uint64


@pytest.mark.parametrize("value", [0, "largest"])
def test_constant_sums_are_exact_at_the_bounds(setting: Setting, value: int | str) -> None:
    parameters = setting.parameters
    number = parameters.largest_value if value == "largest" else 0
    fields = np.full(parameters.fields_per_frame, number, np.uint32)
    frames = [setting.member.encrypt(fields) for _ in range(parameters.n_max)]
    opened = setting.member.decrypt(add_all(setting, frames), parameters.fields_per_frame, parameters.n_max)
    assert set(opened.tolist()) == {parameters.n_max * number}


def test_a_short_last_frame_is_padded(setting: Setting) -> None:
    fields = np.arange(5, dtype=np.uint32)
    result = add_all(setting, [setting.member.encrypt(fields) for _ in range(3)])
    np.testing.assert_array_equal(setting.member.decrypt(result, 5, 3), 3 * fields)
    assert setting.member.decrypt(result, 0, 3).size == 0


WORST = [
    ("bfv", 16, 128, "seeded"),
    ("bfv", 16, 128, "public-key"),
    ("bfv", 16, 1000, "seeded"),
    ("bfv", 22, 128, "public-key"),
    ("bfv", 22, 128, "seeded"),
    ("bfv", 8, 1000, "seeded"),
    ("ckks", 16, 128, "seeded"),
    ("ckks", 16, 1000, "seeded"),
    ("ckks", 16, 128, "public-key"),
    ("ckks", 22, 128, "seeded"),
]


@pytest.mark.parametrize(("scheme", "bits", "n_max", "form"), WORST)
def test_n_max_additions_of_the_largest_values(scheme: str, bits: int, n_max: int, form: UploadForm) -> None:
    """A whole cohort at its bound: real uploads in the public-key form, whose bound is for independent
    errors; copies of one upload in the seeded form, so that the errors add up in step."""
    setting = make_setting(choose_parameters(scheme, bits, n_max, form=form, length=1))
    parameters = setting.parameters
    size = parameters.fields_per_frame
    fields = np.full(size, parameters.largest_value, np.uint64)
    if form == "seeded":
        total = _times(setting, setting.member.encrypt(fields), n_max)
    else:
        total = setting.aggregator.add(None, setting.member.encrypt(fields))
        for _ in range(n_max - 1):
            total = setting.aggregator.add(total, setting.member.encrypt(fields))
    opened = setting.member.decrypt(setting.aggregator.finish(total), size, n_max)
    assert set(opened.tolist()) == {n_max * parameters.largest_value}
    assert setting.member.max_error <= (parameters.noise_bound if scheme == "ckks" else 0.0)


def _times(setting: Setting, frame: bytes, count: int) -> bytearray:
    """The sum of `count` copies of one upload."""
    total = setting.aggregator.add(None, frame)
    ring = setting.parameters.ring
    assert ring is not None
    words = np.frombuffer(total, "<u8", offset=16).reshape(2, len(ring.data), -1)
    for j, prime in enumerate(ring.data):
        lifted = words[:, j].astype(object) * count % prime
        words[:, j] = lifted.astype(np.uint64)
    return total


def test_encryption_is_fresh(setting: Setting) -> None:
    fields = np.ones(10, np.uint32)
    left, right = setting.member.encrypt(fields), setting.member.encrypt(fields)
    assert left[:16] == right[:16] == setting.keys.key_id[:16]
    body = np.frombuffer(left[16:], np.uint8) == np.frombuffer(right[16:], np.uint8)
    assert body.mean() < 0.02  # chance is 1/256
    assert not set(setting.aggregator.seeds(left)) & set(setting.aggregator.seeds(right))


def test_seeded_uploads_name_each_seed() -> None:
    setting = make_setting(choose_parameters("bfv", 16, 7, length=20_000))
    frame = setting.member.encrypt(np.ones(3, np.uint32))
    assert len(setting.aggregator.seeds(frame)) == setting.parameters.ciphertexts_per_frame == 3
    assert setting.aggregator.seeds(frame) == setting.aggregator.seeds(frame)


def test_a_cipher_is_rebuilt_from_bytes(setting: Setting) -> None:
    parameters = restore_parameters(setting.parameters.name, 16, 7, minimum_security=112)
    other = member_cipher(parameters, setting.keys.public, setting.keys.secret)
    fields = np.arange(100, dtype=np.uint32)
    total = aggregator_cipher(parameters, setting.keys.public).add(None, other.encrypt(fields))
    published = setting.aggregator.finish(setting.aggregator.add(total, setting.member.encrypt(fields)))
    np.testing.assert_array_equal(other.decrypt(published, 100, 2), 2 * fields)


def test_a_refused_frame_leaves_the_running_sum_as_it_was(setting: Setting) -> None:
    frame = setting.member.encrypt(np.ones(4, np.uint32))
    total = setting.aggregator.add(None, frame)
    before = bytes(total)
    with pytest.raises(Refused):
        setting.aggregator.add(total, frame[:16] + b"\xff" * (len(frame) - 16))
    assert bytes(total) == before


def test_public_material_holds_no_secret(setting: Setting) -> None:
    """No piece of the secret is in what the aggregator gets, and no further key either."""
    public, secret = setting.keys.public, setting.keys.secret
    lattice = setting.parameters.ring is not None
    private = secret[32:] if lattice else secret
    assert all(private[i : i + 16] not in public for i in range(0, len(private) - 16))
    if lattice:
        # A label and a name; one public key in that form. Relinearisation keys would double it.
        packed = 0 if setting.parameters.upload_form == "seeded" else 2 * 4096 // 8 * 109
        assert len(public) <= 100 + packed
    assert not hasattr(setting.aggregator, "decrypt")
    with pytest.raises(Refused):
        member_cipher(setting.parameters, public, bytes(len(secret)))


def test_secrets_neither_print_nor_pickle(setting: Setting) -> None:
    assert repr(setting.member).endswith(f"Member({setting.parameters.name})")
    with pytest.raises(TypeError, match="never pickled"):
        setting.member.__reduce__()


@pytest.mark.parametrize(
    "fields",
    [
        np.array([1 << 16], np.uint32),
        np.zeros(1 << 20, np.uint32),
        np.array([-1], np.int64),
        np.array([1.5]),
        np.zeros((2, 2), np.uint32),
    ],
)
def test_fields_that_do_not_fit_are_refused(setting: Setting, fields: NDArray[np.uint32]) -> None:
    with pytest.raises(EncodingError):
        setting.member.encrypt(fields)


def test_impossible_openings_are_refused(setting: Setting) -> None:
    result = add_all(setting, [setting.member.encrypt(np.ones(3, np.uint32))])
    for count, contributions in ((3, 0), (3, 8), (-1, 1), (setting.parameters.fields_per_frame + 1, 1)):
        with pytest.raises(ParameterRefused):
            setting.member.decrypt(result, count, contributions)


def test_a_sum_of_more_than_was_announced_does_not_open(setting: Setting) -> None:
    fields = np.full(3, setting.parameters.largest_value, np.uint32)
    result = add_all(setting, [setting.member.encrypt(fields) for _ in range(3)])
    with pytest.raises(OpeningFailed, match="above what the contributions"):
        setting.member.decrypt(result, 3, 2)


def test_another_key_is_refused_everywhere(setting: Setting) -> None:
    other = make_setting(setting.parameters)
    foreign = other.member.encrypt(np.ones(3, np.uint32))
    with pytest.raises(Refused, match="another key"):
        setting.aggregator.check(foreign)
    with pytest.raises(Refused, match="another key"):
        setting.aggregator.add(None, foreign)
    with pytest.raises(Refused, match="another key"):
        setting.member.decrypt(add_all(other, [foreign]), 3, 1)
    with pytest.raises(Refused, match="another public key"):
        member_cipher(setting.parameters, setting.keys.public, other.keys.secret)


def test_a_sum_under_a_relabelled_key_does_not_open(setting: Setting) -> None:
    """The tag is no protection against a lying aggregator: the opening itself has to fail."""
    other = make_setting(setting.parameters)
    result = add_all(other, [other.member.encrypt(np.ones(3, np.uint32))])
    relabelled = setting.keys.key_id[:16] + result[16:]
    with pytest.raises((OpeningFailed, Refused)):
        setting.member.decrypt(relabelled, setting.parameters.fields_per_frame, 1)


def test_a_key_of_another_set_is_refused() -> None:
    seven, many = choose_parameters("bfv", 16, 7), choose_parameters("bfv", 16, 128)
    keys = generate_keys(seven)
    with pytest.raises(Refused, match="isn't one for"):
        aggregator_cipher(many, keys.public)
    with pytest.raises(Refused, match="isn't one for"):
        aggregator_cipher(choose_parameters("bfv", 16, 7, form="public-key"), keys.public)


def test_two_keys_share_nothing() -> None:
    parameters = choose_parameters("bfv", 16, 7)
    left, right = generate_keys(parameters), generate_keys(parameters)
    assert left.public != right.public
    assert left.secret[32:] != right.secret[32:]


def test_a_rotated_key_reads_old_sums_with_the_old_key_only(setting: Setting) -> None:
    """A new key of the same set: nothing under the old one enters a sum, and old sums stay readable."""
    rotated = make_setting(setting.parameters)
    assert rotated.keys.key_id != setting.keys.key_id
    fields = np.arange(9, dtype=np.uint32)
    old, new = setting.member.encrypt(fields), rotated.member.encrypt(fields)
    old_sum, new_sum = setting.aggregator.add(None, old), rotated.aggregator.add(None, new)
    for aggregator, total, frame in (
        (rotated.aggregator, new_sum, old),
        (rotated.aggregator, old_sum, new),
        (setting.aggregator, old_sum, new),
    ):
        before = bytes(total)
        with pytest.raises(Refused, match="another key"):
            aggregator.add(total, frame)
        assert total == before
    with pytest.raises(Refused, match="another key"):
        rotated.aggregator.finish(old_sum)
    published = setting.aggregator.finish(old_sum)
    with pytest.raises(Refused, match="another key"):
        rotated.member.decrypt(published, 9, 1)
    np.testing.assert_array_equal(setting.member.decrypt(published, 9, 1), fields)


def test_a_key_is_named_by_every_byte_of_its_public_part(setting: Setting) -> None:
    """Another last byte of the public part is another key, whose aggregator takes nothing of ours."""
    changed = setting.keys.public[:-1] + bytes([setting.keys.public[-1] ^ 1])
    frame = setting.member.encrypt(np.ones(3, np.uint32))
    with pytest.raises(Refused):
        aggregator_cipher(setting.parameters, changed).check(frame)
