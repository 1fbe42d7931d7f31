from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparseprop.nn import SparseConv2d, SparseLinear

KEYS = ["weight_values", "bias", "weight_row_ptr", "weight_col_idx", "weight_shape"]


def layers(density=0.5):
    return SparseLinear.random(12, 8, density=density), torch.randn(3, 12)


def snapshot(layer):
    return {key: entry.clone() for key, entry in layer.state_dict().items()}


def assert_unchanged(layer, before):
    after = layer.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_it_holds_values_pattern_and_shape():
    layer, _ = layers()
    assert list(layer.state_dict()) == KEYS
    assert layer.state_dict()["weight_values"].data_ptr() == layer.weight_values.data_ptr()
    assert layer.weight_shape.tolist() == [8, 12]
    assert SparseConv2d.random(4, 6, 3, density=0.5, groups=2).weight_shape.tolist() == [6, 2, 3, 3]


@pytest.mark.parametrize("density", [0.5, 0.25])  # the same and another number of non-zeros
def test_another_pattern_is_adopted_by_the_same_parameter(backend, density):
    (layer, x), (other, _) = layers(), layers(density)
    parameter = layer.weight_values
    layer(x).sum().backward()
    layer.load_state_dict(other.state_dict())
    assert layer.weight_values is parameter
    assert (parameter.grad is None) == (density != 0.5)
    assert layer.pattern == other.pattern
    assert torch.equal(layer(x), other(x))
    layer(x).sum().backward()
    assert parameter.grad.shape == parameter.shape


def test_it_fills_a_fresh_layer_without_a_pattern(backend):
    layer, x = layers()
    fresh = SparseLinear(12, 8)
    assert torch.equal(fresh(x), fresh.bias.expand(3, -1))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


@pytest.mark.parametrize("assign", [True, False])
def test_it_fills_models_on_the_meta_device(backend, assign):
    layer, x = layers()
    with torch.device("meta"):
        model = nn.Sequential(SparseLinear(12, 8))
        SparseLinear.random(1_000, 1_000, density=0.1)
    assert model[0].weight_values.is_meta
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict({f"0.{key}": entry for key, entry in layer.state_dict().items()}, assign=assign)
    assert torch.equal(model(x), layer(x))


def test_assigning_takes_the_tensors_themselves():
    layer, _ = layers()
    entries = snapshot(layer)
    fresh = SparseLinear(12, 8)
    fresh.load_state_dict(entries, assign=True)
    assert fresh.weight_col_idx is entries["weight_col_idx"]
    assert fresh.weight_values.data_ptr() == entries["weight_values"].data_ptr()


def test_a_dense_state_dict_is_gathered(backend):
    layer, x = layers()
    dense = layer.to_dense()
    with torch.no_grad():
        dense.weight *= 2
        dense.weight[0, int(layer.weight_col_idx[0])] = 0  # a zero inside the pattern stays a weight
    nnz = layer.nnz
    assert not any(layer.load_state_dict(dense.state_dict()))
    assert layer.nnz == nnz
    torch.testing.assert_close(layer(x), dense(x))
    model = nn.Sequential(layer, nn.ReLU())
    assert not any(model.load_state_dict(nn.Sequential(dense, nn.ReLU()).state_dict(), assign=True))


def test_a_dense_state_dict_with_weights_outside_the_pattern_is_refused_by_name():
    layer, _ = layers()
    model = nn.ModuleDict({"head": layer})
    before = snapshot(layer)
    entries = {"head.weight": torch.ones(8, 12), "head.bias": torch.ones(8)}
    with pytest.raises(
        RuntimeError, match=r"head: the dense weight .* has 48 non-zeros outside the layer's pattern of 48"
    ):
        model.load_state_dict(entries)
    assert_unchanged(layer, before)
    entries["head.weight"] = torch.full((8, 12), float("nan"))
    with pytest.raises(RuntimeError, match="48 non-zeros outside"):
        model.load_state_dict(entries, strict=False)
    assert_unchanged(layer, before)


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


