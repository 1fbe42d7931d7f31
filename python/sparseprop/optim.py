"""What optimizers need to know about sparse layers: which parameters decay, and what training keeps."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer

__all__ = ["ParameterMemory", "param_groups", "parameter_memory"]

_VALUES = "weight_values"


def param_groups(
    model: nn.Module, *, weight_decay: float, no_decay: Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: weights decay, biases and norms do not.

    The usual recipes (timm's, for one) take every 1-D parameter for a bias or a norm. ``weight_values`` of a
    sparse layer is 1-D and a weight: with such a recipe a swapped model would silently train without decay.
    Here it decays; all else is as in those recipes: other parameters of at most one dimension, and those
    named ``bias``, do not. Frozen parameters are left out.

    Args:
        model: swapped or not; the groups of a swapped model match those of its dense form.
        weight_decay: for the group that decays.
        no_decay: names, or patterns such as ``"*.pos_embed"``, of further parameters without decay, of sparse
            values also by the name of the dense weight; by default what the model's own
            ``no_weight_decay()`` names, a habit of timm's models.

    Returns:
        ``[{"params": [...], "weight_decay": 0.0}, {"params": [...], "weight_decay": weight_decay}]``, without
        a group that would be empty.

    Raises:
        SparsePropError: a negative or non-finite `weight_decay`.

    >>> from sparseprop.nn import SparseLinear
    >>> model = nn.Sequential(SparseLinear.random(8, 8, density=0.5), nn.LayerNorm(8))
    >>> [(group["weight_decay"], len(group["params"])) for group in param_groups(model, weight_decay=0.1)]
    [(0.0, 3), (0.1, 1)]
    """
    if not 0 <= weight_decay < float("inf"):
        raise SparsePropError(f"weight_decay must be a number of 0 or more, got {weight_decay}.")
    if no_decay is None:
        named = getattr(model, "no_weight_decay", None)
        no_decay = named() if callable(named) else ()
    patterns = (no_decay,) if isinstance(no_decay, str) else tuple(no_decay)
    sparse = {key: f"{name}.weight".lstrip(".") for key, (name, _) in _sparse_values(model).items()}
    plain: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names = {name, sparse.get(id(parameter), name)}
        excluded = any(fnmatchcase(each, pattern) for each in names for pattern in patterns)
        is_weight = id(parameter) in sparse or (parameter.dim() > 1 and name.split(".")[-1] != "bias")
        (decayed if is_weight and not excluded else plain).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": plain, "weight_decay": 0.0},
        {"params": decayed, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _sparse_values(model: nn.Module) -> dict[int, tuple[str, SparseLayer]]:
    """By ``id`` of their weight parameters, also where `parametrize` moved them, the sparse layers and their
    names."""
    found = {}
    for where, layer in model.named_modules():
        if not isinstance(layer, SparseLayer):
            continue
        for name, parameter in layer.named_parameters():
            if name == _VALUES or name.startswith(f"parametrizations.{_VALUES}.original"):
                found[id(parameter)] = where, layer
    return found


@dataclass(frozen=True)
class ParameterMemory:
    """Bytes that the parameters of a model keep busy while it trains, and what its dense form would need.

    Attributes:
        parameters, gradients, optimizer_state: of the model as it is; gradients as they will be after a
            backward pass, for all that is trained, whether they exist now or not.
        patterns: index buffers of the sparse layers.
        kernels: what the kernels derived from the patterns so far (filled by the first forward and backward).
        dense_parameters, dense_gradients, dense_optimizer_state: of the dense form with the same optimizer.

    >>> ParameterMemory(10, 10, 10, 5, 5, 100, 100, 100).ratio
    0.1
    """

    parameters: int
    gradients: int
    optimizer_state: int
    patterns: int
    kernels: int
    dense_parameters: int
    dense_gradients: int
    dense_optimizer_state: int

    @property
    def total(self) -> int:
        """Parameters, gradients and optimizer state."""
        return self.parameters + self.gradients + self.optimizer_state

    @property
    def dense_total(self) -> int:
        """The same for the dense form."""
        return self.dense_parameters + self.dense_gradients + self.dense_optimizer_state

    @property
    def ratio(self) -> float:
        """`total` over `dense_total`."""
        return self.total / max(1, self.dense_total)

    @property
    def ratio_with_indices(self) -> float:
        """As `ratio`, with patterns and kernels counted on the sparse side."""
        return (self.total + self.patterns + self.kernels) / max(1, self.dense_total)


def parameter_memory(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ParameterMemory:
    """Count what the parameters of `model` cost in training, beside its dense form.

    Args:
        model: swapped or not; each parameter counts once.
        optimizer: of this model; it holds its state after the first step.

    >>> from sparseprop.nn import SparseLinear
    >>> memory = parameter_memory(SparseLinear.random(100, 100, density=0.05, bias=False))
    >>> memory.parameters, memory.dense_parameters
    (2000, 40000)
    """
    sparse = {key: layer for key, (_, layer) in _sparse_values(model).items()}
    counts = torch.zeros(3, 2, dtype=torch.int64)  # parameters, gradients, state; as it is, dense
    for parameter in model.parameters():
        layer = sparse.get(id(parameter))
        dense_numel = parameter.numel() if layer is None else layer._geometry.numel
        size = _sizes(parameter, parameter, dense_numel)
        counts[0] += size
        if parameter.requires_grad:
            counts[1] += size
        for tensor in (optimizer.state.get(parameter, {}) if optimizer else {}).values():
            if isinstance(tensor, Tensor):
                counts[2] += _sizes(tensor, parameter, dense_numel)
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    patterns = sum(_bytes(buffer) for layer in layers for buffer in layer.buffers())
    kernels = sum(layer._operator.contraction.storage_bytes for layer in layers if layer._operator)
    (parameters, gradients, state), (dense_parameters, dense_gradients, dense_state) = counts.T.tolist()
    return ParameterMemory(
        parameters, gradients, state, patterns, kernels, dense_parameters, dense_gradients, dense_state
    )


def _sizes(tensor: Tensor, parameter: Tensor, dense_numel: int) -> Tensor:
    """Bytes of a tensor that belongs to `parameter`, and of its dense form if it follows its shape."""
    dense = dense_numel * tensor.element_size() if tensor.shape == parameter.shape else _bytes(tensor)
    return torch.tensor([_bytes(tensor), dense])


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
