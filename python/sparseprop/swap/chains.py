"""Depthwise convolutions between batch norms in a module's own forward, or in containers there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import fx, nn

from sparseprop.nn.chain import depthwise_chain, is_plain_depthwise
from sparseprop.nn.hooks import hooked
from sparseprop.nn.inverted import inverted_residual
from sparseprop.swap import graphs

__all__ = ["Chain", "chains", "inlined_children"]


@dataclass(frozen=True)
class Projection:
    """The nodes of layer, batch norm[, activation]; see `Chain`."""

    layer: fx.Node
    norm: fx.Node
    relu: str | None
    cap: float
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Chain:
    """The nodes of [layer, batch norm, activation,] depthwise convolution, batch norm[, activation].

    Attributes:
        relus, caps: names and caps of the activations, None and 0 for those that are not there.
        nodes: all of them, last call first.
        project: what comes behind in evaluation, None if nothing that can be run with it.
    """

    layer: fx.Node | None
    first: fx.Node | None
    conv: fx.Node
    second: fx.Node
    relus: tuple[str | None, str | None]
    caps: tuple[float, float]
    nodes: tuple[fx.Node, ...]
    project: Projection | None = None

    def insert(self, graph: fx.Graph) -> fx.Node:
        """One call for all that is replaced."""
        layer, first, conv, second = (
            None if node is None else graph.get_attr(str(node.target))
            for node in (self.layer, self.first, self.conv, self.second)
        )
        args = self.nodes[-1].args[0], layer, first, self.caps[0], conv, second, self.caps[1]
        if self.project is None:
            return graph.call_function(depthwise_chain, args)
        behind = [graph.get_attr(str(node.target)) for node in (self.project.layer, self.project.norm)]
        return graph.call_function(inverted_residual, (*args, *behind, self.project.cap))

    def replaced(self) -> list[fx.Node]:
        """Last call first."""
        return [*(self.project.nodes if self.project else ()), *self.nodes]


def inlined_children(module: nn.Module) -> dict[str, nn.Module]:
    """By name, the containers in a module that one may look into: plain `nn.Sequential`s of other modules."""
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, nn.Sequential)
        and getattr(type(child), "_base", type(child)).forward is nn.Sequential.forward
        and "forward" not in vars(child)
        and not hooked(child)
        and not any(isinstance(part, nn.Sequential) for part in child)
    }


def chains(graph: fx.Graph, module: nn.Module, training: bool) -> Iterator[Chain]:
    """All chains in the graph of a mode, each with as much around its convolution as there is."""
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        conv = graphs.child(node, module)
        if conv is None or not is_plain_depthwise(conv) or hooked(conv) or not graphs.is_plain(node):
            continue
        second = graphs.only_user(node)
        if second is None or not graphs.is_norm_call(second, module):
            continue
        after = graphs.only_user(second)
        relu, cap = graphs.activation(after, module) or (None, 0.0)
        behind = (second,) if relu is None or after is None else (after, second)
        before, first, first_relu, first_cap = _before(node, module, taken)
        layer = before[-1] if len(before) == 3 else None
        relus, caps = (first_relu, relu), (first_cap, cap)
        found = Chain(layer, first, node, second, relus, caps, (*behind, node, *before))
        if not graphs.may_wait(found.replaced(), module):
            continue
        whole = found if training else replace(found, project=_behind(found.nodes[0], module))
        found = whole if graphs.may_wait(whole.replaced(), module) else found
        taken.update(found.replaced())
        yield found


def _behind(last: fx.Node, module: nn.Module) -> Projection | None:
    node = graphs.only_user(last)
    norm = None if node is None else graphs.only_user(node)
    if node is None or norm is None or not graphs.is_norm_call(norm, module):
        return None
    layer = graphs.layer_before(norm, module)
    if layer is None:
        return None
    after = graphs.only_user(norm)
    relu, cap = graphs.activation(after, module) or (None, 0.0)
    behind = (norm,) if relu is None or after is None else (after, norm)
    return Projection(layer, norm, relu, cap, (*behind, layer))


def _before(
    conv: fx.Node, module: nn.Module, taken: set[fx.Node]
) -> tuple[tuple[fx.Node, ...], fx.Node | None, str | None, float]:
    """The activation, batch norm and sparse layer in front of it; the norm, the activation's name and cap."""
    nothing: tuple[tuple[fx.Node, ...], None, None, float] = ((), None, None, 0.0)
    relu = conv.args[0]
    if not isinstance(relu, fx.Node) or len(relu.users) != 1 or relu in taken:
        return nothing
    known = graphs.activation(relu, module)
    norm = relu.args[0] if relu.args else None
    if known is None or not isinstance(norm, fx.Node) or len(norm.users) != 1:
        return nothing
    if not graphs.is_norm_call(norm, module):
        return nothing
    layer = graphs.layer_before(norm, module)
    nodes = (relu, norm) if layer is None else (relu, norm, layer)
    return nodes, norm, *known
