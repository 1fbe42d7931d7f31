"""`torch.fx` tracing that leaves the model, and the random numbers to come, as they were."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

__all__ = ["Watched", "none_by_default", "trace"]

_TORCH = str(Path(torch.__file__).parent)

_Held = dict[str, tuple[Any, Any]]


class _Proxy(fx.Proxy):
    """A value whose class is asked for in vain: `isinstance` finds no tensor, and takes another branch."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            raise TypeError("code that asks for the class of a value")
        return _Proxy


class Watched(fx.Tracer):
    """Refuses code that decides by the class of its values, which all are proxies; buffers too, so that what
    a forward does to them in place is part of its graph, and not done while tracing.
    """

    proxy_buffer_attributes = True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """As `fx.Tracer` does."""
        return _Proxy(node, self)


def none_by_default(model: nn.Module) -> dict[str, None]:
    """The arguments of a model's forward that are None unless they are given."""
    forward = getattr(type(model), "_base", type(model)).forward
    arguments = inspect.signature(forward).parameters.values()
    return {argument.name: None for argument in arguments if argument.default is None}


def trace(tracer: fx.Tracer, model: nn.Module) -> tuple[fx.Graph | None, str]:
    """The graph of a model's forward, or None and why not.

    It holds where the arguments that are None by default are not given: `is None` asks a proxy in vain. A
    forward that sets attributes or draws random numbers itself has none: running its graph would do neither.
    (Random layers are calls like others.)
    """
    held = [(module, _contents(module)) for module in model.modules()]
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    graph, reason = None, ""
    try:
        graph = tracer.trace(model, concrete_args=none_by_default(model) or None)
    except Exception as error:  # whatever the model's code raises when it meets a proxy
        reason = f"torch.fx cannot trace the model: {type(error).__name__}"
    if random.getstate() != random_state or not torch.equal(torch.get_rng_state(), torch_state):
        graph, reason = None, reason or "its forward draws random numbers"
        random.setstate(random_state)
        torch.set_rng_state(torch_state)
    for module, before in held:
        if not _same(before, _contents(module)):
            graph, reason = None, reason or "its forward sets attributes"
            _put_back(module, before)
    return graph, reason


def _contents(module: nn.Module) -> _Held:
    """The module's attributes, and what those that are containers hold."""
    return {
        key: (value, copy.copy(value) if type(value) in (list, dict, set) else None)
        for key, value in vars(module).items()
    }


def _same(one: _Held, other: _Held) -> bool:
    return one.keys() == other.keys() and all(
        held is other[key][0] and _elements(inside) == _elements(other[key][1])
        for key, (held, inside) in one.items()
    )


def _elements(container: Any) -> list[int]:
    held = container.values() if isinstance(container, dict) else container or ()
    return [id(element) for element in held]


def _put_back(module: nn.Module, before: _Held) -> None:
    for key in vars(module).keys() - before.keys():
        del vars(module)[key]
    for key, (value, inside) in before.items():
        vars(module)[key] = value
        if type(value) is list:
            value[:] = inside
        elif type(value) in (dict, set):
            value.clear()
            value.update(inside)
