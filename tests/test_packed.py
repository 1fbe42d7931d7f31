"""Packed N:M patterns: the same layer as with plain indices, in a fraction of their memory."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import sparseprop
from checks import assert_right
from sparseprop import SparsePropError
from sparseprop.masks import nm_mask
from sparseprop.nn import SparseConv1d, SparseConv2d, SparseConv3d, SparseLinear
from sparseprop.packed import PackedNM
from sparseprop.pattern import SparsityPattern

# dense layer, its N:M, an input's shape
LAYERS = {
    "linear": (lambda: nn.Linear(32, 9), (2, 4), (5, 32)),
    "one of four": (lambda: nn.Linear(32, 9), (1, 4), (2, 3, 32)),
    "three bits": (lambda: nn.Linear(24, 7), (3, 8), (33, 24)),
    "five bits": (lambda: nn.Linear(64, 5), (7, 32), (17, 64)),
    "wide rows": (lambda: nn.Linear(512, 3), (5, 16), (2, 512)),
    "all kept": (lambda: nn.Linear(8, 4), (4, 4), (3, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 5, 3, padding=1), (2, 4), (2, 8, 9)),
    "1x1 stride 2": (lambda: nn.Conv2d(16, 6, 1, stride=2), (1, 8), (2, 16, 7, 7)),
    "groups": (lambda: nn.Conv2d(16, 6, 3, groups=2, dilation=2), (2, 8), (2, 16, 9, 7)),
    "conv3d": (
        lambda: nn.Conv3d(4, 3, (1, 2, 3), padding=1, padding_mode="circular"),
        (2, 4),
        (1, 4, 3, 4, 5),
    ),
}
SPARSE = {
    nn.Linear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
}


def masked(case, dtype=torch.float32):
    """A dense layer, the mask it is to have, and an input."""
    make, (n, m), shape = LAYERS[case]
    dense = make().to(dtype)
    mask = nm_mask(dense.weight.detach().abs(), n, m)
    return dense, mask, torch.randn(shape, dtype=dtype)


def twins(case, dtype=torch.float32):
    """The layer packed and with plain indices, and an input."""
    dense, mask, x = masked(case, dtype)
    n, m = LAYERS[case][1]
    kind = SPARSE[type(dense)]
    return kind.from_dense(dense, mask=mask, pattern=f"{n}:{m}"), kind.from_dense(dense, mask=mask), x


def layer_2_4():
    return twins("linear")[0]


@pytest.mark.parametrize("case", LAYERS)
def test_packing_and_unpacking_give_the_same_pattern(case):
    _, mask, _ = masked(case)
    packed = PackedNM.from_mask(mask, *LAYERS[case][1])
    packed.validate()
    plain = SparsityPattern.from_mask(mask)
    assert packed.unpack() == plain
    assert packed.nnz == plain.nnz
    assert torch.equal(packed.row_nnz(), plain.row_nnz())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_computes_bit_for_bit_what_a_plain_one_does(backend, case, dtype):
    packed, plain, x = twins(case, dtype)
    assert packed.nm == ":".join(map(str, LAYERS[case][1]))
    assert torch.equal(packed.mask, plain.mask)
    assert torch.equal(packed.weight, plain.weight)
    found = []
    for layer in (packed, plain):
        own = x.clone().requires_grad_()
        out = layer(own)
        out.square().sum().backward()
        found.append((out, own.grad, layer.weight_values.grad, layer.bias.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_agrees_with_float64_dense(backend, case):
    dense, mask, x = masked(case)
    n, m = LAYERS[case][1]
    assert_right(SPARSE[type(dense)].from_dense(dense, mask=mask, pattern=f"{n}:{m}"), x)


@pytest.mark.parametrize(
    ("shape", "pattern", "packed"),
    [
        ((4, 16), "2:4", "2:4"),
        ((4, 16), "auto", "2:4"),
        ((4, 18), "2:4", None),  # a last group that is too short
        ((4, 12), "2:6", None),  # places in six do not fill whole bits
        ((4, 16), None, None),  # nobody asked
    ],
)
def test_indices_are_packed_where_the_pattern_is_exact(shape, pattern, packed):
    n, m = (2, 6) if pattern == "2:6" else (2, 4)
    mask = nm_mask(torch.rand(shape), n, m)
    dense = nn.Linear(shape[1], shape[0])
    assert SparseLinear.from_dense(dense, mask=mask, pattern=pattern).nm == packed


def test_a_group_that_keeps_fewer_stays_plain():
    mask = nm_mask(torch.rand(4, 16), 2, 4)
    mask[2, 4:8] = False
    layer = SparseLinear.from_dense(nn.Linear(16, 4), mask=mask, pattern="2:4")
    assert layer.nm is None
    assert torch.equal(layer.mask, mask)
    assert SparseLinear.from_dense(nn.Linear(16, 4), mask=mask, pattern="auto").nm is None


def test_the_indices_of_2_4_take_a_sixteenth_of_plain_ones():
    packed, plain, _ = twins("linear")
    size = {key: entry.numel() * entry.element_size() for key, entry in packed.state_dict().items()}
    assert 16 * size["weight_nm_bits"] == 4 * plain.state_dict()["weight_col_idx"].numel()
    assert "weight_row_ptr" not in size


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_packed_and_alike(copied):
    packed, _, x = twins("groups")
    twin = copied(packed)
    assert twin.nm == "2:8"
    assert torch.equal(twin(x), packed(x))


@pytest.mark.parametrize("case", ["linear", "groups"])
def test_either_form_loads_the_other_and_adopts_it(case):
    for order in (0, 1):
        pair = list(twins(case)[:2])
        source, target = pair[order], pair[1 - order]
        with torch.no_grad():
            source.weight_values.add_(1)
        parameter = target.weight_values
        target.load_state_dict(source.state_dict())
        assert target.weight_values is parameter
        assert target.nm == source.nm
        assert target.state_dict().keys() == source.state_dict().keys()
        assert torch.equal(target.weight, source.weight)


def test_a_dense_state_dict_loads_into_a_packed_layer():
    packed = layer_2_4()
    dense = packed.to_dense()
    with torch.no_grad():
        dense.weight.mul_(2)
    packed.load_state_dict(dense.state_dict())
    assert packed.nm == "2:4"
    assert torch.equal(packed.weight, dense.weight)


def test_safetensors_and_a_fresh_model_keep_it_packed(tmp_path):
    trained = nn.Sequential(layer_2_4())
    save_model(trained, str(tmp_path / "m.safetensors"))
    fresh = sparseprop.swap_like(nn.Sequential(nn.Linear(32, 9)), trained.state_dict())
    load_model(fresh, str(tmp_path / "m.safetensors"))
    assert fresh[0].nm == "2:4"
    assert torch.equal(fresh[0].weight, trained[0].weight)


def test_swap_modules_packs_what_it_finds():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.mul_(nm_mask(model[0].weight.abs(), 1, 8))
        model[1].weight.mul_(torch.rand(8, 16) < 0.3)
    sparseprop.swap_modules(model, min_sparsity=0.0, pattern="auto")
    assert (model[0].nm, model[1].nm) == ("1:8", None)


def test_compiled_packed_layers_give_the_same():
    packed, _, x = twins("linear")
    x.requires_grad_()
    out = torch.compile(packed, fullgraph=True)(x)
    out.square().sum().backward()
    grads = x.grad.clone(), packed.weight_values.grad.clone()
    x.grad = packed.weight_values.grad = None
    packed(x).square().sum().backward()
    assert torch.equal(out, packed(x))
    assert all(map(torch.equal, grads, (x.grad, packed.weight_values.grad)))


# what is changed in the state dict of a 9 x 32 layer of 2:4, and the message
BROKEN = {
    "M of 6": ({"weight_nm": torch.tensor([2, 6])}, "N:M must have M of"),
    "N of 0": ({"weight_nm": torch.tensor([0, 4])}, "N of 1 to M, got 0:4"),
    "N above M": ({"weight_nm": torch.tensor([5, 4])}, "got 5:4"),
    "another M": ({"weight_nm": torch.tensor([2, 8])}, "bits must be uint8 of shape (9, 3)"),
    "three numbers": ({"weight_nm": torch.tensor([2, 4, 0])}, "must be the int64 pair"),
    "float": ({"weight_nm": torch.tensor([2.0, 4.0])}, "must be the int64 pair"),
    "wide bits": ({"weight_nm_bits": torch.zeros(9, 4, dtype=torch.int32)}, "bits must be uint8"),
    "short bits": ({"weight_nm_bits": torch.full((9, 3), 0b0100, dtype=torch.uint8)}, "shape (9, 4)"),
    "the same place twice": (
        {"weight_nm_bits": torch.zeros(9, 4, dtype=torch.uint8)},
        "repeated or unsorted",
    ),
    "falling places": (
        {"weight_nm_bits": torch.full((9, 4), 0b0001, dtype=torch.uint8)},
        "repeated or unsorted",
    ),
    "too few values": ({"weight_values": torch.ones(143)}, "weight_values must have shape (144,)"),
    "no bits": ({"weight_nm_bits": None}, "weight_nm is there, weight_nm_bits is missing"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("target", ["packed", "plain", "model"])
def test_broken_bits_are_refused_and_nothing_is_loaded(change, message, target):
    packed, plain, _ = twins("linear")
    state = {key: entry for key, entry in (packed.state_dict() | change).items() if entry is not None}
    if target == "model":
        named = {f"0.{key}": entry for key, entry in state.items()}
        with pytest.raises(SparsePropError, match="Sparse layer '0' has"):
            sparseprop.swap_like(nn.Sequential(nn.Linear(32, 9)), named)
        return
    layer = packed if target == "packed" else plain
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(state)
    assert message in str(error.value)
    assert all(torch.equal(entry, before[key]) for key, entry in layer.state_dict().items())


def test_bits_changed_in_place_are_checked_before_a_kernel_sees_them(backend):
    packed, _, x = twins("linear")
    packed(x)
    packed.weight_nm_bits.zero_()
    refused = pytest.raises(SparsePropError, match="repeated or unsorted")
    with pytest.warns(UserWarning, match="overwritten in place"), refused:
        packed(x)


def test_values_of_another_length_are_refused(backend):
    packed, _, x = twins("linear")
    packed.weight_values = nn.Parameter(torch.ones(7))
    with pytest.raises(SparsePropError, match=r"weight values must have shape \(144,\).* got \(7,\)"):
        packed(x)


@pytest.mark.parametrize(
    ("n", "m", "message"), [(1, 4, "exactly 1 of every 4"), (2, 6, "M of"), (2, 32, "exactly 2 of every 32")]
)
def test_masks_of_another_pattern_cannot_be_packed(n, m, message):
    with pytest.raises(SparsePropError, match=message):
        PackedNM.from_mask(nm_mask(torch.rand(4, 32), 2, 4), n, m)


def test_a_bias_of_another_type_is_named():
    layer, x = layer_2_4(), torch.randn(2, 32)
    layer.load_state_dict(layer.state_dict() | {"bias": layer.bias.detach().double()}, assign=True)
    with pytest.raises(SparsePropError, match=r"bias must have shape .* and dtype torch.float32, got"):
        layer(x)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0)])
def test_a_packed_pattern_of_no_weights_is_refused(shape):
    packed = PackedNM(shape, torch.tensor([2, 4]), torch.zeros(shape[0], 0, dtype=torch.uint8))
    with pytest.raises(SparsePropError, match="needs a weight"):
        packed.validate()


def test_on_the_meta_device_it_still_counts_and_prints():
    packed, _, _ = twins("linear")
    there = copy.deepcopy(packed).to("meta")
    assert there.nnz == packed.nnz
    assert "nnz=144" in repr(there)
    there.load_state_dict(packed.state_dict(), assign=True)
    assert there.nm == "2:4"
    assert torch.equal(there.weight, packed.weight)


def test_the_registered_gradient_checks_its_values_too():
    packed, _, x = twins("linear")
    pattern = (packed.weight_nm, packed.weight_nm_bits, packed._geometry.to_ints())
    with pytest.raises(SparsePropError, match=r"must have shape \(144,\)"):
        torch.ops.sparseprop.contract_backward(torch.ones(5, 9), x, torch.ones(7), *pattern, True, True)
