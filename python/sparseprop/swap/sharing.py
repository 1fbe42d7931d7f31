"""Inputs that a sparse layer shares with other readers, as in residual blocks: one gradient for all."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from sparseprop.nn.chain import depthwise_chain
from sparseprop.nn.norm import norm_behind
from sparseprop.nn.shared import shared
from sparseprop.swap import graphs

__all__ = ["share_inputs"]


def share_inputs(graph: fx.Graph, module: nn.Module) -> None:
    """Let sparse layers of the module's graph hand on each input that is read again after them.

    The graph is one for training: in evaluation a layer and its batch norm are better run in one step.
    """
    for node in list(graph.nodes):
        x = _read_first(node, module)
        if x is None or not _read_again(node, x, module):
            continue
        with graph.inserting_before(node):
            call = graph.call_function(shared, (_layer(node, graph), x))
            out, others = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
        for user in set(x.users) - {node, call}:
            user.replace_input_with(x, others)
        _take(node, out, graph)


def _read_first(node: fx.Node, module: nn.Module) -> fx.Node | None:
    """What the sparse layer called by a node reads, if nothing has read it before."""
    alone = graphs.is_sparse_layer(graphs.child(node, module)) and graphs.is_plain(node)
    x: Any = None
    if node.target is norm_behind:
        x = node.args[2]
    elif alone or (node.target is depthwise_chain and node.args[1] is not None):
        x = node.args[0]
    return x if isinstance(x, fx.Node) and min(x.users) is node else None


def _read_again(node: fx.Node, x: fx.Node, module: nn.Module) -> bool:
    others = [user for user in x.users if user is not node]
    known: dict[int, bool] = {}
    return bool(others) and not any(
        user.op == "output" or graphs.writes(user, module, known) for user in others
    )


def _layer(node: fx.Node, graph: fx.Graph) -> Any:
    """The module that is called, as an argument."""
    if node.op == "call_module":
        return graph.get_attr(str(node.target))
    return node.args[1]


def _take(node: fx.Node, out: fx.Node, graph: fx.Graph) -> None:
    """Make the node go on from the layer's output."""
    if node.target is depthwise_chain:
        node.args = (out, None, *node.args[2:])
        return
    if node.target is norm_behind:
        norm: Any = node.args[0]
        with graph.inserting_before(node):
            replaced = graph.call_module(str(norm.target), (out,), node.kwargs)
    else:
        replaced = out
    node.replace_all_uses_with(replaced)
    graph.erase_node(node)
