"""The layout: tensors in and out, and typed errors that name the tensor."""

import math

import numpy as np
import pytest
from blindsum.crypto.canonical import decode_document, encode_document
from blindsum.crypto.encoding.layout import Layout
from blindsum.crypto.encoding.vector import VectorEncoder, VectorPlan
from blindsum.crypto.errors import EncodingError, Refused
from blindsum.crypto.trust.group_key import GroupKey
from blindsum.crypto.trust.plan import Encoding

TENSORS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "conv.bias": np.arange(3, dtype=np.float16),
    "head": np.arange(6, dtype=np.float64).reshape(3, 2).T,
    "scale": np.array(2.5, np.float32),
}


@pytest.fixture
def layout() -> Layout:
    return Layout.of(TENSORS)


def test_tensors_come_back_in_shape_and_dtype(layout):
    flat = layout.flatten(TENSORS)
    assert flat.dtype == np.float32
    assert layout.dimension == flat.size == 34
    back = layout.unflatten(flat)
    for name, array in TENSORS.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)


def test_order_of_the_mapping_and_strides_do_not_matter(layout):
    shuffled = {name: TENSORS[name].copy(order="F") for name in reversed(TENSORS)}
    assert np.array_equal(layout.flatten(shuffled), layout.flatten(TENSORS))


def test_a_base_is_subtracted(layout):
    base = np.ones(34, np.float32)
    assert np.array_equal(layout.flatten(TENSORS, base), layout.flatten(TENSORS) - 1)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"conv.bias": np.zeros(4, np.float32)}, "conv.bias"),
        ({"conv.bias": np.zeros(3, np.int64)}, "conv.bias"),
        ({"conv.bias": np.zeros(3, object)}, "conv.bias"),
        ({"conv.bias": np.zeros(3, np.complex64)}, "conv.bias"),
        ({"conv.bias": [0.0, 0.0, 0.0]}, "conv.bias"),
        ({"conv.bias": None}, "conv.bias"),
        ({"extra": np.zeros(3, np.float32)}, "extra"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_tensor(layout, change, name):
    with pytest.raises(EncodingError) as caught:
        layout.flatten(TENSORS | change)
    assert caught.value.name == name


def test_a_missing_tensor_is_named(layout):
    with pytest.raises(EncodingError) as caught:
        layout.flatten({name: array for name, array in TENSORS.items() if name != "head"})
    assert caught.value.name == "head"


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_value_that_is_no_finite_float32_is_refused_before_anything_is_made(layout, value):
    wrong = TENSORS | {"head": np.full((2, 3), value)}
    flat = layout.flatten(wrong)
    plan = VectorPlan(layout.names, layout.sizes, Encoding(bits=16), 4)
    with pytest.raises(EncodingError) as caught:
        VectorEncoder(plan, (0,) * 4, flat, examples=1, metrics={}, check_key=bytes(32), member="m")
    assert caught.value.name == "head"


@pytest.mark.parametrize(
    "tensors", [{"a": np.zeros((0, 3), np.float32)}, {"a": np.zeros(3, np.int32)}, {"a": np.zeros(3, object)}]
)
def test_tensors_that_no_layout_takes(tensors):
    with pytest.raises(EncodingError) as caught:
        Layout.of(tensors)
    assert caught.value.name == "a"


def test_a_layout_without_tensors_or_with_one_twice():
    with pytest.raises(EncodingError):
        Layout.of({})
    entry = Layout.of({"a": np.zeros(1, np.float32)}).tensors[0]
    with pytest.raises(ValueError, match="twice"):
        Layout(tensors=(entry, entry))


def test_its_document_is_canonical_and_its_digest_keyed(layout):
    data = encode_document(layout)
    assert decode_document(data, Layout, "a layout") == layout
    for bad in (data + b" ", data.replace(b"conv.bias", b"conv.weight"), b'{"tensors":[]}'):
        with pytest.raises(Refused):
            decode_document(bad, Layout, "a layout")
    one, two = GroupKey(bytes(32), 1), GroupKey(bytes([1]) * 32, 1)
    assert layout.digest(one) == layout.digest(one) != layout.digest(two)
