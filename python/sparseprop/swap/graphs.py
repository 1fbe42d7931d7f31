"""The graph of a module's own forward, and questions about its nodes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from sparseprop.nn.base import SparseLayer
from sparseprop.nn.hooks import hooked
from sparseprop.nn.norm import NATIVE_NORMS, RELU_CAPS
from sparseprop.swap.tracing import IN_PLACE, Watched, trace

__all__ = [
    "ADDS",
    "FUNCTION",
    "IN_PLACE_ADDS",
    "activation",
    "child",
    "is_call",
    "is_norm_call",
    "is_plain",
    "is_sparse_layer",
    "layer_before",
    "may_wait",
    "name_of",
    "only_user",
    "own_graph",
    "writes",
]

FUNCTION = "relu()"
ADDS = (operator.add, torch.add, "add")
IN_PLACE_ADDS = (operator.iadd, "add_")
_NORMS = {*NATIVE_NORMS, *NATIVE_NORMS.values()}
_ACTIVATIONS = {
    functional.relu: torch.inf, torch.relu: torch.inf, torch.relu_: torch.inf, "relu": torch.inf,
    "relu_": torch.inf, functional.relu6: 6.0,
}  # fmt: skip


class _OwnCode(Watched):
    def __init__(self, inlined: Sequence[nn.Module]) -> None:
        super().__init__()
        self.inlined = set(map(id, inlined))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self.inlined


def own_graph(
    module: nn.Module, training: bool, inlined: Sequence[nn.Module] = ()
) -> tuple[fx.Graph | None, str]:
    """The module's forward in that mode, with children as calls, but those `inlined`; or None and why not.

    Traced twice, under circumstances that a forward may ask for, so that one that does is not mistaken for
    what it is in one of them.
    """
    modes = [(part, part.training) for part in module.modules()]
    kinds = [(traced, type(traced)) for traced in (module, *inlined)]
    for traced, kind in kinds:
        traced.__class__ = getattr(kind, "_base", kind)
    try:
        graph, reason = _traced(module, inlined, training, children_train=True)
        other = None if graph is None else _traced(module, inlined, training, children_train=False)[0]
    finally:
        for part, mode in modes:
            vars(part)["training"] = mode  # ten times as fast as by the attribute
        for traced, kind in kinds:
            traced.__class__ = kind
    if graph is None:
        return None, reason
    if other is None or str(graph) != str(other):
        return None, "its forward asks for gradients, autocast or the mode of its children"
    called = [child(node, module) for node in graph.nodes]
    if any(part is not None and type(part).__call__ is not nn.Module.__call__ for part in called):
        return None, "one of its children has a __call__ of its own"
    return graph, ""


def _traced(
    module: nn.Module, inlined: Sequence[nn.Module], training: bool, children_train: bool
) -> tuple[fx.Graph | None, str]:
    """With gradients recorded and without autocast if children train, the other way round if not."""
    for part in module.modules():
        vars(part)["training"] = children_train
    module.training = training
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(not children_train))
        modes.enter_context(torch.set_grad_enabled(children_train))
        modes.enter_context(torch.autocast("cpu", enabled=not children_train))
        return trace(_OwnCode(inlined), module)


def child(node: fx.Node | None, module: nn.Module) -> nn.Module | None:
    """The module that a node calls."""
    return module.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None


def is_call(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    """Whether it calls one of these functions or methods."""
    return node.op in ("call_function", "call_method") and node.target in targets


def is_plain(node: fx.Node) -> bool:
    """Whether it has one argument alone."""
    return len(node.args) == 1 and not node.kwargs


def is_norm_call(node: fx.Node, module: nn.Module) -> bool:
    """Whether it calls a batch norm that is, or can become, native."""
    norm = child(node, module)
    return norm is not None and type(norm) in _NORMS and is_plain(node) and not hooked(norm)


def activation(node: fx.Node | None, module: nn.Module) -> tuple[str, float] | None:
    """The name of the ReLU or ReLU6 that a node calls, `FUNCTION` for a function, and its cap."""
    called = child(node, module)
    if node is not None and type(called) in RELU_CAPS and called is not None:
        return None if hooked(called) else (str(node.target), RELU_CAPS[type(called)])
    if node is None or not is_call(node, tuple(_ACTIVATIONS)) or set(node.kwargs) - {"inplace"}:
        return None
    return FUNCTION, _ACTIVATIONS[node.target]


def layer_before(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """The sparse layer whose output the node alone reads."""
    before = node.args[0]
    if not isinstance(before, fx.Node) or len(before.users) != 1 or not is_plain(before):
        return None
    return before if is_sparse_layer(child(before, module)) else None


def is_sparse_layer(module: nn.Module | None) -> bool:
    """Whether it is a sparse layer whose forward nobody has changed."""
    if not isinstance(module, SparseLayer):
        return False
    return type(module).forward is SparseLayer.forward and not hooked(module)


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads its result, None if there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def name_of(node: fx.Node | None) -> str | None:
    """The name of the module it calls."""
    return None if node is None else str(node.target)


def may_wait(nodes: Sequence[fx.Node], module: nn.Module) -> bool:
    """Whether the calls, last one first, may all wait for the last of them."""
    last, *_ = nodes
    first, moved = nodes[-1], nodes[1:]
    moved_past = [step for step in _between(first, last) if step not in moved]
    alone = {id(part) for node in moved for part in _parts(node, module)}
    known: dict[int, bool] = {}
    return not any(
        writes(step, module, known) or any(id(part) in alone for part in _parts(step, module))
        for step in moved_past
    )


def _parts(node: fx.Node, module: nn.Module) -> Iterable[nn.Module]:
    """The module that a node calls, and all in it."""
    called = child(node, module)
    return () if called is None else called.modules()


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first
    while node is not last:
        node = node.next
        if node is not last:
            yield node


def writes(node: fx.Node, module: nn.Module, known: dict[int, bool]) -> bool:
    """Whether a call may change a tensor that it was given, which a call moved past it might read.

    `known`: what was found out before about the modules within.
    """
    called = child(node, module)
    if called is not None:
        if id(called) not in known:
            known[id(called)] = _may_write(called, known)
        return known[id(called)]
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = str(name).endswith("_") or name in ("setitem", *IN_PLACE)
    return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _may_write(module: nn.Module, known: dict[int, bool]) -> bool:
    """Whether a module's own code may change what it is given: other people's is looked through."""
    base = getattr(type(module), "_base", type(module))
    if hooked(module) or getattr(module, "inplace", False):
        return True
    if base.__module__.startswith(("torch.nn.modules.", "sparseprop.nn.")):
        return any(_may_write(part, known) for part in module.children())
    graphs = [own_graph(module, training)[0] for training in (True, False)]
    return any(graph is None or any(writes(node, module, known) for node in graph.nodes) for graph in graphs)
