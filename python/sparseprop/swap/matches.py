"""Calls of a batch norm in a module's own forward, with what can be done at once: the addition and ReLU, or
the ReLU and max pooling, behind it, the sparse layer in front of it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.hooks import hooked
from sparseprop.nn.norm import NATIVE_NORMS, NativeNorm, norm_behind
from sparseprop.nn.pool import MaxPool2d
from sparseprop.swap.tracing import trace

__all__ = ["FUNCTION", "Match", "NormCall", "matches", "norm_calls"]

FUNCTION = "relu()"
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (functional.relu, torch.relu, torch.relu_, "relu", "relu_")


@dataclass(frozen=True)
class NormCall:
    """One call of a batch norm with what can be done at once.

    Attributes:
        norm: the batch norm's name in the module.
        relu: the name of the ReLU module that is called with it, `FUNCTION` for a function, None if none.
        adds: whether something is added in between.
        layer: the name of the sparse layer in front of it, None if it is to be called on its own.
        pool: the name of the max pooling behind the ReLU that is called with it, None if none.
    """

    norm: str
    relu: str | None
    adds: bool
    layer: str | None
    pool: str | None = None


def norm_calls(module: nn.Module) -> tuple[NormCall, ...]:
    """The calls in the module's own forward that `rewrite` would change; none if it cannot be traced.

    Nor if that forward sets attributes or draws random numbers itself: a traced one would not.
    """
    has_norm = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.children())
    if not has_norm or "forward" in vars(module):
        return ()
    found = [{match.call for match in matches(module, training)} for training in (True, False)]
    return tuple(sorted(found[0] & found[1], key=lambda call: call.norm))


@dataclass(frozen=True)
class Match:
    """The nodes of one `NormCall` in a graph."""

    call: NormCall
    layer: fx.Node | None
    norm: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None
    pool: fx.Node | None = None

    @property
    def last(self) -> fx.Node:
        """The node whose result is that of all."""
        return self.pool or self.relu or self.norm

    def other(self) -> Any:
        """What is added to the norm's result, as the graph stands."""
        return next((term for term in self.add.args if term is not self.norm), None) if self.add else None

    def insert(self, graph: fx.Graph) -> fx.Node:
        """One call for all that is replaced."""
        kwargs = {"residual": self.other(), "cap": torch.inf} if self.relu else {}
        if self.pool:
            kwargs["pool"] = graph.get_attr(str(self.pool.target))
        if self.layer is None:
            return graph.call_module(str(self.norm.target), self.norm.args, kwargs)
        modules = [graph.get_attr(str(node.target)) for node in (self.norm, self.layer)]
        return graph.call_function(norm_behind, (*modules, *self.layer.args), kwargs)

    def replaced(self) -> list[fx.Node]:
        """Last call first."""
        return [node for node in (self.pool, self.relu, self.add, self.norm, self.layer) if node is not None]


class _OwnCode(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module, training: bool) -> fx.Graph | None:
    kind, mode = type(module), module.training
    module.__class__ = getattr(kind, "_base", kind)
    module.training = training
    try:
        return trace(_OwnCode(), module)[0]
    finally:
        module.__class__, module.training = kind, mode


def matches(module: nn.Module, training: bool) -> Iterator[Match]:
    """What to replace in the graph of the module's forward in that mode; all share one graph."""
    graph = _trace(module, training)
    for node in () if graph is None else graph.nodes:
        norm = _child(node, module)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not _plain_call(node, norm):
            continue
        layer = _layer_before(node, module)
        found = _with_what_follows(node, module, layer) or Match(
            NormCall(str(node.target), None, False, _name(layer)), layer, node
        )
        if (layer is not None or found.last is not node) and _movable(found, module):
            yield found


def _with_what_follows(node: fx.Node, module: nn.Module, layer: fx.Node | None) -> Match | None:
    """The norm with the calls behind it; None if there are none or `PassingReLU` does as well."""
    relu, add = _only_user(node), None
    if relu is not None and _is(relu, _ADDS) and len(relu.args) == 2 and not relu.kwargs:
        add, relu = relu, _only_user(relu)
    if relu is None or (name := _relu_name(relu, module)) is None:
        return None
    pool = None if add else _pool_behind(relu, module)
    call = NormCall(str(node.target), name, add is not None, _name(layer), _name(pool))
    match = Match(call, layer, node, add, relu, pool)
    wanted = isinstance(match.other(), fx.Node) or (add is None and (name == FUNCTION or pool is not None))
    return match if wanted and _movable(match, module) else None


def _pool_behind(node: fx.Node, module: nn.Module) -> fx.Node | None:
    user = _only_user(node)
    if user is None or len(user.args) != 1 or user.kwargs:
        return None
    pool = _child(user, module)
    known = pool is not None and type(pool) in (nn.MaxPool2d, MaxPool2d)
    return user if known and not hooked(cast(nn.Module, pool)) else None


def _movable(match: Match, module: nn.Module) -> bool:
    """Whether the calls may wait for the last of them."""
    *moved, first = match.replaced()
    moved_past = [step for step in _between(first, match.last) if step not in moved]
    targets = {node.target for node in (first, *moved[1:]) if node.op == "call_module"}
    return not any(_writes(step, module) or step.target in targets for step in moved_past)


def _layer_before(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The sparse layer whose output the norm alone reads."""
    before = node.args[0]
    if not isinstance(before, fx.Node) or len(before.users) != 1 or len(before.args) != 1 or before.kwargs:
        return None
    layer = _child(before, module)
    return before if isinstance(layer, SparseLayer) and not hooked(layer) else None


def _name(node: fx.Node | None) -> str | None:
    return None if node is None else str(node.target)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call may change a tensor that it was given, which the norm, called later, might read."""
    if node.op == "call_module":
        return any(
            getattr(part, "inplace", False) for part in module.get_submodule(str(node.target)).modules()
        )
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = str(name).endswith("_") or name in ("setitem", "iadd", "isub", "imul", "itruediv")
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _plain_call(node: fx.Node, norm: nn.Module) -> bool:
    known = isinstance(norm, NativeNorm) or type(norm) in NATIVE_NORMS
    return known and len(node.args) == 1 and not node.kwargs and not hooked(norm)


def _relu_name(node: fx.Node, module: nn.Module) -> str | None:
    child = _child(node, module)
    if isinstance(child, nn.ReLU):
        return None if hooked(child) else str(node.target)
    return FUNCTION if _is(node, _RELUS) and not set(node.kwargs) - {"inplace"} else None


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _child(node: fx.Node, module: nn.Module) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
