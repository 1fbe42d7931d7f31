"""State dicts of models with sparse layers: to the dense form and into a fresh model."""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.nn.storage import PATTERN_KEYS, Pattern, pattern_in, plain
from sparseprop.packed import PackedNM
from sparseprop.swap.decide import NOT_FINITE, Candidate, check_model, survey
from sparseprop.swap.kinds import SPARSE_CLASS
from sparseprop.swap.replace import SWAPPED, replace_layers

__all__ = ["check_patterns", "dense_state_dict", "swap_like"]

_VALUES, _SHAPE = "weight_values", "weight_shape"


def dense_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """What ``to_dense(model).state_dict()`` would hold, keys in the same order, without changing `model`.

    >>> import sparseprop
    >>> dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> before = list(dense.state_dict())
    >>> list(dense_state_dict(sparseprop.swap_modules(dense, min_sparsity=0.0))) == before
    True
    """
    sparse = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, SWAPPED)}
    state = model.state_dict()
    metadata = OrderedDict(getattr(state, "_metadata", {}))
    dense: OrderedDict[str, torch.Tensor] = OrderedDict()
    for key, tensor in state.items():
        name, _, leaf = key.rpartition(".")
        if name not in sparse:
            dense[key] = tensor
            continue
        dense.setdefault(_join(name, "weight"), _dense_weight(sparse[name]))
        if leaf == "bias":
            dense[key] = tensor
        metadata[name] = {"version": nn.Linear._version}
    dense._metadata = metadata  # type: ignore[attr-defined]  # where torch keeps versions
    return dense


def swap_like(model: nn.Module, state_dict: Mapping[str, torch.Tensor], *, inplace: bool = True) -> nn.Module:
    """Make those layers of `model` sparse that are sparse in `state_dict`, with its patterns and values.

    Everything else of `state_dict` is left to ``load_state_dict``, which then finds all keys in place.

    Args:
        model: a model of the same architecture, such as a fresh dense one.
        state_dict: of a model with sparse layers.
        inplace: change `model` itself (default), or leave it alone and return a changed copy.

    Returns:
        The model; a new object if `model` itself becomes a sparse layer.

    Raises:
        SparsePropError: a layer that `model` lacks or that cannot be sparse there, or a pattern that is
            incomplete, out of range, unsorted, or of another shape; `model` is then unchanged.

    >>> import sparseprop
    >>> trained = sparseprop.swap_modules(nn.Sequential(nn.Linear(8, 8)), min_sparsity=0.0)
    >>> fresh = swap_like(nn.Sequential(nn.Linear(8, 8)), trained.state_dict())
    >>> fresh.load_state_dict(trained.state_dict())
    <All keys matched successfully>
    """
    check_model(model, "swap_like")
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = {id(candidate.module): candidate for candidate in survey(model, None)}
    layers: dict[str, nn.Module] = {}
    for name in _sparse_names(state_dict):
        module = modules.get(name)
        _check_place(name, module, candidates.get(id(module)))
        assert module is not None
        layers[name] = module
    return replace_layers(
        model, layers, lambda old, name: _sparse_like(old, name, state_dict), inplace=inplace
    )


def check_patterns(state_dict: Mapping[str, torch.Tensor]) -> None:
    """Raises SparsePropError, naming the layer, unless all sparse layers are complete and well-formed."""
    for name in _sparse_names(state_dict):
        _pattern(name, state_dict)


def _join(name: str, leaf: str) -> str:
    return f"{name}.{leaf}" if name else leaf


def _dense_weight(module: nn.Module) -> torch.Tensor:
    weight = torch.as_tensor(module.weight).detach()
    return weight if isinstance(module, SparseLayer) else weight * torch.as_tensor(module.mask)


def _sparse_names(state: Mapping[str, torch.Tensor]) -> list[str]:
    return [key.removesuffix(_VALUES).removesuffix(".") for key in state if key.split(".")[-1] == _VALUES]


def _check_place(name: str, module: nn.Module | None, candidate: Candidate | None) -> None:
    if module is None:
        raise SparsePropError(f"The state dict has a sparse layer {name!r}, which the model lacks.")
    if isinstance(module, SparseLayer):
        return
    reason = candidate.reason if candidate else "no Linear or Conv layer"
    if reason not in (None, NOT_FINITE):
        kind = type(module).__name__
        raise SparsePropError(
            f"Layer {name!r} is sparse in the state dict, but a {kind} in the model: {reason}."
        )


def _pattern(name: str, state: Mapping[str, torch.Tensor]) -> tuple[Pattern, tuple[int, ...]]:
    """The pattern of a sparse layer in `state`, checked, and the shape of the dense weight."""
    own = {
        leaf: state[key] for leaf in (_VALUES, _SHAPE, *PATTERN_KEYS) if (key := _join(name, leaf)) in state
    }
    for leaf in (_VALUES, _SHAPE):
        if leaf not in own:
            raise SparsePropError(f"Sparse layer {name!r} is incomplete: {_join(name, leaf)!r} is missing.")
    values, stated = own[_VALUES], own[_SHAPE]
    shape = tuple(stated.tolist()) if stated.dim() == 1 else ()
    if stated.dtype is not torch.int64 or len(shape) < 2 or min(shape) < 0:
        raise SparsePropError(f"Sparse layer {name!r} has a bad pattern: weight_shape is {stated.tolist()}.")
    try:
        pattern = pattern_in(own, shape)
        if pattern is not None:
            pattern.validate()
    except SparsePropError as error:
        raise SparsePropError(f"Sparse layer {name!r} has a bad pattern: {error}") from error
    if pattern is None:
        raise SparsePropError(f"Sparse layer {name!r} is incomplete: its pattern is missing.")
    if values.shape != (pattern.nnz,):
        raise SparsePropError(
            f"Sparse layer {name!r} has values of shape {tuple(values.shape)} for a pattern of {pattern.nnz}."
        )
    return pattern, shape


def _sparse_like(old: nn.Module, name: str, state: Mapping[str, torch.Tensor]) -> SparseLayer:
    dense = old.to_dense() if isinstance(old, SparseLayer) else old
    assert isinstance(dense.weight, torch.Tensor)
    wanted = tuple(dense.weight.shape)
    pattern, shape = _pattern(name, state)
    if shape != wanted:
        raise SparsePropError(
            f"Layer {name!r} has weight shape {shape} in the state dict, {wanted} in the model."
        )
    nm = pattern.name if isinstance(pattern, PackedNM) else None
    mask = plain(pattern).to_mask().view(shape)
    sparse = SPARSE_CLASS[type(dense)].from_dense(dense, mask=mask, pattern=nm)
    bias = state.get(_join(name, "bias"))
    with torch.no_grad():
        sparse.weight_values.copy_(state[_join(name, _VALUES)])
        if bias is not None and sparse.bias is not None and bias.shape == sparse.bias.shape:
            sparse.bias.copy_(bias)
    return sparse
