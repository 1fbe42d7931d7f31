"""Whole networks at 90 % sparsity: the swapped model computes and learns what the masked dense one does.

Judged by an error budget, not by fixed tolerances: float64 arithmetic on the masked dense model is the truth,
and the swapped model may be off by a few times what the float32 dense model is off, norm by norm.
"""

import copy

import pytest
import torch
from torch import nn

import sparseprop
from model_cases import MODELS, ModelCase, prune_by_magnitude, smooth
from sparseprop.checkpoint import dense_state_dict

# The two float32 models round differently; either may be the luckier one by a small factor.
_LUCK = 4.0
_FLOOR = 1e-5


def trio(case: ModelCase) -> tuple[dict[str, nn.Module], dict[str, torch.Tensor]]:
    """The pruned model dense, dense in float64, and swapped; and its masks."""
    torch.manual_seed(0)
    dense = smooth(case.make()).train()
    masks = prune_by_magnitude(dense, 0.9)
    truth = copy.deepcopy(dense).double()
    sparse = sparseprop.swap_modules(dense, min_sparsity=0.85, inplace=False)
    return {"dense": dense, "sparse": sparse, "truth": truth}, masks


def loss_of(model: nn.Module, case: ModelCase) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in case.example()]
    out = model(*inputs)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    return out, (out - target).square().mean()


def dense_gradients(model: nn.Module, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients by the names of the dense model, zero outside the masks."""
    gradients = {}
    for name, parameter in model.named_parameters():
        dense_name = name.replace("weight_values", "weight")
        if name != dense_name:
            mask = masks[dense_name]
            empty = parameter.new_zeros(mask.shape)
            gradients[dense_name] = empty.masked_scatter_(mask, parameter.grad)
        else:
            gradients[name] = parameter.grad * masks.get(name, torch.ones(()))
    return gradients


def assert_within_budget(got, dense, truth) -> None:
    """Each tensor of `got` is about as near to `truth` as its counterpart of `dense` is."""
    assert got.keys() == dense.keys() == truth.keys()
    scale = torch.stack([tensor.norm() for tensor in truth.values()]).norm() / len(truth) ** 0.5
    worst = max(
        (
            ((got[name] - truth[name]).norm() - _LUCK * (dense[name] - truth[name]).norm()).item()
            / (truth[name].norm() + 1e-2 * scale).item(),
            name,
        )
        for name in truth
    )
    assert worst[0] <= _FLOOR, f"{worst[1]}: off by {worst[0]:.2e} of its norm beyond the budget"


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_outputs_and_all_gradients_agree_with_the_masked_dense_model(case):
    models, masks = trio(case)
    assert (
        sum(isinstance(module, sparseprop.nn.SparseLayer) for module in models["sparse"].modules())
        == case.layers
    )
    outputs, gradients = {}, {}
    for name, model in models.items():
        out, loss = loss_of(model, case)
        loss.backward()
        outputs[name] = {"output": out.detach(), "loss": loss.detach()}
        gradients[name] = dense_gradients(model, masks)
    assert_within_budget(outputs["sparse"], outputs["dense"], outputs["truth"])
    assert_within_budget(gradients["sparse"], gradients["dense"], gradients["truth"])
    assert len(gradients["sparse"]) == len(list(models["dense"].parameters()))


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_in_float64_the_unchanged_network_agrees_to_the_last_digits(case):
    torch.manual_seed(0)
    dense = case.make().double().train()
    masks = prune_by_magnitude(dense, 0.9)
    sparse = sparseprop.swap_modules(dense, min_sparsity=0.85, inplace=False)
    for model in (dense, sparse):
        loss_of(model, case)[1].backward()
    wanted, got = dense_gradients(dense, masks), dense_gradients(sparse, masks)
    scale = torch.stack([tensor.norm() for tensor in wanted.values()]).norm()
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-9 * (wanted[name].norm() + 1e-3 * scale), name


def train(model: nn.Module, case: ModelCase, make_optimizer, masks: dict[str, torch.Tensor]) -> list[float]:
    """Ten steps; gradients of dense weights are masked. Returns the losses."""
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters.values())
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        _, loss = loss_of(model, case)
        loss.backward()
        losses.append(loss.item())
        for name, mask in masks.items():
            if name in parameters:
                parameters[name].grad.mul_(mask)
        optimizer.step()
    return losses


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
}


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_ten_steps_stay_together(case, make_optimizer):
    models, masks = trio(case)
    start = {name: tensor.clone() for name, tensor in models["truth"].state_dict().items()}
    losses = {name: torch.tensor(train(model, case, make_optimizer, masks)) for name, model in models.items()}
    ends = {name: dense_state_dict(model) for name, model in models.items()}
    off = {}
    for name in ("dense", "sparse"):
        loss_error = (losses[name] - losses["truth"]).abs().max() / losses["truth"].abs().max()
        off[name] = (loss_error.item(), distance(ends[name], ends["truth"]))
    travelled = distance(start, ends["truth"])
    assert travelled > 0
    assert losses["truth"][-1] < losses["truth"][0]
    assert off["sparse"][0] <= _LUCK * off["dense"][0] + 1e-4
    assert off["sparse"][1] <= _LUCK * off["dense"][1] + 1e-3 * travelled
    for name, mask in masks.items():
        assert not ends["sparse"][name][~mask].any(), name


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of two state dicts, floats only."""
    pairs = [(one[name], other[name]) for name in other if other[name].is_floating_point()]
    return torch.stack([(a.double() - b).norm() for a, b in pairs]).norm().item()