# what is changed in a fitting state dict of an 8 x 12 layer with 2 weights per row, and the message
BROKEN = {
    "out of range": ({"weight_col_idx": int32(*[0, 12] * 8)}, "col_idx is out of range"),
    "negative": ({"weight_col_idx": int32(*[-1, 1] * 8)}, "col_idx is out of range"),
    "unsorted": ({"weight_col_idx": int32(*[3, 1] * 8)}, "unsorted columns"),
    "duplicate": ({"weight_col_idx": int32(*[3, 3] * 8)}, "a duplicate column"),
    "wide columns": ({"weight_col_idx": torch.tensor([0, 1] * 8)}, "got torch.int64"),
    "float columns": ({"weight_col_idx": torch.tensor([0.0, 1.0] * 8)}, "got torch.float32"),
    "falling rows": ({"weight_row_ptr": torch.tensor([0, 4, 2, 6, 8, 10, 12, 14, 16])}, "row_ptr must rise"),
    "too few rows": (
        {"weight_row_ptr": torch.arange(0, 16, 2)},
        "rows + 1 = 9 entries, got 8",
    ),
    "too few columns": ({"weight_col_idx": int32(*[0, 1] * 7)}, "row_ptr must rise from 0 to nnz = 14"),
    "too few values": ({"weight_values": torch.ones(15)}, "weight_values must have shape (16,)"),
    "2-D values": ({"weight_values": torch.ones(8, 2)}, "weight_values must have shape (16,)"),
    "integer values": ({"weight_values": torch.ones(16, dtype=torch.int64)}, "must be floating point"),
    "another shape": ({"weight_shape": torch.tensor([8, 24])}, "weight_shape must be (8, 12), got (8, 24)"),
    "shape of no dimension": ({"weight_shape": torch.tensor(3)}, "weight_shape must be a row of int64"),
    "shape of floats": ({"weight_shape": torch.tensor([8.0, 12.0])}, "weight_shape must be a row of int64"),
    "shape of a list": ({"weight_shape": [8, 12]}, "weight_shape must be a tensor, got list"),
    "values of a list": ({"weight_values": [1.0] * 16}, "weight_values must be a tensor, got list"),
    "columns without values": (
        {"weight_col_idx": torch.zeros(16, dtype=torch.int32, device="meta")},
        "weight_col_idx is on the meta device",
    ),
    "long bias": ({"bias": torch.ones(9)}, "bias must have shape (8,), got (9,)"),
    "no columns": (
        {"weight_col_idx": None},
        "weight_row_ptr is there, weight_col_idx is missing",
    ),
    "no values": (
        {"weight_values": None, "weight_col_idx": int32(*[1, 2] * 8)},
        "no weight_values to go with",
    ),
    "dense of another shape": (
        dict.fromkeys(KEYS) | {"weight": torch.ones(8, 13)},
        "weight must have shape (8, 12)",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_entries_are_refused_and_nothing_is_half_loaded(name, strict):
    changes, message = BROKEN[name]
    layer = SparseLinear.from_mask(torch.tensor([True, True] + [False] * 10).expand(8, 12))
    before = snapshot(layer)
    entries = {
        key: torch.zeros_like(entry) if key in ("weight_values", "bias") else entry
        for key, entry in before.items()
    }
    entries = {key: entry for key, entry in (entries | changes).items() if entry is not None}
    model = nn.ModuleDict({"fc": layer})
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict({f"fc.{key}": entry for key, entry in entries.items()}, strict=strict)
    assert "fc: " in str(error.value)
    assert message in str(error.value)
    assert_unchanged(layer, before)


def test_missing_and_foreign_keys_are_reported_as_torch_does():
    layer, _ = layers()
    entries = snapshot(layer)
    del entries["bias"]
    entries["extra"] = torch.ones(1)
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*bias.*Unexpected key.*extra"):
        layer.load_state_dict(entries)
    result = layer.load_state_dict(entries, strict=False)
    assert result.missing_keys == ["bias"]
    assert layer.load_state_dict({}, strict=False).missing_keys == KEYS


def test_a_change_of_the_buffers_in_place_is_noticed(backend):
    layer, x = layers()
    layer(x)
    other = SparseLinear.from_mask(torch.roll(layer.mask, 1, 1))
    assert other.nnz == layer.nnz
    layer.weight_row_ptr.copy_(other.weight_row_ptr)
    layer.weight_col_idx.copy_(other.weight_col_idx)
    with pytest.warns(UserWarning, match="pattern of a SparseLinear was overwritten in place"):
        out = layer(x)
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight, layer.bias))
    layer(x)
    layer.weight_col_idx[0] = 99
    refused = pytest.raises(ValueError, match="col_idx is out of range")
    with pytest.warns(UserWarning, match="overwritten"), refused:
        layer(x)


def test_an_average_that_rounds_the_pattern_is_reported():
    layer = SparseLinear.random(1024, 4, density=0.004)
    average = AveragedModel(layer, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.99998))
    average.update_parameters(layer)
    average.update_parameters(layer)
    with pytest.warns(UserWarning, match="use_buffers=True"), suppress(ValueError):
        average(torch.randn(3, 1024))


def test_moving_to_shared_memory_leaves_no_stale_addresses():
    layer, x = SparseLinear.random(256, 300, density=0.05), torch.randn(64, 256, requires_grad=True)
    expected = layer(x)
    layer.share_memory()
    torch.testing.assert_close(layer(x), expected)
    with pytest.raises(ValueError, match="pattern was changed between forward and backward"):
        expected.sum().backward()
    layer(torch.randn(9, 256)).sum().backward()


def test_a_pattern_changed_between_forward_and_backward_is_refused(backend):
    layer, x = layers()
    out = layer(x)
    layer.load_state_dict(SparseLinear.from_mask(torch.roll(layer.mask, 1, 1)).state_dict())
    with pytest.raises(ValueError, match="pattern was changed between forward and backward"):
        out.sum().backward()
    layer(x).sum().backward()


def test_dtype_of_the_layer_wins_on_loading():
    layer, _ = layers()
    double = SparseLinear(12, 8, dtype=torch.float64)
    double.load_state_dict(layer.state_dict())
    assert double.weight_values.dtype is torch.float64


def test_safetensors_save_and_load(backend, tmp_path):
    model = nn.Sequential(
        SparseConv2d.random(3, 4, 3, density=0.5), nn.Flatten(), SparseLinear.random(16, 5, density=0.2)
    )
    save_model(model, str(tmp_path / "model.safetensors"))
    fresh = nn.Sequential(SparseConv2d(3, 4, 3), nn.Flatten(), SparseLinear(16, 5))
    assert load_model(fresh, str(tmp_path / "model.safetensors")) == (set(), [])
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(fresh(x), model(x))


def test_torch_save_and_load_of_a_state_dict(tmp_path):
    layer, x = layers()
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh = SparseLinear(12, 8)
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert torch.equal(fresh(x), layer(x))
