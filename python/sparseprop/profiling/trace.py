"""One training step with a stop-watch on every module: forward by hooks, backward by the nodes of autograd.

Autograd numbers its nodes in the order of their making, so a node belongs to the module that was running when
its number was due. No hook changes what is computed or saved, unlike `register_full_backward_hook`, which
forbids in-place activations.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.conv import _ConvNd

from sparseprop.errors import SparsePropError
from sparseprop.nn import SparseLayer
from sparseprop.profiling.ledger import Key, Ledger
from sparseprop.swap.measure import InputSpec

__all__ = ["AUTOGRAD", "LOSS", "OPTIMIZER", "Training", "contractions", "traced_step"]

LOSS, OPTIMIZER, AUTOGRAD = "(loss)", "(optimizer)", "(gradient sums)"
_sequence_number: Callable[[], int] = torch._C._autograd._get_sequence_nr


@dataclass(frozen=True)
class Training:
    """All that one step needs: `forward` maps the model to its loss-ready output."""

    model: nn.Module
    forward: Callable[[], Any]
    loss: Callable[[Any], Tensor]
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """One optimizer step; returns the loss."""
        loss = self.loss(self.forward())
        _check_loss(loss)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


@dataclass(frozen=True)
class CallSpec:
    """What a layer was given in one call, forward and backward (None if that did not reach it)."""

    input: InputSpec
    grad: InputSpec | None


def contractions(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose backward pass has two separable halves, by name."""
    kinds = (nn.Linear, _ConvNd, SparseLayer)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def traced_step(training: Training) -> tuple[dict[Key, float], dict[str, Counter[CallSpec]]]:
    """Run one step; seconds by name and "forward", "backward" or "accumulate", and by name how often a layer
    was called with what.

    Names are those of modules, and the three above for what happens outside of them.
    """
    tracer = _Tracer(training.model)
    ledger = tracer.ledger
    handles = tracer.watch_modules()
    try:
        ledger.enter((LOSS, "forward"))
        output = training.forward()
        tracer.boundary(LOSS)
        loss = training.loss(output)
        tracer.watch_nodes(loss)
        ledger.leave()
        ledger.enter((AUTOGRAD, "backward"))
        torch.autograd.backward(loss)
        ledger.leave()
        ledger.enter((OPTIMIZER, "forward"))
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        ledger.leave()
    finally:
        for handle in handles:
            handle.remove()
    return dict(ledger.seconds), tracer.calls()


class _Tracer:
    def __init__(self, model: nn.Module) -> None:
        self.ledger = Ledger()
        self._model = model
        self._first: list[int] = []  # ascending: from this node number on ...
        self._owner: list[str] = []  # ... nodes belong to this module
        self._calls: dict[str, list[CallSpec]] = {}

    def boundary(self, name: str) -> None:
        """Nodes made from now on belong to `name`."""
        self._first.append(_sequence_number())
        self._owner.append(name)

    def watch_modules(self) -> list[Any]:
        split = contractions(self._model)
        handles: list[Any] = []
        for name, module in self._model.named_modules():
            enter, leave = partial(self._enter, name), partial(self._leave, name, name in split)
            handles.append(module.register_forward_pre_hook(enter))
            # always called, so that the stack survives a model that catches its own errors
            handles.append(module.register_forward_hook(leave, always_call=True, with_kwargs=True))
        return handles

    def watch_nodes(self, loss: Tensor) -> None:
        owners = {id(p): name for name, m in self._model.named_modules() for p in m._parameters.values()}
        for node in _nodes(loss):
            parameter = getattr(node, "variable", None)
            name = self._owner_of(node) if parameter is None else owners.get(id(parameter), AUTOGRAD)
            key = (name, "backward" if parameter is None else "accumulate")
            node.register_prehook(partial(_on_enter, self.ledger, key))
            node.register_hook(partial(_on_leave, self.ledger))

    def calls(self) -> dict[str, Counter[CallSpec]]:
        return {name: Counter(calls) for name, calls in self._calls.items()}

    def _enter(self, name: str, *_: object) -> None:
        self.boundary(name)
        self.ledger.enter((name, "forward"))

    def _leave(self, name: str, split: bool, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.ledger.leave()
        outer = self.ledger.current
        self.boundary(LOSS if outer is None else outer[0])
        x = args[0] if args else kwargs.get("input")
        if split and isinstance(output, Tensor) and isinstance(x, Tensor):
            calls = self._calls.setdefault(name, [])
            calls.append(CallSpec(_spec(x), None))
            if output.requires_grad:
                note = partial(_note_grad, calls, len(calls) - 1)
                output.register_hook(note)  # type: ignore[no-untyped-call]

    def _owner_of(self, node: Node) -> str:
        at = bisect_right(self._first, node._sequence_nr()) - 1
        return self._owner[at] if at >= 0 else LOSS


def _on_enter(ledger: Ledger, key: Key, _: object) -> None:
    ledger.enter(key)


def _on_leave(ledger: Ledger, *_: object) -> None:
    ledger.leave()


def _note_grad(calls: list[CallSpec], which: int, grad: Tensor) -> None:
    calls[which] = CallSpec(calls[which].input, _spec(grad))


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        what = type(loss).__name__
        if isinstance(loss, Tensor):
            what = f"{loss.dtype} tensor of shape {tuple(loss.shape)}"
        raise SparsePropError(f"profile needs a loss that is a tensor of one real number, got a {what}.")
    if loss.grad_fn is None:
        raise SparsePropError(
            "profile found nothing to train: the loss depends on no parameter that requires a gradient."
        )


def _nodes(loss: Tensor) -> Iterator[Node]:
    waiting = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        new = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= new
        waiting.extend(new)


def _spec(x: Tensor) -> InputSpec:
    return InputSpec(tuple(x.shape), x.stride(), x.dtype, x.requires_grad, torch.is_grad_enabled())
