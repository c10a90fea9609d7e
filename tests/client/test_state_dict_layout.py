import numpy as np
import pytest
from blindsum.client.layout import (
    arrays,
    dress,
    framework_of,
    layout_of,
    local_parts,
    shared_names,
    update_of,
)
from blindsum.crypto.errors import EncodingError


def model() -> dict[str, np.ndarray]:
    return {
        "body.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "body.half": np.ones(3, np.float16),
        "body.steps": np.array(7),
        "head.weight": np.zeros((1, 2), np.float64),
    }


def test_integer_buffers_and_unmatched_tensors_stay_local() -> None:
    layout = layout_of(model(), ["body.*"])
    assert layout.names == ("body.weight", "body.half")
    assert set(local_parts(model(), layout)) == {"body.steps", "head.weight"}


def test_everything_floating_is_shared_by_default() -> None:
    assert shared_names(model()) == ("body.weight", "body.half", "head.weight")


@pytest.mark.parametrize(
    ("patterns", "name"),
    [(["tail.*"], "tail.*"), (["body.*", "nothing"], "nothing"), (["body.steps"], "layout")],
)
def test_a_pattern_that_selects_nothing_is_an_error(patterns: list[str], name: str) -> None:
    with pytest.raises(EncodingError) as error:
        shared_names(model(), patterns)
    assert error.value.name == name


def test_update_is_the_difference_in_float32_for_any_strides_and_float16() -> None:
    layout = layout_of(model(), ["body.*"])
    base = layout.flatten(arrays(model(), layout.names))
    after = model()
    wide = np.zeros((2, 6), np.float32)
    wide[:, ::2] = after["body.weight"] + 1
    after["body.weight"] = wide[:, ::2]
    after["body.half"] = after["body.half"] + np.float16(0.5)
    assert update_of(layout, after, base).tolist() == [1.0] * 6 + [0.5] * 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("body.weight", np.array([[0, 1, 2], [3, np.nan, 5]], np.float32)),
        ("body.weight", np.array([[0, 1, 2], [3, np.inf, 5]], np.float32)),
        ("body.weight", np.zeros((3, 2), np.float32)),
        ("body.weight", np.zeros((0,), np.float32)),
        ("body.half", np.array(["a", "b", "c"], object)),
        ("body.half", np.zeros(3, np.int64)),
        ("body.half", [1.0, 2.0, 3.0]),
    ],
)
def test_what_cannot_be_sent_is_an_error_that_names_the_tensor(name: str, value: object) -> None:
    layout = layout_of(model(), ["body.*"])
    base = layout.flatten(arrays(model(), layout.names))
    with pytest.raises(EncodingError) as error:
        update_of(layout, {**model(), name: value}, base)
    assert error.value.name == name


def test_a_missing_tensor_is_named() -> None:
    layout = layout_of(model(), ["body.*"])
    base = layout.flatten(arrays(model(), layout.names))
    after = model()
    del after["body.half"]
    with pytest.raises(EncodingError, match=r"body\.half"):
        update_of(layout, after, base)


def test_empty_and_complex_tensors_cannot_be_shared() -> None:
    with pytest.raises(EncodingError, match="empty"):
        layout_of({"a": np.zeros((0, 3), np.float32)})
    with pytest.raises(EncodingError, match="complex"):
        layout_of({"a": np.zeros(3, np.complex64)})


def test_values_of_other_kinds_are_refused() -> None:
    with pytest.raises(EncodingError, match="list"):
        framework_of({"a": [1.0]})


@pytest.mark.torch
def test_torch_state_dicts_come_back_as_they_went() -> None:
    torch = pytest.importorskip("torch", reason="torch isn't installed: pip install 'blindsum[torch]'")
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = net.state_dict()
    state["extra"] = torch.ones(2, dtype=torch.bfloat16)
    assert framework_of(state) == "torch"
    layout = layout_of(state)
    assert "1.num_batches_tracked" not in layout.names
    flat = layout.flatten(arrays(state, layout.names))
    back = dress(layout, layout.unflatten(flat), "torch")
    for name in layout.names:
        assert back[name].dtype == state[name].dtype
        assert torch.equal(back[name], state[name])
    back["0.weight"] += 1  # a copy, not a view of the model
    assert not torch.equal(back["0.weight"], net.state_dict()["0.weight"])
    assert local_parts(state, layout)["1.num_batches_tracked"].dtype == torch.int64
