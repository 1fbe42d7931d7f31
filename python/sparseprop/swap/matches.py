"""Calls of a batch norm in a module's own forward, with what can be done at once: the addition and ReLU, or
the ReLU and max pooling, behind it, the sparse layer in front of it; or a depthwise convolution between two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from sparseprop.nn.hooks import hooked
from sparseprop.nn.norm import norm_behind
from sparseprop.nn.pool import MaxPool2d
from sparseprop.swap import graphs
from sparseprop.swap.chains import Chain, chains, inlined_children

__all__ = ["Match", "Matches", "NormCall", "matches", "norm_calls", "why_alone"]


@dataclass(frozen=True)
class NormCall:
    """One call of a batch norm with what can be done at once.

    Attributes:
        norm: the batch norm's name in the module.
        relu: the name of the ReLU module called with it, `graphs.FUNCTION` for a function, None if none.
        adds: whether something is added in between.
        layer: the name of the sparse layer in front of it, None if it is to be called on its own.
        pool: the name of the max pooling behind the ReLU that is called with it, None if none.
        conv: the name of the depthwise convolution that it is in one chain with, None if none.
    """

    norm: str
    relu: str | None
    adds: bool = False
    layer: str | None = None
    pool: str | None = None
    conv: str | None = None


@dataclass(frozen=True)
class Matches:
    """What to replace in the graph of a module's forward.

    Attributes:
        found: all in one graph, and apart from each other.
        inlined: names of the children that the graph looks into.
    """

    found: tuple[Match | Chain, ...]
    inlined: tuple[str, ...] = ()

    def calls(self) -> set[NormCall]:
        """All batch norms in there."""
        return {call for match in self.found for call in _calls(match)}

    def modules(self) -> set[str]:
        """Names of all modules in there, whose calls become part of others."""
        return {str(n.target) for match in self.found for n in match.replaced() if n.op == "call_module"}


def norm_calls(module: nn.Module) -> tuple[NormCall, ...]:
    """The calls in the module's own forward that `rewrite` would change; none if it cannot be traced.

    Nor if that forward sets attributes or draws random numbers itself: a traced one would not.
    """
    near = [module, *inlined_children(module).values()]
    children = [child for parent in near for child in parent.children()]
    has_norm = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in children)
    if not has_norm or "forward" in vars(module):
        return ()
    found = [matches(module, training).calls() for training in (True, False)]
    return tuple(sorted(found[0] & found[1], key=lambda call: call.norm))


def why_alone(owner: nn.Module, name: str) -> str:
    """Why the owner's forward calls the batch norm of that name with nothing else, in a few words."""
    if not name:  # a model that is a batch norm and nothing else
        return "no ReLU alone behind it"
    if "forward" in vars(owner):
        return "a forward was put in the place of its owner's"
    graph, reason = graphs.own_graph(owner, owner.training)
    if graph is None:
        return reason
    for node in graph.nodes:
        if graphs.child(node, owner) is owner._modules.get(name):
            after = graphs.child(graphs.only_user(node), owner)
            if any(part is not None and hooked(part) for part in (graphs.child(node, owner), after)):
                return "hooks between it and its ReLU"
    return "no ReLU alone behind it"


@dataclass(frozen=True)
class Match:
    """The nodes of one `NormCall` in a graph."""

    call: NormCall
    cap: float
    layer: fx.Node | None
    norm: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None
    pool: fx.Node | None = None

    def other(self) -> Any:
        """What is added to the norm's result, as the graph stands."""
        return next((term for term in self.add.args if term is not self.norm), None) if self.add else None

    def insert(self, graph: fx.Graph) -> fx.Node:
        """One call for all that is replaced."""
        kwargs: dict[str, Any] = {"cap": self.cap} if self.relu else {}
        if self.add:
            kwargs["residual"] = self.other()
            if graphs.is_call(self.add, graphs.IN_PLACE_ADDS):
                kwargs["in_place"] = True
        if self.pool:
            kwargs["pool"] = graph.get_attr(str(self.pool.target))
        if self.layer is None:
            return graph.call_module(str(self.norm.target), self.norm.args, kwargs)
        modules = [graph.get_attr(str(node.target)) for node in (self.norm, self.layer)]
        return graph.call_function(norm_behind, (*modules, *self.layer.args), kwargs)

    def replaced(self) -> list[fx.Node]:
        """Last call first."""
        return [node for node in (self.pool, self.relu, self.add, self.norm, self.layer) if node is not None]


