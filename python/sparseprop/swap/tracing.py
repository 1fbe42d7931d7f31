"""`torch.fx` tracing that leaves the model, and the random numbers to come, as they were.

A graph stands for a forward only if running it does all that the forward would: what a tracer misses is
looked for here, and refused.
"""

from __future__ import annotations

import gc
import inspect
import operator
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from sparseprop.swap.unchanged import RandomStates, attributes, put_back, same

__all__ = ["IN_PLACE", "Watched", "defaults", "trace"]

_TORCH = str(Path(torch.__file__).parent)

# functions of `operator` that stand for `a += b` and its like
IN_PLACE = (
    "iadd", "iand", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift", "isub",
    "itruediv", "ixor",
)  # fmt: skip


class _Proxy(fx.Proxy):
    """A value whose class is asked for in vain: `isinstance` finds no tensor, and takes another branch.

    Of `a += b`, `fx.Proxy` would make `a + b`, and lose what becomes of others that hold `a`.
    """

    tracer: Watched

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1).f_code.co_filename
        if not asking.startswith(_TORCH) or asking == torch.__file__:  # there: torch.is_tensor
            self.tracer.refuse("code that asks for the class of a value")
        return _Proxy

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            self.tracer.refuse("code that sets attributes of a value")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        self.tracer.refuse("code that asks for the length of a value")
        return 0


def _in_place(name: str) -> Any:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class Watched(fx.Tracer):
    """Refuses code that decides by the class of its values, which all are proxies, and calls under `no_grad`,
    `autocast` and the like, of which a graph knows nothing. Buffers are proxies too, so that what a forward
    does to them in place is part of its graph, and not done while tracing.
    """

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(autowrap_modules=())  # type: ignore[arg-type]  # `math`: a third of a trace's time
        self._modes = _modes()
        self.refused = False
        self._proxies: list[weakref.ref[fx.Proxy]] = []

    def refuse(self, why: str) -> None:
        """End the trace, also where the code catches what is raised and goes on."""
        self.refused = True
        raise TypeError(why)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """As `fx.Tracer` does: in vain, also where the code goes on."""
        self.refused = True
        return super().to_bool(obj)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As `fx.Tracer` does."""
        if _modes() != self._modes:
            self.refuse("code that switches gradients, autocast or inference mode")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """As `fx.Tracer` does."""
        made = _Proxy(node, self)
        self._proxies.append(weakref.ref(made))
        return made

    def kept(self) -> bool:
        """Whether, after tracing, somebody still holds a proxy: code that put its values somewhere."""
        for generation in range(3):  # proxies may be part of cycles, young ones
            if all(proxy() is None for proxy in self._proxies):
                return False
            gc.collect(generation)
        return any(proxy() is not None for proxy in self._proxies)


def _modes() -> tuple[Any, ...]:
    """What calls depend on without its being among their arguments."""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast


def defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments of a model's forward that need not be given, with what they are then."""
    forward = getattr(type(model), "_base", type(model)).forward
    arguments = inspect.signature(forward).parameters.values()
    return {arg.name: arg.default for arg in arguments if arg.default is not inspect.Parameter.empty}


def trace(tracer: Watched, model: nn.Module) -> tuple[fx.Graph | None, str]:
    """The graph of a model's forward, or None and why not.

    It holds where all arguments are tensors, and none that has a default is given: code may ask of those
    what a proxy would not answer. So it may of what a child returns, if that is taken apart. A forward that
    sets attributes, keeps values elsewhere or draws random numbers itself has no graph, nor has a decorated
    one: running it would do nothing of that. (Random layers are calls like others.)
    """
    if hasattr(getattr(type(model), "_base", type(model)).forward, "__wrapped__"):
        return None, "its forward is decorated"
    held = [(module, attributes(module)) for module in model.modules()]
    drawn = RandomStates()
    graph, reason = None, ""
    try:
        with warnings.catch_warnings(action="ignore"):  # of defaults that no assertion can compare
            graph = tracer.trace(model, concrete_args=defaults(model) or None)
    except Exception as error:  # whatever the model's code raises when it meets a proxy
        reason = f"torch.fx cannot trace the model: {type(error).__name__}"
    if graph is not None and (tracer.refused or any(map(_takes_apart, graph.nodes))):
        graph, reason = None, "its forward asks what a trace cannot answer"
    if drawn.changed():
        graph, reason = None, reason or "its forward draws random numbers"
        drawn.put_back()
    for module, before in held:
        if not same(before, attributes(module)):
            graph, reason = None, reason or "its forward sets attributes"
            put_back(module, before)
    if graph is not None and tracer.kept():
        graph, reason = None, "its forward keeps what it computes"
    return graph, reason


def _takes_apart(node: fx.Node) -> bool:
    """Whether it takes a part of what a child returned, which may be None or anything else."""
    given = node.args[0] if node.args else None
    return node.target is operator.getitem and isinstance(given, fx.Node) and given.op == "call_module"
