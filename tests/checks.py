"""Choosing an implementation; comparing a sparse layer with its dense twin, within an error budget."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, nn

from sparseprop import backend as backends


def _native_isas() -> tuple[str, ...]:
    try:
        from sparseprop import _native
    except ImportError:  # only under SPARSEPROP_BACKEND=reference: importing sparseprop fails otherwise
        return ()
    return tuple(_native.available_isas())


BACKENDS = ("reference", *_native_isas())


@contextmanager
def running(name: str) -> Iterator[str]:
    """Run with the reference loops, or with the native kernels of one instruction set."""
    with ExitStack() as stack:
        if name == "reference":
            stack.enter_context(backends.use("reference"))
        else:
            from sparseprop import _native

            before = _native.active_isa()
            stack.enter_context(backends.use("native"))
            stack.callback(_native.set_max_isa, before)
            _native.set_max_isa(name)
        yield name


# forward, and the gradients of input, weight and bias; None where not asked for
Results = dict[str, Tensor | None]
NEEDS = tuple(product((True, False), repeat=3))


def in_order(x: Tensor, order: Sequence[int]) -> Tensor:
    """`x` with its dimensions lying in memory in this order, outermost first."""
    back = [list(order).index(dim) for dim in range(x.dim())]
    return x.permute(*order).contiguous().permute(*back)


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_full([2 * size + 1 for size in x.shape], float("nan"))
    part = wide[tuple(slice(1, 2 * size + 1, 2) for size in x.shape)]
    return part.copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": Tensor.clone,
    "channels_last": lambda x: in_order(x, (0, *range(2, x.dim()), 1)) if x.dim() > 2 else x.clone(),
    "batch_last": lambda x: in_order(x, (*range(1, x.dim()), 0)),
    "reversed": lambda x: in_order(x, tuple(reversed(range(x.dim())))),
    "sliced": _sliced,
    "expanded": lambda x: x[:1].expand_as(x),
    "broadcast": lambda x: x.new_full((), 0.75).expand_as(x),
}


def run(
    module: nn.Module, x: Tensor, grad: Tensor | None, needs: Sequence[bool] = (True, True, True)
) -> Results:
    """Output and gradients of a layer, sparse or dense; `grad` None gives ones by `sum().backward()`."""
    module = deepcopy(module)
    weight = module.weight_values if hasattr(module, "weight_values") else module.weight
    x = x.detach().requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    if module.bias is not None:
        module.bias.requires_grad_(needs[2])
    out = module(x)
    if out.requires_grad:
        if grad is None:
            out.sum().backward()
        else:
            out.backward(grad)
    bias_grad = None if module.bias is None else module.bias.grad
    return {"out": out.detach(), "grad_x": x.grad, "grad_weight": weight.grad, "grad_bias": bias_grad}


def assert_right(
    layer: nn.Module,
    x: Tensor,
    grad: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True),
    slack: float = 4.0,
) -> None:
    """|ours - truth| <= |dense - truth| + slack * eps * sum of the terms' sizes, everywhere."""
    dense = layer.to_dense()
    exact, sizes = deepcopy(dense).double(), deepcopy(dense).double()
    with torch.no_grad():
        for parameter in sizes.parameters():
            parameter.abs_()
    wide = None if grad is None else grad.double()
    ours, plain = run(layer, x, grad, needs), run(dense, x, grad, needs)
    truth, scale = (
        run(exact, x.double(), wide, needs),
        run(sizes, x.double().abs(), None if wide is None else wide.abs(), needs),
    )
    for results in (plain, truth, scale):
        if results["grad_weight"] is not None:
            results["grad_weight"] = results["grad_weight"][layer.mask]
    for name, wanted in truth.items():
        assert (ours[name] is None) == (wanted is None), f"{name}: given {ours[name] is not None}"
        if wanted is not None:
            _assert_within(name, ours[name], plain[name], wanted, scale[name], slack)


def _assert_within(
    name: str, ours: Tensor, dense: Tensor, truth: Tensor, scale: Tensor, slack: float
) -> None:
    assert ours.shape == truth.shape, f"{name} has shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert ours.dtype is dense.dtype, f"{name} has dtype {ours.dtype}, not {dense.dtype}"
    error, allowed = (ours - truth).abs(), (dense - truth).abs() + slack * torch.finfo(ours.dtype).eps * scale
    excess = torch.where(error <= allowed, 0, error - allowed).nan_to_num(nan=torch.inf)
    if excess.any():
        worst = int(excess.argmax())
        got, there, want = (tensor.flatten()[worst].item() for tensor in (ours, dense, truth))
        raise AssertionError(
            f"{name}: worst of {int((excess > 0).sum())} wrong: {got}, dense {there}, exactly {want}"
        )
