"""What running a model may change besides its results: remembered, compared and put back."""

from __future__ import annotations

import pickle
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from sparseprop.errors import SparsePropError
from sparseprop.nn.watch import WeightWatch

__all__ = ["Inside", "ModelState", "RandomStates", "attributes", "put_back", "random_states_kept", "same"]

Inside = Any  # of an object: see `_inside`


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


def attributes(module: nn.Module) -> Inside:
    """The module's attributes, and what those that are containers or generators of random numbers hold."""
    return _inside(vars(module), 0)


def same(one: Inside, other: Inside) -> bool:
    """Whether these are the same objects under the same names, also in containers, in the same state."""
    if not isinstance(one, list) or not isinstance(other, list):
        return bool(one == other)
    return len(one) == len(other) and all(
        (key is other_key or key == other_key) and held is other_held and same(inside, other_inside)
        for (key, held, inside), (other_key, other_held, other_inside) in zip(one, other, strict=True)
    )


def put_back(module: nn.Module, before: Inside) -> None:
    """Give a module its attributes back, and containers and generators what they held."""
    _restore(vars(module), before)


_PLAIN = (bool, int, float, str, tuple, type(None), torch.Tensor, nn.Parameter)
_DEEPEST = 4


def _inside(value: Any, depth: int) -> Inside:
    """What can be changed in an object: (key, object, what is inside) of a container, a generator's state."""
    kind = type(value)  # `isinstance` would ask the values of a trace
    if kind in _PLAIN or depth > _DEEPEST:
        return None
    if issubclass(kind, dict):
        return [(key, held, _inside(held, depth + 1)) for key, held in value.items()]
    if issubclass(kind, list | set | deque):
        return [(None, held, _inside(held, depth + 1)) for held in value]
    if issubclass(kind, random.Random):
        return value.getstate()
    if issubclass(kind, np.random.Generator):
        return pickle.dumps(value.bit_generator.state)
    return value.get_state().numpy().tobytes() if issubclass(kind, torch.Generator) else None


def _restore(value: Any, before: Inside) -> None:
    if before is None:
        return
    if isinstance(value, random.Random):
        value.setstate(before)
    elif isinstance(value, np.random.Generator):
        value.bit_generator.state = pickle.loads(before)
    elif isinstance(value, torch.Generator):
        value.set_state(torch.frombuffer(bytearray(before), dtype=torch.uint8))
    else:
        _refill(value, before)


def _refill(container: Any, before: Inside) -> None:
    for _, held, inside in before:
        _restore(held, inside)
    now = container.items() if isinstance(container, dict) else ((None, held) for held in container)
    if [(key, id(held)) for key, held in now] == [(key, id(held)) for key, held, _ in before]:
        return
    container.clear()
    for key, held, _ in before:
        if isinstance(container, dict):
            container[key] = held
        elif isinstance(container, set):
            container.add(held)
        else:
            container.append(held)


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
