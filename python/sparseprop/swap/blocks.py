"""Inverted residual blocks in evaluation: forwards that are one, and blocks called one after the other."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx, nn

from sparseprop.nn.blocks import BlockParts, MaybeInverted, inverted_blocks
from sparseprop.nn.inverted import inverted_residual
from sparseprop.nn.mixin import Mixin
from sparseprop.swap import graphs

__all__ = ["block_parts", "calls_blocks", "join_blocks"]


@dataclass(frozen=True)
class BlockCall:
    """How a module calls a block.

    Attributes:
        inner: name of its child that is the block, None if it is one itself.
        adds: whether it adds its input to the block's output.
    """

    inner: str | None
    adds: bool


def block_parts(graph: fx.Graph | None) -> BlockParts | None:
    """What a forward finds that is `inverted_residual` of its argument and may add that; None if another."""
    steps = [node for node in graph.nodes if node.op != "get_attr"] if graph else []
    adds = _adds(steps)
    if adds is None or steps[1].target is not inverted_residual or steps[1].args[0] is not steps[0]:
        return None
    layer, first, cap1, conv, second, cap2, project, third, cap3 = steps[1].args[1:]
    paths = [str(part.target) for part in (conv, second, project, third, layer, first) if part is not None]
    return BlockParts(tuple(tuple(path.split(".")) for path in paths), (cap1, cap2, cap3), adds)


def _adds(steps: list[fx.Node]) -> bool | None:
    """Whether a forward, of one argument and one call, adds one to the other; None if it is none such."""
    if len(steps) not in (3, 4) or steps[-1].op != "output" or steps[-1].args != (steps[-2],):
        return None
    given, call, *behind = steps[:-1]
    if given.op != "placeholder":
        return None
    adds = [graphs.is_call(node, (operator.add,)) and {*node.args} == {given, call} for node in behind]
    return bool(adds) if all(adds) else None


def calls_blocks(module: nn.Module) -> fx.Graph | None:
    """The graph of a module's own forward in evaluation if it calls blocks one after the other."""
    blocks = [child for child in module.children() if any(map(_is_block, (child, *child.children())))]
    if "forward" in vars(module) or len(blocks) < 2:
        return None
    graph, _ = graphs.own_graph(module, False)
    return None if graph is None or not any(len(run) > 1 for run in _runs(graph, module)) else graph


def join_blocks(graph: fx.Graph, module: nn.Module) -> None:
    """Make calls of blocks one after the other a single call."""
    for run in _runs(graph, module):
        if len(run) > 1:
            _join(run, graph)


def _runs(graph: fx.Graph, module: nn.Module) -> list[list[tuple[fx.Node, BlockCall]]]:
    """The calls of blocks, in lists of those that read nothing but the one before."""
    runs: list[list[tuple[fx.Node, BlockCall]]] = []
    node: fx.Node
    for node in graph.nodes:
        call = _block_call(node, module)
        if call is None:
            continue
        before = runs[-1][-1][0] if runs else None
        if before is not None and node.args == (before,) and graphs.only_user(before) is node:
            runs[-1].append((node, call))
        else:
            runs.append([(node, call)])
    return runs


def _join(run: list[tuple[fx.Node, BlockCall]], graph: fx.Graph) -> None:
    last, _ = run[-1]
    with graph.inserting_before(last):
        blocks = [(graph.get_attr(str(node.target)), call.inner, call.adds) for node, call in run]
        joined = graph.call_function(inverted_blocks, (run[0][0].args[0], *blocks))
    last.replace_all_uses_with(joined)
    for node, _ in reversed(run):
        graph.erase_node(node)


def _block_call(node: fx.Node, module: nn.Module) -> BlockCall | None:
    """The block that a node calls: a module that is one, or that calls one and may add its input."""
    called = graphs.child(node, module)
    if called is None or not graphs.is_plain(node):
        return None
    if _is_block(called):
        return BlockCall(None, False)
    if isinstance(called, Mixin) or "forward" in vars(called) or not any(map(_is_block, called.children())):
        return None
    graph, _ = graphs.own_graph(called, False)
    steps = [] if graph is None else list(graph.nodes)
    adds = _adds(steps)
    inner = None if adds is None else graphs.child(steps[1], called)
    if inner is None or steps[1].args != (steps[0],) or steps[1].kwargs or not _is_block(inner):
        return None
    return BlockCall(str(steps[1].target), bool(adds))


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, MaybeInverted) and module.may_be_inverted()
