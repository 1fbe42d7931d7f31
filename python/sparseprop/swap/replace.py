"""Replace layers by their other form, in place or in a copy, exactly as a plan says."""

import copy
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.nn import MaskedLayer, SparseLayer
from sparseprop.nn.masked_base import no_fast_path
from sparseprop.semi_structured import SemiStructuredLinear
from sparseprop.swap.cuda import CUDA, is_cuda, make_semi_structured, parse_cuda_pattern
from sparseprop.swap.decide import Candidate, FilterFn, Target, check_model, shared_memory, survey
from sparseprop.swap.fuse import unfuse
from sparseprop.swap.kinds import sparse_from_dense
from sparseprop.swap.plan import LayerPlan, SwapPlan
from sparseprop.swap.planner import plan as make_plan

__all__ = ["SWAPPED", "NothingSwappedWarning", "replace_layers", "swap_modules", "to_dense"]

SWAPPED = (SparseLayer, MaskedLayer, SemiStructuredLinear)
_CARRIED = "_sparseprop_carried"
_RUN_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


class NothingSwappedWarning(UserWarning):
    """`swap_modules` left every layer dense; the message says why."""


def swap_modules(
    model: nn.Module,
    example_input: object = None,
    *,
    plan: SwapPlan | None = None,
    min_sparsity: float | None = None,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    pattern: str | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Make the sparse layers of `model` fast; call it before you build the optimizer.

    The swapped layers have new parameters (``weight_values``, as long as the non-zeros), so an optimizer
    built before the swap would update tensors nobody uses. Zeros stay zeros from here on. Names, training
    flags, ``requires_grad``, dtypes, biases and memory formats are kept: a plan whose `layout` is
    channels_last wants ``model.to(memory_format=torch.channels_last)`` besides.

    Args:
        model: any eager module; swap first, then wrap (DDP, FSDP) or compile.
        example_input: as in `sparseprop.plan`, decides by measurement; without it by estimates.
        plan: decisions made before, obeyed exactly; nothing is decided or measured again.
        min_sparsity, filter_fn: as in `sparseprop.plan`; not together with `plan`.
        device: None or ``"cpu"``; with ``"cuda"`` the Linear layers are pruned to 2:4 by magnitude and run on
            torch's semi-structured tensors there, in float16 or bfloat16; the model is not moved.
        pattern: N:M that the weights of all swapped layers must have, such as ``"2:4"``, or ``"4:8T"`` for
            one whose transpose has it too; ``"auto"`` takes what each layer has. With ``device="cuda"``:
            ``"2:4"``, or ``"2:4T"``, which makes input gradients sparse too.
        inplace: change `model` itself (default), or leave it alone and return a changed copy.

    Returns:
        The model; a new object if `model` itself is one of the layers to swap, so use what is returned.

    Raises:
        SparsePropError: as `sparseprop.plan`, and where a layer is missing or unlike the plan; `model` is
            then unchanged.

    Warns:
        NothingSwappedWarning: no layer became sparse; with the most frequent reasons.

    >>> import sparseprop
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> _ = model[0].weight.data[:, :60].zero_()
    >>> model = sparseprop.swap_modules(model, min_sparsity=0.9)
    >>> type(model[0]).__name__, type(model[2]).__name__
    ('SparseLinear', 'Linear')
    """
    check_model(model, "swap_modules")
    if plan is None:
        plan = make_plan(
            model,
            example_input,
            min_sparsity=min_sparsity,
            filter_fn=filter_fn,
            device=device,
            pattern=pattern,
        )
    elif not isinstance(plan, SwapPlan):
        raise SparsePropError(f"swap_modules expects plan to be a SwapPlan, got {type(plan).__name__}.")
    elif min_sparsity is not None or filter_fn is not None:
        raise SparsePropError("swap_modules obeys a given plan exactly; drop min_sparsity and filter_fn.")
    cuda = is_cuda(device)
    planned = _planned_modules(model, plan, CUDA if cuda else Target())
    if not planned:
        _warn_nothing_swapped(model, plan)
    convert: Callable[[Any, str], nn.Module] = partial(sparse_from_dense, pattern=pattern)
    if cuda:
        convert = partial(make_semi_structured, pattern=parse_cuda_pattern(pattern))
    return replace_layers(model, planned, convert, inplace=inplace)


def to_dense(model: nn.Module, *, inplace: bool = True) -> nn.Module:
    """Give every sparse layer of `model` its dense torch form back: the exact inverse of `swap_modules`.

    Undoes `fuse` as well.

    Args:
        model: any eager module, swapped or not.
        inplace: change `model` itself (default), or leave it alone and return a changed copy.

    Returns:
        The model; a new object if `model` itself is a sparse layer. Weights are as before, except that zeros
        outside the pattern have no sign: a pruned ``-0.0`` comes back as ``0.0``.

    Raises:
        SparsePropError: a wrapper, or sparse layers that share a parameter.

    >>> import sparseprop
    >>> model = sparseprop.swap_modules(nn.Sequential(nn.Linear(8, 8)), min_sparsity=0.0)
    >>> type(sparseprop.to_dense(model)[0]).__name__
    'Linear'
    """
    check_model(model, "to_dense")
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SWAPPED)}
    shared = shared_memory(model)
    for name, module in sparse.items():
        if id(module) in shared:
            raise SparsePropError(
                f"Sparse layer {name!r} shares memory with {shared[id(module)]!r}, its dense form would not; "
                "give each layer its own parameters first."
            )
    return unfuse(replace_layers(model, sparse, lambda module, name: module.to_dense(), inplace=inplace))


def replace_layers(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    convert: Callable[[Any, str], nn.Module],
    *,
    inplace: bool,
) -> nn.Module:
    """Put ``convert(layer, name)`` in the place of each of `layers`, under every name it has in `model`.

    All new layers are made before the first is placed: an error leaves the model unchanged.
    """
    new_layers: dict[int, nn.Module] = {}
    # New layers draw random values before theirs are copied in, and must be trainable wherever they are made.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        for name, old in layers.items():
            new = convert(old, name).train(old.training)
            _carry_attributes(old, new)
            new_layers[id(old)] = new if inplace else copy.deepcopy(new)
    if not inplace:
        # Copied around the layers that are replaced anyway: they cost no memory twice.
        return copy.deepcopy(model, {**pruned_weights(model), **new_layers})
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = new_layers.get(id(child), child)
    return new_layers.get(id(model), model)


def _planned_modules(model: nn.Module, plan: SwapPlan, target: Target) -> dict[str, nn.Module]:
    """The layers the plan makes sparse, after checking that the model is the one it was made for."""
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = {id(candidate.module): candidate for candidate in survey(model, None, target)}
    planned = {}
    for layer in plan:
        module = modules.get(layer.name)
        if module is None:
            raise SparsePropError(f"The plan names layer {layer.name!r}, which the model lacks. Plan anew.")
        _check_planned(layer, module, candidates.get(id(module)))
        if layer.choice == "sparse":
            planned[layer.name] = module
    return planned


def _check_planned(layer: LayerPlan, module: nn.Module, candidate: Candidate | None) -> None:
    kind = type(module).__name__
    if kind != layer.kind or candidate is None:
        hint = "it is swapped already" if isinstance(module, SWAPPED) else "plan this model anew"
        raise SparsePropError(f"The plan has layer {layer.name!r} as a {layer.kind}, it is a {kind}; {hint}.")
    if candidate.shape != layer.shape:
        raise SparsePropError(
            f"The plan has the weight of layer {layer.name!r} with shape {layer.shape}, it has shape "
            f"{candidate.shape}; plan this model anew."
        )
    if layer.choice == "sparse" and candidate.reason is not None:
        raise SparsePropError(
            f"The plan makes layer {layer.name!r} sparse, but it cannot be: {candidate.reason}. "
            "Mend that, or plan this model anew."
        )


def _warn_nothing_swapped(model: nn.Module, plan: SwapPlan) -> None:
    already = sum(isinstance(module, SWAPPED) for module in model.modules())
    if already:
        why = f"{already} layers are sparse already"
    elif not len(plan):
        why = "the model has no Linear or Conv layer"
    else:
        counts = Counter(layer.reason for layer in plan).most_common(3)
        why = "; ".join(f"{reason} ({count} of {len(plan)} layers)" for reason, count in counts)
    warnings.warn(f"swap_modules made no layer sparse: {why}.", NothingSwappedWarning, stacklevel=3)


def _carry_attributes(old: nn.Module, new: nn.Module) -> None:
    """Keep what users hung on a layer: tags both ways; hooks only back, as no layer with hooks is swapped."""
    if isinstance(old, SWAPPED):
        for key in _RUN_HOOKS:
            setattr(new, key, getattr(old, key))
        if isinstance(old, MaskedLayer):
            hooks = old._forward_pre_hooks.items()
            new._forward_pre_hooks = OrderedDict(item for item in hooks if item[1] is not no_fast_path)
        tags = vars(old).get(_CARRIED, ())
    else:
        sizes = {} if isinstance(old, nn.Linear) else {"kernel_size": 1}
        usual = {*vars(type(old)(1, 1, **sizes, device="meta")), *vars(new), "weight", "bias"}
        tags = tuple(key for key in vars(old) if key not in usual)
        setattr(new, _CARRIED, tags)
    for key in tags:
        setattr(new, key, vars(old)[key])


def pruned_weights(model: nn.Module) -> dict[int, torch.Tensor]:
    """Memo for deepcopy, which refuses the weights that torch.nn.utils.prune computes: copies of them."""
    computed = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                computed[id(value)] = value.detach().clone()
    return computed
