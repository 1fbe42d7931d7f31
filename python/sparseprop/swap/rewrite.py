"""Modules in whose own forward a batch norm takes its neighbours along, where `matches` finds them.

Such a module gets a class of its own, derived from its class, whose forward is the traced and changed one.
Only the module's own code is traced: its children stay calls, with their hooks, but for flat containers
with a part of a chain in them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from sparseprop.nn.blocks import BlockParts, MaybeInverted
from sparseprop.nn.hooks import hooked, hooks_everywhere
from sparseprop.nn.mixin import mix
from sparseprop.swap.blocks import block_parts, calls_blocks, join_blocks
from sparseprop.swap.matches import Matches, matches
from sparseprop.swap.sharing import share_inputs
from sparseprop.swap.tracing import defaults

__all__ = ["Rewritten", "rewrite"]

_RUNS = "_sparseprop_runs"


@dataclass(frozen=True)
class _Runs:
    """Forwards by `training`, which the traced code may depend on, and the children they know; the parts of
    the forward in evaluation if it is a block.
    """

    by_mode: dict[bool, Callable[..., Any]]
    block: BlockParts | None
    inlined: tuple[str, ...]
    children: list[Any]
    merged: tuple[tuple[tuple[str, ...], type[Any]], ...]  # ways to what is not called as such; classes
    names: tuple[str, ...]  # of the forward's arguments
    absent: frozenset[str]  # of those that are not given

    def hold(self, module: nn.Module) -> bool:
        """Whether the children are as they were, and no hook would miss a call."""
        if self.children != _children(module, self.inlined):
            return False
        for path, kind in self.merged:
            part = _part(module, path)
            if part is None or type(part) is not kind or hooked(part):
                return False
        return torch.compiler.is_compiling() or not hooks_everywhere()

    def fits(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the code was traced for such arguments."""
        given = {*self.names[: len(args)], *kwargs}
        return not given & self.absent and all(isinstance(x, Tensor) for x in (*args, *kwargs.values()))


def _children(module: nn.Module, inlined: tuple[str, ...]) -> list[Any]:
    """Names and classes of the children, also of those in lists and dicts of modules, and in containers that
    the code looks into while these have no hooks."""
    modules = module._modules
    found: list[Any] = [*modules, *map(type, modules.values())]
    for name, part in modules.items():
        if isinstance(part, nn.ModuleList | nn.ModuleDict) or (name in inlined and part and not hooked(part)):
            found.append(_children(part, ()))
    return found


class Rewritten(MaybeInverted):
    """Mixed into a module's class by `rewrite`; runs the changed forward of the mode it is in."""

    _sparseprop_runs: _Runs
    _derived = (_RUNS,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's; itself that once children were added, removed or replaced by others of another
        class, while hooks or other forwards are on those merged, and where an argument is no tensor, or given
        though it has a default.
        """
        runs = vars(self).get(_RUNS)
        if runs is None or not runs.hold(self) or not runs.fits(args, kwargs):
            return self._base.forward(self, *args, **kwargs)
        return runs.by_mode[self.training](self, *args, **kwargs)

    def may_be_inverted(self) -> bool:
        """Whether the changed forward in evaluation is a block's."""
        runs: _Runs | None = vars(self).get(_RUNS)
        return runs is not None and runs.block is not None

    def inverted_parts(self) -> BlockParts | None:
        """The parts of the changed forward in evaluation, if it is a block's and would be run."""
        runs: _Runs | None = vars(self).get(_RUNS)
        if runs is None or runs.block is None or self.training:
            return None
        return runs.block if runs.hold(self) else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _attach(self)


def rewrite(module: nn.Module) -> None:
    """Change the module's class until `unmix`; its batch norms must be native by now."""
    if not isinstance(module, Rewritten):
        mix(Rewritten, module)
    _attach(cast(Rewritten, module))


def _attach(module: Rewritten) -> None:
    found = {training: matches(module, training) for training in (True, False)}
    graphs = {training: _changed(module, found[training], training) for training in found}
    by_mode = {training: _forward(module, graph) for training, graph in graphs.items()}
    block = block_parts(graphs[False])
    inlined = max(found[True].inlined, found[False].inlined, key=len)
    paths = sorted(tuple(name.split(".")) for name in found[True].modules() | found[False].modules())
    merged = tuple((path, type(_part(module, path))) for path in paths)
    names = tuple(inspect.signature(module._base.forward).parameters)[1:]
    absent = frozenset(defaults(module))
    vars(module)[_RUNS] = _Runs(by_mode, block, inlined, _children(module, inlined), merged, names, absent)


def _part(module: nn.Module, path: tuple[str, ...]) -> nn.Module | None:
    """The module at the end of a path; None if there is none."""
    part: Any = module
    for name in path:
        part = None if part is None else part._modules.get(name)
    return cast("nn.Module | None", part)


def _changed(module: nn.Module, matches: Matches, training: bool) -> fx.Graph | None:
    """The graph of the module's forward with every match made one call; None if nothing changes."""
    if matches.found:
        graph = matches.found[0].replaced()[0].graph
    elif training or (found := calls_blocks(module)) is None:
        return None
    else:
        graph = found
    for match in matches.found:
        last, *_ = match.replaced()
        with graph.inserting_before(last):
            call = match.insert(graph)
        last.replace_all_uses_with(call)
        for node in match.replaced():
            graph.erase_node(node)
    share_inputs(graph, module) if training else join_blocks(graph, module)
    return graph


def _forward(module: nn.Module, graph: fx.Graph | None) -> Callable[..., Any]:
    """The graph, or the module's own forward, as a function of the module."""
    if graph is None:
        return getattr(module, "_base", type(module)).forward
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(code.src, names)
    return cast("Callable[..., Any]", names["forward"])
