"""Both forms of a model, and all that a step of them needs."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.profiling.trace import Training
from sparseprop.swap.decide import check_model
from sparseprop.swap.measure import as_arguments
from sparseprop.swap.plan import SwapPlan
from sparseprop.swap.replace import pruned_weights, swap_modules, to_dense

__all__ = [
    "LossFn",
    "MakeOptimizer",
    "Options",
    "both_forms",
    "default_loss",
    "default_optimizer",
    "first_shape",
    "layouts",
    "make_training",
]

LossFn = Callable[[Any], Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@dataclass(frozen=True)
class Options:
    """How a form of the model is trained."""

    example_input: object
    loss: LossFn
    optimizer: MakeOptimizer


def both_forms(model: nn.Module, example: object, plan: SwapPlan | None) -> tuple[nn.Module, nn.Module]:
    """The model in its dense and in its sparse form; both are new objects."""
    check_model(model, "profile")
    if any(isinstance(module, SparseLayer) for module in model.modules()):
        if plan is not None:
            raise SparsePropError("profile takes a plan for a dense model; this one is swapped already.")
        sparse = copy.deepcopy(model, dict(pruned_weights(model)))
        return to_dense(model, inplace=False), sparse
    sparse = swap_modules(model, None if plan else example, plan=plan, inplace=False)
    return to_dense(sparse, inplace=False), sparse


def layouts(model: nn.Module, example: object) -> list[str]:
    """Layouts worth trying for the dense parts of a model."""
    args, kwargs = as_arguments(example)
    images = any(isinstance(x, Tensor) and x.dim() == 4 for x in (*args, *kwargs.values()))
    convolves = any(getattr(module, "kernel_size", None) is not None for module in model.modules())
    return ["contiguous", "channels_last"] if images and convolves else ["contiguous"]


def make_training(model: nn.Module, layout: str, options: Options) -> Training:
    """A copy of the model in a layout, ready to train."""
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=form)
    args, kwargs = as_arguments(options.example_input)
    args, kwargs = tuple(_laid(x, form) for x in args), {key: _laid(x, form) for key, x in kwargs.items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise SparsePropError("profile found nothing to train: no parameter requires a gradient.")
    return Training(model, lambda: model(*args, **kwargs), options.loss, options.optimizer(trained))


def _laid(x: Any, form: torch.memory_format) -> Any:
    return x.contiguous(memory_format=form) if isinstance(x, Tensor) and x.dim() == 4 else x


def default_optimizer(parameters: Any) -> torch.optim.Optimizer:
    """SGD with momentum, at a rate that leaves the model about as it is."""
    return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)


def default_loss(output: Any) -> Tensor:
    """Cross-entropy of fixed labels for (batch, classes), else the mean of squares."""
    tensor = _first_tensor(output)
    if tensor.dim() == 2:
        classes = tensor.shape[1]
        labels = torch.arange(tensor.shape[0], device=tensor.device) % classes
        return functional.cross_entropy(tensor, labels)
    return tensor.square().mean()


def _first_tensor(output: Any) -> Tensor:
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(output, Mapping | tuple | list) else (output,):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    what = f"{output.dtype} tensor" if isinstance(output, Tensor) else type(output).__name__
    raise SparsePropError(f"profile cannot make a loss of a {what}; pass loss=..., a function of the output.")


def first_shape(example: object) -> tuple[int, ...]:
    """Shape of the first tensor in an example."""
    args, kwargs = as_arguments(example)
    return next((tuple(x.shape) for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), ())