def matches(module: nn.Module, training: bool) -> Matches:
    """What to replace in the graph of the module's forward in that mode."""
    inlined = inlined_children(module)
    found = _found(module, training, inlined) if inlined else ()
    if any(isinstance(match, Chain) for match in found):
        return Matches(found, tuple(inlined))
    return Matches(_found(module, training, {}))


def _found(module: nn.Module, training: bool, inlined: dict[str, nn.Module]) -> tuple[Match | Chain, ...]:
    graph, _ = graphs.own_graph(module, training, tuple(inlined.values()))
    if graph is None:
        return ()
    whole = list(chains(graph, module, training))
    taken = {node for match in whole for node in match.replaced()}
    return *whole, *_matches(graph, module, taken)


def _calls(match: Match | Chain) -> list[NormCall]:
    if isinstance(match, Match):
        return [match.call]
    conv = graphs.name_of(match.conv)
    calls = [NormCall(str(match.second.target), match.relus[1], conv=conv)]
    if match.first is not None:
        layer = graphs.name_of(match.layer)
        calls.append(NormCall(str(match.first.target), match.relus[0], layer=layer, conv=conv))
    if match.project is not None:
        project = match.project
        calls.append(NormCall(str(project.norm.target), project.relu, layer=graphs.name_of(project.layer)))
    return calls


def _matches(graph: fx.Graph, module: nn.Module, taken: set[fx.Node]) -> Iterator[Match]:
    for node in graph.nodes:
        if node in taken or not graphs.is_norm_call(node, module):
            continue
        layer = graphs.layer_before(node, module)
        call = NormCall(str(node.target), None, layer=graphs.name_of(layer))
        found = _with_what_follows(node, module, layer) or Match(call, 0.0, layer, node)
        if len(found.replaced()) > 1 and graphs.may_wait(found.replaced(), module):
            yield found


def _with_what_follows(node: fx.Node, module: nn.Module, layer: fx.Node | None) -> Match | None:
    """The norm with the calls behind it; None if there are none."""
    relu, add = graphs.only_user(node), None
    if relu is not None and _adds_to(relu, node):
        add, relu = relu, graphs.only_user(relu)
    if relu is None or (known := graphs.activation(relu, module)) is None:
        return None
    name, cap = known
    pool = None if add else _pool_behind(relu, module)
    call = NormCall(str(node.target), name, add is not None, graphs.name_of(layer), graphs.name_of(pool))
    match = Match(call, cap, layer, node, add, relu, pool)
    wanted = add is None or isinstance(match.other(), fx.Node)
    return match if wanted and graphs.may_wait(match.replaced(), module) else None


def _adds_to(node: fx.Node, norm: fx.Node) -> bool:
    """Whether it adds something to the norm's result; in place, to that alone."""
    if len(node.args) != 2 or node.kwargs:
        return False
    in_place = graphs.is_call(node, graphs.IN_PLACE_ADDS) and node.args[0] is norm
    return in_place or graphs.is_call(node, graphs.ADDS)


def _pool_behind(node: fx.Node, module: nn.Module) -> fx.Node | None:
    user = graphs.only_user(node)
    if user is None or not graphs.is_plain(user):
        return None
    pool = graphs.child(user, module)
    known = pool is not None and type(pool) in (nn.MaxPool2d, MaxPool2d)
    return user if known and not hooked(cast(nn.Module, pool)) else None
