"""Modules whose own forward adds to a batch norm's result or calls a ReLU on it: the norm takes both along.

Such a module gets a class of its own, derived from its class, whose forward is the traced and changed one.
Only the module's own code is traced: its children stay calls, with their hooks.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional

from sparseprop.nn.norm import NATIVE_NORMS, NativeNorm
from sparseprop.swap.tracing import trace

__all__ = ["FUNCTION", "NormCall", "Rewritten", "norm_calls", "restore", "rewrite"]

FUNCTION = "relu()"
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (functional.relu, torch.relu, torch.relu_, "relu", "relu_")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RUNS = "_sparseprop_runs"


@dataclass(frozen=True)
class NormCall:
    """One call of a batch norm with what can be done at once.

    Attributes:
        norm: the batch norm's name in the module.
        relu: the name of the ReLU module behind it, `FUNCTION` for a function.
        adds: whether something is added in between.
    """

    norm: str
    relu: str
    adds: bool


class Rewritten(nn.Module):
    """Mixed into a module's class by `rewrite`; runs the changed forward of the mode it is in."""

    _base: type[nn.Module]
    _sparseprop_runs: dict[bool, Callable[..., Any]]  # by `training`, which the traced code may depend on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        return self._sparseprop_runs[self.training](self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != _RUNS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _attach(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._base,), self.__getstate__()


def norm_calls(module: nn.Module) -> tuple[NormCall, ...]:
    """The calls in the module's own forward that `rewrite` would change; none if it cannot be traced.

    Nor if that forward sets attributes or draws random numbers itself: a traced one would not.
    """
    has_norm = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.children())
    if not has_norm or "forward" in vars(module):
        return ()
    found = [{match.call for match in _matches(module, training)} for training in (True, False)]
    return tuple(sorted(found[0] & found[1], key=lambda call: call.norm))


def rewrite(module: nn.Module) -> None:
    """Change the module's class; its batch norms must be native by now."""
    if not isinstance(module, Rewritten):
        module.__class__ = _class(type(module))
    _attach(cast(Rewritten, module))


def restore(module: Rewritten) -> None:
    """Undo `rewrite`."""
    vars(module).pop(_RUNS, None)
    cast(nn.Module, module).__class__ = module._base


_classes: dict[type[nn.Module], type[Rewritten]] = {}


def _class(base: type[nn.Module]) -> type[Rewritten]:
    if base not in _classes:
        _classes[base] = type(f"Fused{base.__name__}", (Rewritten, base), {"_base": base})
    return _classes[base]


def _blank(base: type[nn.Module]) -> Rewritten:
    kind = _class(base)
    return kind.__new__(kind)


def _attach(module: Rewritten) -> None:
    vars(module)[_RUNS] = {training: _forward(module, training) for training in (True, False)}


def _forward(module: nn.Module, training: bool) -> Callable[..., Any]:
    """The module's forward, as a function of it, with every match made one call."""
    matches = list(_matches(module, training))
    if not matches:
        return getattr(module, "_base", type(module)).forward
    graph = matches[0].norm.graph
    for match in matches:
        with graph.inserting_before(match.last):
            kwargs = {"residual": match.other(), "cap": torch.inf}
            call = graph.call_module(str(match.norm.target), match.norm.args, kwargs)
        match.last.replace_all_uses_with(call)
        for node in (match.last, match.add, match.norm):
            if node is not None:
                graph.erase_node(node)
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return cast("Callable[..., Any]", names["forward"])


@dataclass(frozen=True)
class _Match:
    call: NormCall
    norm: fx.Node
    add: fx.Node | None
    last: fx.Node

    def other(self) -> Any:
        """What is added to the norm's result, as the graph stands."""
        return next((term for term in self.add.args if term is not self.norm), None) if self.add else None


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


def _matches(module: nn.Module, training: bool) -> Iterator[_Match]:
    graph = _trace(module, training)
    for node in () if graph is None else graph.nodes:
        norm = _child(node, module)
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not _plain_call(node, norm):
            continue
        last, add = _only_user(node), None
        if last is not None and _is(last, _ADDS) and len(last.args) == 2 and not last.kwargs:
            add, last = last, _only_user(last)
        if last is None or (relu := _relu_name(last, module)) is None:
            continue
        match = _Match(NormCall(str(node.target), relu, add is not None), node, add, last)
        wanted = isinstance(match.other(), fx.Node) or (add is None and relu == FUNCTION)  # else PassingReLU
        moved_past = [step for step in _between(node, last) if step is not add]
        if wanted and not any(_writes(step, module) or step.target == node.target for step in moved_past):
            yield match


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
    return known and len(node.args) == 1 and not node.kwargs and not _hooked(norm)


def _relu_name(node: fx.Node, module: nn.Module) -> str | None:
    child = _child(node, module)
    if isinstance(child, nn.ReLU):
        return None if _hooked(child) else str(node.target)
    return FUNCTION if _is(node, _RELUS) and not set(node.kwargs) - {"inplace"} else None


def _is(node: fx.Node, targets: tuple[Any, ...]) -> bool:
    return node.op in ("call_function", "call_method") and node.target in targets


def _child(node: fx.Node, module: nn.Module) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _hooked(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in _HOOKS)
