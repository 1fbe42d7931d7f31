"""What running a model may change besides its results: remembered, compared and put back."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.nn.watch import WeightWatch

__all__ = ["Attributes", "ModelState", "RandomStates", "attributes", "put_back", "random_states_kept", "same"]

Attributes = dict[str, tuple[Any, Any]]


class RandomStates:
    """Of the generators that code draws from without naming one."""

    def __init__(self) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._numpy: Any = np.random.get_state()  # noqa: NPY002 # the one that models draw from

    def changed(self) -> bool:
        """Whether somebody has drawn since."""
        numpy: Any = np.random.get_state()  # noqa: NPY002
        return (
            random.getstate() != self._python
            or not torch.equal(torch.get_rng_state(), self._torch)
            or numpy[2:] != self._numpy[2:]
            or not np.array_equal(numpy[1], self._numpy[1])
        )

    def put_back(self) -> None:
        """Let them go on as if nobody had."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        np.random.set_state(self._numpy)  # noqa: NPY002


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The global generators of torch, numpy and Python go on afterwards as if nobody had drawn from them."""
    drawn = RandomStates()
    try:
        yield
    finally:
        drawn.put_back()


def attributes(module: nn.Module) -> Attributes:
    """The module's attributes, and what those that are containers hold."""
    return {
        key: (value, copy.copy(value) if type(value) in (list, dict, set) else None)
        for key, value in vars(module).items()
    }


def same(one: Attributes, other: Attributes) -> bool:
    """Whether these are the same objects under the same names, also in containers."""
    return one.keys() == other.keys() and all(
        held is other[key][0] and _elements(inside) == _elements(other[key][1])
        for key, (held, inside) in one.items()
    )


def _elements(container: Any) -> list[int]:
    held = container.values() if isinstance(container, dict) else container or ()
    return [id(element) for element in held]


def put_back(module: nn.Module, before: Attributes) -> None:
    """Give a module its attributes back, and containers what they held."""
    for key in vars(module).keys() - before.keys():
        del vars(module)[key]
    for key, (value, inside) in before.items():
        vars(module)[key] = value
        if type(value) is list:
            value[:] = inside
        elif type(value) in (dict, set):
            value.clear()
            value.update(inside)


class ModelState:
    """What a forward may change in a model, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._held = [(module, attributes(module)) for module in modules]
        objects = [value for module in modules for value in vars(module).values()]
        self._watches = [(watch, dict(vars(watch))) for watch in objects if isinstance(watch, WeightWatch)]
        self._parameters = [(name, p, _version(p)) for name, p in model.named_parameters()]
        with torch.inference_mode(False):  # a copy may have to take the place of its original
            self._copies = [
                (tensors, key, tensor, _version(tensor), tensor.detach().clone())
                for module in modules
                for tensors in _written_by_forward(module)
                for key, tensor in tensors.items()
                if tensor is not None
            ]

    def put_back(self) -> None:
        """Make the model what it was, but for parameters without a copy."""
        for module, before in self._held:
            put_back(module, before)
        for watch, known in self._watches:
            vars(watch).update(known)
        with torch.no_grad():
            for tensors, key, tensor, version, copied in self._copies:
                if _unwritten(tensor, version, copied):
                    continue
                try:
                    tensor.copy_(copied)
                except RuntimeError:  # it was resized, or may not be written to here
                    tensors[key] = copied

    def check(self) -> None:
        """Refuse a model that wrote to parameters without a copy."""
        copied = {id(tensor) for _, _, tensor, _, _ in self._copies}
        for name, parameter, version in self._parameters:
            if id(parameter) not in copied and _version(parameter) != version:
                raise SparsePropError(
                    f"The model's forward writes to parameter {name!r}, which cannot be undone; plan a "
                    "copy.deepcopy of the model, or without example_input."
                )


def _written_by_forward(module: nn.Module) -> list[dict[str, Any]]:
    # copies of all parameters would be a second model in memory
    renormalizes = getattr(module, "max_norm", None) is not None
    return [module._buffers, module._parameters] if renormalizes else [module._buffers]


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _unwritten(tensor: torch.Tensor, version: int | None, copied: torch.Tensor) -> bool:
    if _version(tensor) != version:
        return False
    try:
        return torch.equal(tensor, copied)  # writes to `tensor.data` do not count as a version
    except RuntimeError:  # nothing compares sparse tensors, nor some small types
        return True
